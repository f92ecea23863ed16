// A warp's 16 rows of Q as the fragments that mma takes, a step of 16 columns at a time: held in registers, or read
// from shared memory where the output leaves no registers for them.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "rows.h"
#include "tile.h"

namespace pagedcore::gpu {

PAGEDCORE_DEVICE const uint16_t* start_of_query(const AttentionParams& p, const Row& row) {
  return static_cast<const uint16_t*>(p.query) + row.token * p.query_token_stride + row.head * p.query_head_stride;
}

template <int kDim_, class T>
struct QueryInRegisters {
  static constexpr int kDim = kDim_;
  using Element = T;

  uint32_t held[kDim / 16][4];

  // `rows`: lane / 4 and lane / 4 + 8 of the warp's.
  PAGEDCORE_MEMBER void load(const AttentionParams& p, device::Lane lane, const Row (&rows)[2]) {
    const int pair = lane.id % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from = start_of_query(p, rows[half]) + pair;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        held[step][half] = rows[half].valid ? device::load_4(from + step * 16) : 0u;
        held[step][half + 2] = rows[half].valid ? device::load_4(from + step * 16 + 8) : 0u;
      }
    }
  }

  PAGEDCORE_MEMBER void fragment(int step, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = held[step][i];
  }
};

template <int kDim_, class T>
struct QueryInShared {
  static constexpr int kDim = kDim_;
  using Element = T;
  using Rows = Tile<kDim>;

  device::SharedAddress row;  // of the tile: what this lane reads of the first step

  // From rows first_row to first_row + 15 of the tile.
  PAGEDCORE_MEMBER void read_from(char* shared, device::Lane lane, int first_row) {
    row = device::shared_address(shared) + Rows::offset(first_row + lane.id / 8 % 2 * 8 + lane.id % 8, lane.id / 16);
  }

  // Fills rows [0, count) of the tile in `shared`. Reached by all of the block's `threads`, and needs a barrier after.
  static PAGEDCORE_MEMBER void fill(const PlannedAttention& params, const Span& s, int count, int threads,
                                    char* shared) {
    for (int i = device::thread_id(); i < count * Rows::kChunks; i += threads) {
      const int r = i / Rows::kChunks, chunk = i % Rows::kChunks;
      const Row row = row_of(params, s, r);
      const device::Vec16 zero{};
      device::store_16(
          shared + Rows::offset(r, chunk),
          row.valid ? device::load_16(start_of_query(params.attention, row) + chunk * Rows::kChunkElements) : zero);
    }
  }

  PAGEDCORE_MEMBER void fragment(int step, uint32_t (&a)[4]) const { device::ldmatrix_x4(a, Rows::at_step(row, step)); }
};

}  // namespace pagedcore::gpu
