// Ops that move KV data without looking at it.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu.h"
#include "errors.h"
#include "threads.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kBytesPerThread = 1 << 18;  // less is not worth waking a thread

int useful_threads(int num_threads, int64_t bytes) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(num_threads, bytes / kBytesPerThread)));
}

// Splits [0, count) evenly: thread i of n takes one range.
template <class Body>
void parallel_ranges(int num_threads, int64_t count, const Body& body) {
  std::atomic<int> cursor{0};
  const auto run = [&](int) {
    for (int i; (i = cursor.fetch_add(1, std::memory_order_relaxed)) < num_threads;) {
      body(count * i / num_threads, count * (i + 1) / num_threads);
    }
  };
  parallel(num_threads, run);
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

int64_t block_bytes(const std::vector<BlockRegion>& regions) {
  int64_t bytes = 0;
  for (const BlockRegion& region : regions) {
    int64_t size = region.contiguous_bytes;
    for (const int64_t extent : region.shape) size *= extent;
    bytes += size;
  }
  return bytes;
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
  const int64_t bytes = p.num_tokens * p.num_kv_heads * (p.key_bytes + p.value_bytes);
  parallel_ranges(useful_threads(num_threads, bytes), p.num_tokens, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t slot = p.slot_mapping[token];
      if (slot < 0) continue;
      const int64_t block = slot / p.block_size, offset = slot % p.block_size;
      write_side(p, static_cast<const char*>(p.key), p.key_token_stride, p.key_head_stride, p.k, p.key_bytes, token,
                 block, offset);
      write_side(p, static_cast<const char*>(p.value), p.value_token_stride, p.value_head_stride, p.v, p.value_bytes,
                 token, block, offset);
    }
  });
}

void copy_blocks(const std::vector<BlockRegion>& regions, const int32_t* pairs, int64_t num_pairs, int num_threads) {
  check_blocks("pairs", pairs, num_pairs, 2, least_blocks(regions));
  // Pairs stay in order within a region, since a later one may read what an earlier one wrote; regions are independent.
  const int threads = useful_threads(num_threads, num_pairs * block_bytes(regions));
  const bool by_region = static_cast<int>(regions.size()) >= threads;
  const auto copy = [&](int64_t first, int64_t last, int64_t from, int64_t to) {
    for (int64_t r = first; r < last; ++r) {
      const BlockRegion& region = regions[static_cast<size_t>(r)];
      for (int64_t i = from; i < to; ++i) {
        const char* source = region.data + pairs[2 * i] * region.block_stride;
        char* target = region.data + pairs[2 * i + 1] * region.block_stride;
        if (source == target) continue;
        for_each_run(region, [&](int64_t offset) {
          std::memcpy(target + offset, source + offset, static_cast<size_t>(region.contiguous_bytes));
        });
      }
    }
  };
  const auto count = static_cast<int64_t>(regions.size());
  if (by_region) {
    parallel_ranges(threads, count, [&](int64_t first, int64_t last) { copy(first, last, 0, num_pairs); });
  } else {
    copy(0, count, 0, num_pairs);
  }
}

void zero_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, int num_threads) {
  check_blocks("blocks", blocks, count, 1, least_blocks(regions));
  parallel_ranges(useful_threads(num_threads, count * block_bytes(regions)), count, [&](int64_t first, int64_t last) {
    for (const BlockRegion& region : regions) {
      for (int64_t i = first; i < last; ++i) {
        char* target = region.data + blocks[i] * region.block_stride;
        for_each_run(region, [&](int64_t offset) {
          std::memset(target + offset, 0, static_cast<size_t>(region.contiguous_bytes));
        });
      }
    }
  });
}

}  // namespace pagedcore::cpu
