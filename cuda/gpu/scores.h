// Scores of a warp's 16 rows of Q against keys in shared memory, and what is done to a score before the softmax.
#pragma once

#include <cmath>
#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/softmax.h"
#include "query.h"
#include "rows.h"
#include "tile.h"

namespace pagedcore::gpu {

// Q K^T of 16 rows by kKeys keys, as it comes from the product: score[i][c] is key i * 8 + lane % 4 * 2 + c % 2 of row
// lane / 4 + c / 2 * 8.
template <int kKeys, class Query>
PAGEDCORE_DEVICE void multiply_keys(const Query& query, const char* k_rows, float (&score)[kKeys / 8][4]) {
  using T = typename Query::Element;
  using Rows = Tile<Query::kDim>;
  const int lane = device::lane_id();
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) score[i][c] = 0.0f;
  }
  const int key_row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < Query::kDim / 16; ++step) {
    uint32_t q[4];
    query.fragment(step, q);
#pragma unroll
    for (int first = 0; first < kKeys; first += 16) {
      uint32_t k[4];
      device::ldmatrix_x4(k, k_rows + Rows::offset(first + key_row, step * 2 + lane / 8 % 2));
      device::mma_m16n8k16<T>(score[first / 8], q, k[0], k[1]);
      device::mma_m16n8k16<T>(score[first / 8 + 1], q, k[2], k[3]);
    }
  }
}

// Scales the scores, in base 2, and masks what a row does not see. `key` is the position of the first key; bit i of
// `valid`: key i has a block.
template <int kKeys>
PAGEDCORE_DEVICE void finish_scores(const AttentionParams& p, const Row (&rows)[2], int key,
                                    const uint32_t (&valid)[(kKeys + 31) / 32], float (&score)[kKeys / 8][4]) {
  const float scale = p.scale * kLog2E;
  const int lane = device::lane_id();
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int index = i * 8 + lane % 4 * 2 + c % 2;
      const Row& row = rows[c / 2];
      const bool visible =
          key + index >= row.begin && key + index < row.end && (valid[index / 32] >> index % 32 & 1u) != 0;
      score[i][c] = visible ? score[i][c] * scale : -INFINITY;
    }
  }
}

}  // namespace pagedcore::gpu
