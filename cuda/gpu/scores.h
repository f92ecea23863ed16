// Scores of a warp's 16 rows of Q against keys in shared memory, and what is done to a score before the softmax.
#pragma once

#include <cmath>
#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/score.h"
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

// Makes scores, in base 2, of the products, and masks what a row does not see. `key` is the position of the first key;
// bit i of `valid`: key i has a block. What an option asks for is under a branch that all threads of a launch take
// alike.
template <int kKeys>
PAGEDCORE_DEVICE void finish_scores(const AttentionParams& p, const Row (&rows)[2], int key,
                                    const uint32_t (&valid)[(kKeys + 31) / 32], float (&score)[kKeys / 8][4]) {
  const ScoreRule rule = score_rule(p);
  const int reach = reach_of(p);
  const int lane = device::lane_id();
  if (rule.cap == 0.0f) {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) score[i][c] *= rule.factor;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) score[i][c] = rule.cap * device::tanh_of(rule.factor * score[i][c]);
    }
  }
  if (p.alibi_slopes != nullptr) {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Row& row = rows[c / 2];
        const auto distance = static_cast<float>(row.position - key - (i * 8 + lane % 4 * 2 + c % 2));
        score[i][c] = fmaf(-row.slope, fabsf(distance), score[i][c]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int index = i * 8 + lane % 4 * 2 + c % 2;
      const bool visible = sees(rows[c / 2], reach, key + index) && (valid[index / 32] >> index % 32 & 1u) != 0;
      if (!visible) score[i][c] = -INFINITY;
    }
  }
}

}  // namespace pagedcore::gpu
