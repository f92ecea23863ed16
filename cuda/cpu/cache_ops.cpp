// Ops that move KV data, and look at it only to quantise it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu.h"
#include "errors.h"
#include "pagedcore/quantise.h"
#include "threads.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kBytesPerThread = 1 << 18;  // less is not worth waking a thread

int useful_threads(int num_threads, int64_t bytes) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, bytes / kBytesPerThread)));
}

// Calls body(share) for every share in [0, count), on as many threads.
template <class Body>
void parallel_shares(int count, const Body& body) {
  std::atomic<int> cursor{0};
  parallel(count, [&](int) {
    for (int share; (share = cursor.fetch_add(1, std::memory_order_relaxed)) < count;) body(share);
  });
}

// Which of `count` shares a slot belongs to: always the same one, so that of two tokens with one slot the later one is
// written last. Runs of slots stay together, and Fibonacci hashing deals them out evenly, neighbours or not.
int share_of(int64_t slot, int count) {
  const uint64_t hash = static_cast<uint64_t>(slot >> 4) * 0x9E3779B97F4A7C15u >> 32;
  return static_cast<int>(hash * static_cast<uint64_t>(count) >> 32);
}

void write_side(const CacheWriteParams& p, const char* source, int64_t token_stride, int64_t head_stride,
                const Pages& pages, int64_t bytes, int64_t token, int64_t block, int64_t offset) {
  const int64_t size = p.element_size;
  const char* from = source + token * token_stride * size;
  char* to = static_cast<char*>(pages.data) + (block * pages.block_stride + offset * pages.token_stride) * size;
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    std::memcpy(to + head * pages.head_stride * size, from + head * head_stride * size, static_cast<size_t>(bytes));
  }
}

template <class T>
void quantise_row(const T* from, int64_t count, float* scale, bool make_scale, e4m3* to) {
  if (make_scale) {
    float most = 0.0f;
    for (int64_t d = 0; d < count; ++d) most = absolute_max(most, to_float(from[d]));
    *scale = row_scale(most);
  }
  const float factor = scale ? *scale : 1.0f;
  for (int64_t d = 0; d < count; ++d) to[d] = quantise(to_float(from[d]), factor);
}

// All heads of a token, as codes.
template <class T>
void quantise_side(const CacheWriteParams& p, const void* source, int64_t token_stride, int64_t head_stride,
                   const Pages& pages, const Scales& scales, bool make_scale, int64_t bytes, int64_t token,
                   int64_t block, int64_t offset) {
  const T* from = static_cast<const T*>(source) + token * token_stride;
  e4m3* to = static_cast<e4m3*>(pages.data) + block * pages.block_stride + offset * pages.token_stride;
  float* scale = scales.data ? scales.data + block * scales.block_stride + offset * scales.token_stride : nullptr;
  for (int32_t head = 0; head < p.num_kv_heads; ++head) {
    quantise_row(from + head * head_stride, bytes / p.element_size, scale ? scale + head * scales.head_stride : nullptr,
                 make_scale, to + head * pages.head_stride);
  }
}

template <class T>
void quantise_token(const CacheWriteParams& p, int64_t token, int64_t block, int64_t offset) {
  quantise_side<T>(p, p.key, p.key_token_stride, p.key_head_stride, p.k, p.k_scale, p.makes_k_scale, p.key_bytes, token,
                   block, offset);
  quantise_side<T>(p, p.value, p.value_token_stride, p.value_head_stride, p.v, p.v_scale, p.makes_v_scale,
                   p.value_bytes, token, block, offset);
}

void copy_token(const CacheWriteParams& p, int64_t token, int64_t block, int64_t offset) {
  write_side(p, static_cast<const char*>(p.key), p.key_token_stride, p.key_head_stride, p.k, p.key_bytes, token, block,
             offset);
  write_side(p, static_cast<const char*>(p.value), p.value_token_stride, p.value_head_stride, p.v, p.value_bytes, token,
             block, offset);
}

void check_blocks(const char* name, const int32_t* blocks, int64_t count, int64_t columns, int64_t num_blocks) {
  for (int64_t i = 0; i < count * columns; ++i) {
    if (blocks[i] >= 0 && blocks[i] < num_blocks) continue;
    std::string where = "block " + std::to_string(blocks[i]) + " at index " + std::to_string(i / columns);
    ArgumentError error(Fault::block, name, "ids in [0, " + std::to_string(num_blocks) + ")", std::move(where));
    error.block = blocks[i];
    error.num_blocks = num_blocks;
    throw error;
  }
}

int64_t least_blocks(const std::vector<BlockRegion>& regions) {
  int64_t least = INT32_MAX;
  for (const BlockRegion& region : regions) least = std::min(least, region.num_blocks);
  return least;
}

// Calls run(offset) for the offset of every contiguous run of a block.
template <class Run>
void for_each_run(const BlockRegion& region, const Run& run, size_t axis = 0, int64_t offset = 0) {
  if (axis == region.shape.size()) return run(offset);
  for (int64_t i = 0; i < region.shape[axis]; ++i)
    for_each_run(region, run, axis + 1, offset + i * region.strides[axis]);
}

int64_t block_bytes(const BlockRegion& region) {
  int64_t bytes = region.contiguous_bytes;
  for (const int64_t extent : region.shape) bytes *= extent;
  return bytes;
}

int64_t block_bytes(const std::vector<BlockRegion>& regions) {
  int64_t bytes = 0;
  for (const BlockRegion& region : regions) bytes += block_bytes(region);
  return bytes;
}

// Regions whose blocks together are the blocks of `regions`, enough of them for all threads where that can be had:
// whole regions, else pieces of their longest axis (the contiguous run, or the outermost one).
std::vector<BlockRegion> cut_blocks(const std::vector<BlockRegion>& regions, int threads) {
  if (static_cast<int>(regions.size()) >= threads) return regions;
  constexpr int64_t kLeastRun = 4096;  // bytes: shorter copies are slower, and threads would share cache lines
  std::vector<BlockRegion> parts;
  for (const BlockRegion& whole : regions) {
    const bool cut_run = whole.contiguous_bytes >= threads * kLeastRun || whole.shape.empty();
    const int64_t unit = cut_run ? 64 : 1;  // runs are cut between cache lines
    const int64_t extent = cut_run ? (whole.contiguous_bytes + unit - 1) / unit : whole.shape[0];
    const int64_t count = std::min<int64_t>(threads, extent);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first = extent * i / count * unit, last = extent * (i + 1) / count * unit;
      BlockRegion& part = parts.emplace_back(whole);
      if (cut_run) {
        part.data += first;
        part.contiguous_bytes = std::min(last, whole.contiguous_bytes) - first;
      } else {
        part.data += first * whole.strides[0];
        part.shape[0] = last - first;
      }
    }
  }
  return parts;
}

}  // namespace

void reshape_and_cache(const CacheWriteParams& p, int64_t num_blocks, int num_threads) {
  const int64_t num_slots = num_blocks * p.block_size;
  for (int64_t token = 0; token < p.num_tokens; ++token) {
    const int64_t slot = p.slot_mapping[token];
    if (slot < num_slots) continue;
    throw ArgumentError(Fault::invalid_argument, "slot_mapping[" + std::to_string(token) + "]",
                        "a slot below " + std::to_string(num_slots) + " (" + std::to_string(num_blocks) +
                            " blocks of " + std::to_string(p.block_size) + " tokens), or negative for padding",
                        std::to_string(slot));
  }
  const auto write = p.kv_dtype == p.dtype   ? copy_token
                     : p.dtype == DType::f32 ? quantise_token<float>
                     : p.dtype == DType::f16 ? quantise_token<f16>
                                             : quantise_token<bf16>;
  const int shares = useful_threads(num_threads, p.num_tokens * p.num_kv_heads * (p.key_bytes + p.value_bytes));
  parallel_shares(shares, [&](int share) {
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      const int64_t slot = p.slot_mapping[token];
      if (slot < 0 || share_of(slot, shares) != share) continue;
      const int64_t block = slot / p.block_size, offset = slot % p.block_size;
      write(p, token, block, offset);
    }
  });
}

void copy_blocks(const std::vector<BlockRegion>& regions, const int32_t* pairs, int64_t num_pairs, int num_threads) {
  check_blocks("pairs", pairs, num_pairs, 2, least_blocks(regions));
  // A later pair may read what an earlier one wrote, so threads take parts of every block and not pairs: each part goes
  // through all pairs in order.
  const int threads = useful_threads(num_threads, num_pairs * block_bytes(regions));
  const std::vector<BlockRegion> parts = cut_blocks(regions, threads);
  std::atomic<size_t> cursor{0};
  parallel(threads, [&](int) {
    for (size_t part; (part = cursor.fetch_add(1, std::memory_order_relaxed)) < parts.size();) {
      const BlockRegion& region = parts[part];
      for (int64_t i = 0; i < num_pairs; ++i) {
        const char* source = region.data + pairs[2 * i] * region.block_stride;
        char* target = region.data + pairs[2 * i + 1] * region.block_stride;
        if (source == target) continue;
        for_each_run(region, [&](int64_t offset) {
          std::memcpy(target + offset, source + offset, static_cast<size_t>(region.contiguous_bytes));
        });
      }
    }
  });
}

void zero_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, int num_threads) {
  check_blocks("blocks", blocks, count, 1, least_blocks(regions));
  const int shares = useful_threads(num_threads, count * block_bytes(regions));
  parallel_shares(shares, [&](int share) {
    for (const BlockRegion& region : regions) {
      for (int64_t i = count * share / shares; i < count * (share + 1) / shares; ++i) {
        char* target = region.data + blocks[i] * region.block_stride;
        for_each_run(region, [&](int64_t offset) {
          std::memset(target + offset, 0, static_cast<size_t>(region.contiguous_bytes));
        });
      }
    }
  });
}

namespace {

// Calls move(in the block, in the staging buffer, bytes) for every run of every block. An item is one block of one
// region; two entries that name one block are only read by gather, and of scatter's the later is kept, so scatter has
// one thread a region.
template <class Move>
void move_staged(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, int64_t per_item,
                 int num_threads, const Move& move) {
  check_blocks("blocks", blocks, count, 1, least_blocks(regions));
  const int64_t items = (count + per_item - 1) / per_item;
  const int64_t total = items * static_cast<int64_t>(regions.size());
  const int threads = useful_threads(num_threads, count * block_bytes(regions));
  std::vector<int64_t> begins;
  int64_t begin = 0;
  for (const BlockRegion& region : regions) {
    begins.push_back(begin);
    begin += count * block_bytes(region);
  }
  std::atomic<int64_t> cursor{0};
  parallel(threads, [&](int) {
    for (int64_t item; (item = cursor.fetch_add(1, std::memory_order_relaxed)) < total;) {
      const auto which = static_cast<size_t>(item / items);
      const BlockRegion& region = regions[which];
      const int64_t first = item % items * per_item;
      for (int64_t i = first; i < std::min(first + per_item, count); ++i) {
        char* const block = region.data + blocks[i] * region.block_stride;
        int64_t staged = begins[which] + i * block_bytes(region);
        for_each_run(region, [&](int64_t offset) {
          move(block + offset, staged, static_cast<size_t>(region.contiguous_bytes));
          staged += region.contiguous_bytes;
        });
      }
    }
  });
}

}  // namespace

void gather_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, char* staging,
                   int num_threads) {
  move_staged(regions, blocks, count, 1, num_threads,
              [&](const char* block, int64_t at, size_t bytes) { std::memcpy(staging + at, block, bytes); });
}

void scatter_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, const char* staging,
                    int num_threads) {
  move_staged(regions, blocks, count, std::max<int64_t>(count, 1), num_threads,
              [&](char* block, int64_t at, size_t bytes) { std::memcpy(block, staging + at, bytes); });
}

void update_block_table(int32_t* table, int64_t row_stride, int64_t rows, int64_t columns, const int32_t* updates,
                        int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = updates[i * 3], index = updates[i * 3 + 1];
    if (row >= 0 && row < rows && index >= 0 && index < columns) continue;
    throw ArgumentError(Fault::invalid_argument, "updates[" + std::to_string(i) + "]",
                        "a row below " + std::to_string(rows) + " and an index below " + std::to_string(columns),
                        "(" + std::to_string(row) + ", " + std::to_string(index) + ")");
  }
  for (int64_t i = 0; i < count; ++i) table[updates[i * 3] * row_stride + updates[i * 3 + 1]] = updates[i * 3 + 2];
}

}  // namespace pagedcore::cpu
