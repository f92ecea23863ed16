// From pages to shared memory: rows of K and V by cp.async, a few keys a warp.
#pragma once

#include <cstdint>

#include "page_of_key.h"
#include "pagedcore/device.h"
#include "tile.h"
#include "work.h"

namespace pagedcore::gpu {

// Where a key's rows are: in the table's block, or nowhere (block -1).
struct Place {
  int block;
  int slot;
};

// Keys outside of [begin, end), and their table entries, are not looked at.
struct SeenKeys {
  TableRow table;
  int begin, end;

  PAGEDCORE_MEMBER Place place_of(const PlannedAttention& params, int key) const {
    if (key < begin || key >= end) return {-1, 0};
    const int index = quotient(key, params.plan.by_block_size);
    return {block_at(params.attention, table, index), key - index * params.attention.block_size};
  }
};

// What the rows of a tile see: as far as the table goes, which a length past it is flagged for.
PAGEDCORE_DEVICE SeenKeys seen_keys(const AttentionParams& p, const Span& s) {
  if (p.seq_lens[s.seq] > p.max_blocks * p.block_size) report(p.faults, DeviceFault::length);
  return {table_row_of(p, s.seq), s.work.begin, s.work.end};
}

// Starts the copies of the rows of K and V, of elements C, of kKeys keys; lane i brings the place of key i % kKeys. A
// key that is nowhere gets zeros: what lies in unwritten memory may be NaN, and 0 * NaN is not 0. Bit i of the result:
// key i is somewhere.
template <int kDim, int kKeys, class C>
PAGEDCORE_DEVICE uint32_t load_keys(const AttentionParams& p, device::Lane lane, int kv_head, Place place,
                                    device::SharedAddress k_rows, device::SharedAddress v_rows) {
  using Rows = Tile<kDim, sizeof(C)>;
  static_assert(kKeys <= device::kWarpSize && device::kWarpSize % kKeys == 0, "a lane for each key");
  constexpr int kCopies = kKeys * Rows::kChunks;
  const uint32_t found = device::ballot(place.block >= 0);
  const C* k = static_cast<const C*>(p.k.data) + kv_head * p.k.head_stride;
  const C* v = static_cast<const C*>(p.v.data) + kv_head * p.v.head_stride;
#pragma unroll 2  // more would keep that many pairs of 64-bit addresses in registers
  for (int i = 0; i < (kCopies + device::kWarpSize - 1) / device::kWarpSize; ++i) {
    const int copy = i * device::kWarpSize + lane.id;
    const int row = copy / Rows::kChunks, chunk = copy % Rows::kChunks;
    const int block = device::shuffle(place.block, row);
    const int slot = device::shuffle(place.slot, row);
    if (copy >= kCopies) continue;  // never, where the copies are a multiple of 32
    const bool readable = block >= 0;
    // Where a block begins takes 64 bits, where a row is in it 32: why_not_tiled sees to that.
    const int64_t k_at = readable ? block * p.k.block_stride : 0;
    const int64_t v_at = readable ? block * p.v.block_stride : 0;
    const int k_in = readable ? slot * static_cast<int>(p.k.token_stride) + chunk * Rows::kChunkElements : 0;
    const int v_in = readable ? slot * static_cast<int>(p.v.token_stride) + chunk * Rows::kChunkElements : 0;
    device::cp_async_16(k_rows + Rows::offset(row, chunk), k + k_at + k_in, readable);
    device::cp_async_16(v_rows + Rows::offset(row, chunk), v + v_at + v_in, readable);
  }
  return kKeys == device::kWarpSize ? found : found & ((1u << kKeys % 32) - 1);
}

// Starts the copies of the scales of these keys, or writes 1 where a side has none. A key that is nowhere gets 0, as
// its codes do.
template <int kKeys>
PAGEDCORE_DEVICE void load_scales(const AttentionParams& p, device::Lane lane, int kv_head, Place place,
                                  float* k_scales, float* v_scales) {
#pragma unroll
  for (int side = lane.id / kKeys; side < 2; side += device::kWarpSize / kKeys) {
    const Scales& scales = side == 0 ? p.k_scale : p.v_scale;
    float* to = (side == 0 ? k_scales : v_scales) + lane.id % kKeys;
    if (scales.data == nullptr) {
      *to = 1.0f;
      continue;
    }
    const bool readable = place.block >= 0;
    const int64_t at =
        readable ? place.block * scales.block_stride + kv_head * scales.head_stride + place.slot * scales.token_stride
                 : 0;
    device::cp_async_4(device::shared_address(to), scales.data + at, readable);
  }
}

}  // namespace pagedcore::gpu
