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

template <int kKeys>
PAGEDCORE_DEVICE void clear_scores(float (&score)[kKeys / 8][4]) {
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) score[i][c] = 0.0f;
  }
}

// Q K^T of 16 rows by kKeys keys, as it comes from the product: score[i][c] is key i * 8 + lane % 4 * 2 + c % 2 of row
// lane / 4 + c / 2 * 8.
template <int kKeys, class Query>
PAGEDCORE_DEVICE void multiply_keys(device::Lane lane, const Query& query, device::SharedAddress k_rows,
                                    float (&score)[kKeys / 8][4]) {
  using T = typename Query::Element;
  using Rows = Tile<Query::kDim>;
  clear_scores<kKeys>(score);
  const auto row = k_rows + Rows::offset(lane.id / 16 * 8 + lane.id % 8, lane.id / 8 % 2);
#pragma unroll
  for (int step = 0; step < Query::kDim / 16; ++step) {
    uint32_t q[4];
    query.fragment(step, q);
#pragma unroll
    for (int first = 0; first < kKeys; first += 16) {
      uint32_t k[4];
      device::ldmatrix_x4(k, Rows::at_step(row, step) + first * Rows::kRowBytes);
      device::mma_m16n8k16<T>(score[first / 8], q, k[0], k[1]);
      device::mma_m16n8k16<T>(score[first / 8 + 1], q, k[2], k[3]);
    }
  }
}

// Within some 2^-19 of tanh, relatively: by its series around 0, where a large cap needs it, and by exp2 beyond. tanhf
// is nearer, and takes more registers than a tile of many rows has.
PAGEDCORE_DEVICE float tanh_of_score(float x) {
  const float square = x * x;
  const float series = x * fmaf(square, fmaf(square, 2.0f / 15.0f, -1.0f / 3.0f), 1.0f);
  const float whole = 1.0f - device::divide_approx(2.0f, device::exp2_approx(2.0f * kLog2E * x) + 1.0f);
  return fabsf(x) < 0.1f ? series : whole;
}

// Makes scores, in base 2, of the products, and masks what a row does not see. `key` is the position of the first key;
// bit i of `valid`: key i has a block. `all_visible`, the same for all lanes: every row sees every key. What an option
// asks for is under a branch that all threads of a launch take alike.
template <int kKeys>
PAGEDCORE_DEVICE void finish_scores(const PlannedAttention& params, device::Lane lane, const Row (&rows)[2], int key,
                                    bool all_visible, const uint32_t (&valid)[(kKeys + 31) / 32],
                                    float (&score)[kKeys / 8][4]) {
  const AttentionParams& p = params.attention;
  const ScoreRule& rule = params.plan.rule;
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
      for (int c = 0; c < 4; ++c) score[i][c] = rule.cap * tanh_of_score(rule.factor * score[i][c]);
    }
  }
  const int lane_key = lane.id % 4 * 2;  // this lane's first of each eight keys
  if (p.alibi_slopes != nullptr) {
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const Row& row = rows[c / 2];
        const auto distance = static_cast<float>(row.position - key - lane_key - (i * 8 + c % 2));
        score[i][c] = fmaf(-row.slope, fabsf(distance), score[i][c]);
      }
    }
  }
  if (all_visible) return;
  const int begin[2] = {begin_of(p, rows[0]) - key - lane_key, begin_of(p, rows[1]) - key - lane_key};
  const int end[2] = {rows[0].end - key - lane_key, rows[1].end - key - lane_key};
  uint32_t found[(kKeys + 31) / 32];
#pragma unroll
  for (int i = 0; i < (kKeys + 31) / 32; ++i) found[i] = valid[i] >> lane_key;
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int index = i * 8 + c % 2;
      const bool visible = index >= begin[c / 2] && index < end[c / 2] && (found[i / 4] >> index % 32 & 1u) != 0;
      if (!visible) score[i][c] = -INFINITY;
    }
  }
}

}  // namespace pagedcore::gpu
