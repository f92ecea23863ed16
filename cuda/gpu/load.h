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

// Starts the copies of the rows of K and V of kKeys keys; lane i brings the place of key i % kKeys. A key that is
// nowhere gets zeros: what lies in unwritten memory may be NaN, and 0 * NaN is not 0. Bit i of the result: key i is
// somewhere.
template <int kDim, int kKeys, class T>
PAGEDCORE_DEVICE uint32_t load_keys(const AttentionParams& p, device::Lane lane, int kv_head, Place place,
                                    device::SharedAddress k_rows, device::SharedAddress v_rows) {
  using Rows = Tile<kDim>;
  static_assert(kKeys <= device::kWarpSize && device::kWarpSize % kKeys == 0, "a lane for each key");
  constexpr int kCopies = kKeys * Rows::kChunks;
  const uint32_t found = device::ballot(place.block >= 0);
  const T* k = static_cast<const T*>(p.k.data) + kv_head * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + kv_head * p.v.head_stride;
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
    const int k_in = readable ? slot * static_cast<int>(p.k.token_stride) + chunk * kChunkElements : 0;
    const int v_in = readable ? slot * static_cast<int>(p.v.token_stride) + chunk * kChunkElements : 0;
    device::cp_async_16(k_rows + Rows::offset(row, chunk), k + k_at + k_in, readable);
    device::cp_async_16(v_rows + Rows::offset(row, chunk), v + v_at + v_in, readable);
  }
  return kKeys == device::kWarpSize ? found : found & ((1u << kKeys % 32) - 1);
}

}  // namespace pagedcore::gpu
