// Moving bytes of the cache: this step's K and V to their slots, whole blocks to other blocks, to zero, to a staging
// buffer and back, and changes of a block table that lives on the device. All of them are bound by bandwidth alone, so
// all they do is to use the widest access that every address allows, and to spread what is long over many blocks of the
// grid.
//
// Indices that are out of range are skipped and flagged: nothing on the host has read them.
#include "gpu.h"

#include "grid.h"
#include "pagedcore/device.h"
#include "quantise.h"
#include "report.h"
#include "slots.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int64_t kRunChunkBytes = 16 * 1024;  // of a contiguous run, per block of the grid

// The widest unit, 16, 4, 2 or 1 bytes, that divides all of `values`: addresses, strides and lengths.
int widest_unit(std::initializer_list<int64_t> values) {
  int64_t bits = 16;
  for (const int64_t value : values) bits |= value;
  const int64_t unit = bits & -bits;
  return unit >= 16 ? 16 : unit >= 4 ? 4 : static_cast<int>(unit);
}

int64_t address(const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); }

// Units [lane, lane + lanes, ...) of a run; zeros where `from` is null.
template <class Unit>
PAGEDCORE_DEVICE void copy_run(const char* from, char* to, int64_t bytes, int lane, int lanes) {
  const int64_t count = bytes / static_cast<int64_t>(sizeof(Unit));
  for (int64_t i = lane; i < count; i += lanes) {
    if constexpr (sizeof(Unit) == 16) {
      store_16(to + i * 16, from != nullptr ? load_16(from + i * 16) : Vec16{});
    } else {
      reinterpret_cast<Unit*>(to)[i] = from != nullptr ? reinterpret_cast<const Unit*>(from)[i] : Unit{};
    }
  }
}

// A warp writes one row of K and one of V: one token's, one head's.
template <class Unit>
PAGEDCORE_KERNEL(kThreads, 1)
write_kernel(const WriteParams params) {
  const CacheWriteParams& p = params.write;
  constexpr int kWarps = kThreads / kWarpSize;
  const int64_t rows = p.num_tokens * p.num_kv_heads;
  for (int64_t row = int64_t{block_x()} * kWarps + warp_id(); row < rows; row += int64_t{grid_x()} * kWarps) {
    const int64_t token = row / p.num_kv_heads, head = row % p.num_kv_heads;
    const SlotPlace slot = place_of_token(params, token);
    if (slot.block < 0) continue;
    const auto source = [&](const void* from, int64_t token_stride, int64_t head_stride) {
      return static_cast<const char*>(from) + (token * token_stride + head * head_stride) * p.element_size;
    };
    const auto place = [&](const Pages& to) {
      return static_cast<char*>(to.data) +
             (slot.block * to.block_stride + head * to.head_stride + slot.offset * to.token_stride) * p.element_size;
    };
    copy_run<Unit>(source(p.key, p.key_token_stride, p.key_head_stride), place(p.k), p.key_bytes, lane_id(), kWarpSize);
    copy_run<Unit>(source(p.value, p.value_token_stride, p.value_head_stride), place(p.v), p.value_bytes, lane_id(),
                   kWarpSize);
  }
}

enum class Move { copy, zero, gather, scatter };

struct MoveParams {
  BlockRegion region;
  const int32_t* ids;  // [count, 2] pairs (src, dst) of a copy, else [count] blocks
  int64_t count;
  char* staging;   // [count, rows, contiguous_bytes] of gather and scatter
  int64_t rows;    // contiguous runs of a block
  int64_t chunks;  // of a run
};

// A block of the grid moves one chunk of one run of one block.
template <class Unit, Move kMove>
PAGEDCORE_KERNEL(kThreads, 1)
move_kernel(const MoveParams p) {
  const BlockRegion& region = p.region;
  for (int64_t item = block_x(); item < p.count * p.rows * p.chunks; item += grid_x()) {
    const int64_t chunk = item % p.chunks, row = item / p.chunks % p.rows, entry = item / p.chunks / p.rows;
    const int64_t begin = chunk * kRunChunkBytes;
    const int64_t left = region.contiguous_bytes - begin;
    const int64_t bytes = left < kRunChunkBytes ? left : kRunChunkBytes;
    const int64_t in_block =
        row / region.shape[1] * region.strides[0] + row % region.shape[1] * region.strides[1] + begin;
    const auto known = [&](int32_t id) {
      if (id >= 0 && id < region.num_blocks) return true;
      report(region.faults, DeviceFault::block);
      return false;
    };
    const auto at = [&](int32_t id) { return region.data + id * region.block_stride + in_block; };
    char* const staged = p.staging + (entry * p.rows + row) * region.contiguous_bytes + begin;
    const int32_t id = p.ids[kMove == Move::copy ? entry * 2 : entry];
    if (!known(id)) continue;
    if constexpr (kMove == Move::copy) {
      const int32_t to = p.ids[entry * 2 + 1];
      if (known(to)) copy_run<Unit>(at(id), at(to), bytes, thread_id(), kThreads);
    } else if constexpr (kMove == Move::zero) {
      copy_run<Unit>(nullptr, at(id), bytes, thread_id(), kThreads);
    } else if constexpr (kMove == Move::gather) {
      copy_run<Unit>(at(id), staged, bytes, thread_id(), kThreads);
    } else {
      copy_run<Unit>(staged, at(id), bytes, thread_id(), kThreads);
    }
  }
}

template <Move kMove>
void move(const BlockRegion& region, const int32_t* ids, int64_t count, char* staging, Stream stream) {
  const int64_t rows = region.shape[0] * region.shape[1];
  if (count == 0 || rows == 0 || region.contiguous_bytes == 0) return;
  const int64_t chunks = (region.contiguous_bytes + kRunChunkBytes - 1) / kRunChunkBytes;
  const MoveParams params{region, ids, count, staging, rows, chunks};
  const int grid = grid_for(count * rows * chunks);
  const auto run = [&](auto kernel) { launch(kernel, grid, 1, 1, kThreads, 0, stream, params); };
  switch (widest_unit({address(region.data), region.block_stride, region.strides[0], region.strides[1],
                       region.contiguous_bytes, address(staging)})) {
    case 16:
      return run(move_kernel<Vec16, kMove>);
    case 4:
      return run(move_kernel<uint32_t, kMove>);
    case 2:
      return run(move_kernel<uint16_t, kMove>);
    default:
      return run(move_kernel<uint8_t, kMove>);
  }
}

struct TableParams {
  int32_t* table;
  int64_t row_stride, rows, columns;
  const int32_t* updates;  // [count, 3]: row, index, block
  int64_t count;
  uint32_t* faults;
};

PAGEDCORE_KERNEL(kThreads, 1) table_kernel(const TableParams p) {
  for (int64_t i = int64_t{block_x()} * kThreads + thread_id(); i < p.count; i += int64_t{grid_x()} * kThreads) {
    const int32_t row = p.updates[i * 3], index = p.updates[i * 3 + 1];
    if (row < 0 || row >= p.rows || index < 0 || index >= p.columns) {
      report(p.faults, DeviceFault::update);
      continue;
    }
    p.table[row * p.row_stride + index] = p.updates[i * 3 + 2];
  }
}

template <Move kMove>
void load_move() {
  load(move_kernel<Vec16, kMove>);
  load(move_kernel<uint32_t, kMove>);
  load(move_kernel<uint16_t, kMove>);
  load(move_kernel<uint8_t, kMove>);
}

}  // namespace

void load_cache_ops() {
  load(write_kernel<Vec16>);
  load(write_kernel<uint32_t>);
  load(write_kernel<uint16_t>);
  load_move<Move::copy>();
  load_move<Move::zero>();
  load_move<Move::gather>();
  load_move<Move::scatter>();
  load(table_kernel);
}

void reshape_and_cache(const CacheWriteParams& p, int64_t num_blocks, Stream stream) {
  if (p.num_tokens == 0) return;
  if (p.kv_dtype != p.dtype) return quantise_and_cache(p, num_blocks, stream);
  const WriteParams params{p, num_blocks};
  const int grid = grid_for((p.num_tokens * p.num_kv_heads + kThreads / kWarpSize - 1) / (kThreads / kWarpSize));
  const auto run = [&](auto kernel) { launch(kernel, grid, 1, 1, kThreads, 0, stream, params); };
  const auto stride = [&](int64_t elements) { return elements * p.element_size; };
  switch (
      widest_unit({address(p.key), stride(p.key_token_stride), stride(p.key_head_stride), p.key_bytes, address(p.value),
                   stride(p.value_token_stride), stride(p.value_head_stride), p.value_bytes, address(p.k.data),
                   stride(p.k.block_stride), stride(p.k.head_stride), stride(p.k.token_stride), address(p.v.data),
                   stride(p.v.block_stride), stride(p.v.head_stride), stride(p.v.token_stride)})) {
    case 16:
      return run(write_kernel<Vec16>);
    case 4:
      return run(write_kernel<uint32_t>);
    default:
      return run(write_kernel<uint16_t>);
  }
}

void copy_blocks(const BlockRegion& region, const int32_t* pairs, int64_t num_pairs, Stream stream) {
  move<Move::copy>(region, pairs, num_pairs, nullptr, stream);
}

void zero_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, Stream stream) {
  move<Move::zero>(region, blocks, count, nullptr, stream);
}

void gather_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, void* staging, Stream stream) {
  move<Move::gather>(region, blocks, count, static_cast<char*>(staging), stream);
}

void scatter_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, const void* staging,
                    Stream stream) {
  // Only read: one kernel type for both directions.
  move<Move::scatter>(region, blocks, count, static_cast<char*>(const_cast<void*>(staging)), stream);
}

void update_block_table(int32_t* table, int64_t row_stride, int64_t rows, int64_t columns, const int32_t* updates,
                        int64_t count, uint32_t* faults, Stream stream) {
  if (count == 0) return;
  launch(table_kernel, grid_for((count + kThreads - 1) / kThreads), 1, 1, kThreads, 0, stream,
         TableParams{table, row_stride, rows, columns, updates, count, faults});
}

}  // namespace pagedcore::gpu
