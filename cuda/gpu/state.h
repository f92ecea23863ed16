// The online softmax of a warp over 16 rows, as mma lays it out over the lanes.
#pragma once

#include <cmath>
#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/softmax.h"
#include "record.h"
#include "tile.h"

namespace pagedcore::gpu {

// Scores are in base 2, and a row's weights are 2^(score - reference). The reference is a whole number, at first the
// row's maximum rounded up: a weight is then rounded to 16 bits alike whatever reference it meets, and bringing sums to
// another one is exact. While the maximum grows by less than this the reference stays: weights are at most 2^8, which
// f16 holds, and the output need not be rescaled.
constexpr float kLazyGrowth = 8.0f;

// What one thread keeps of its warp's 16 rows: rows lane / 4 and lane / 4 + 8.
template <int kDim>
struct WarpState {
  static constexpr int kColumns = kDim;

  float m[2];        // references of the exponents, at most kLazyGrowth below the maximum
  float rounded[2];  // sums of weights as the product with V sees them; of this thread's columns until complete_sums
  float exact[2];    // sums before rounding, for the log-sum-exp
  float o[kDim / 8][4];

  PAGEDCORE_MEMBER void clear() {
    *this = {};
    m[0] = m[1] = -INFINITY;
  }

  // Of the output: where o[i][c] and o[i][c + 2] belong.
  static PAGEDCORE_MEMBER int column(device::Lane lane, int i, int c) { return i * 8 + lane.id % 4 * 2 + c; }
};

// One of this thread's rows of the output, times a factor.
template <int kDim>
PAGEDCORE_DEVICE void scale_output(int half, float factor, WarpState<kDim>& state) {
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
    state.o[i][half * 2] *= factor;
    state.o[i][half * 2 + 1] *= factor;
  }
}

// Brings the sums of one of this thread's rows to its maximum `top`, rounded up; what is relative to the same reference
// is to be multiplied by what it returns.
template <int kDim>
PAGEDCORE_DEVICE float rescale_sums(int half, float top, WarpState<kDim>& state) {
  const float reference = ceilf(top);
  const float factor = power_of_two(state.m[half] - reference);
  state.m[half] = reference;
  state.rounded[half] *= factor;
  state.exact[half] *= factor;
  return factor;
}

// Brings rows whose maximum outgrew their reference to it. The branch is the warp's; a row that did not outgrow its own
// is left as it is, so what becomes of a row does not depend on its neighbours.
template <int kDim>
PAGEDCORE_DEVICE void rescale(const float (&top)[2], WarpState<kDim>& state) {
  // Also where nothing was seen before: the reference is -inf then, and so is the difference of a first key to it.
  const bool grown = top[0] > state.m[0] + kLazyGrowth || top[1] > state.m[1] + kLazyGrowth;
  if (device::ballot(grown) == 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (top[half] > state.m[half] + kLazyGrowth) scale_output(half, rescale_sums(half, top[half], state), state);
  }
}

// The largest score of each of this thread's rows.
template <int kKeys>
PAGEDCORE_DEVICE void largest_scores(const float (&score)[kKeys / 8][4], float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      most = device::max_of(most, device::max_of(score[i][half * 2], score[i][half * 2 + 1]));
    }
    top[half] = device::reduce_max(most, 4);
  }
}

// Folds kKeys keys into the state: new references, weights, sums, O += P V. `v_rows`: the keys' rows of V.
template <int kDim, int kKeys, class T>
PAGEDCORE_DEVICE void fold_keys(device::Lane lane, const float (&score)[kKeys / 8][4], device::SharedAddress v_rows,
                                WarpState<kDim>& state) {
  using Rows = Tile<kDim>;
  float top[2];
  largest_scores<kKeys>(score, top);
  rescale(top, state);
  const auto row = v_rows + Rows::offset(lane.id / 8 % 2 * 8 + lane.id % 8, lane.id / 16);
#pragma unroll
  for (int first = 0; first < kKeys; first += 16) {
    uint32_t weights[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference = finite_max(state.m[half]);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float (&s)[4] = score[first / 8 + i];
        const float low = device::exp2_approx(s[half * 2] - reference);
        const float high = device::exp2_approx(s[half * 2 + 1] - reference);
        const uint32_t pair = device::pack2<T>(low, high);
        weights[i * 2 + half] = pair;
        state.exact[half] += low + high;
        const device::Floats2 seen = device::unpack2<T>(pair);
        state.rounded[half] += seen.low + seen.high;
      }
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t v[4];
      device::ldmatrix_x4_trans(v, Rows::at_step(row, step) + first * Rows::kRowBytes);
      device::mma_m16n8k16<T>(state.o[step * 2], weights, v[0], v[1]);
      device::mma_m16n8k16<T>(state.o[step * 2 + 1], weights, v[2], v[3]);
    }
  }
}

// After the last key: the sums of the whole row in each of its four lanes.
template <int kDim>
PAGEDCORE_DEVICE void complete_sums(WarpState<kDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.rounded[half] = device::reduce_sum(state.rounded[half], 4);
    state.exact[half] = device::reduce_sum(state.exact[half], 4);
  }
}

// The warp's state as rows first_row to first_row + 15 of a record.
template <int kRows, class State>
PAGEDCORE_DEVICE void write_record(device::Lane lane, const State& state, int first_row, float* to) {
  using At = Record<kRows, State::kColumns>;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane.id / 4 + half * 8;
    if (lane.id % 4 == 0) {
      to[At::stats(row)] = state.m[half];
      to[At::stats(row) + 1] = state.rounded[half];
      to[At::stats(row) + 2] = state.exact[half];
    }
#pragma unroll
    for (int i = 0; i < State::kColumns / 8; ++i) {
      to[At::output(row, State::column(lane, i, 0))] = state.o[i][half * 2];
      to[At::output(row, State::column(lane, i, 1))] = state.o[i][half * 2 + 1];
    }
  }
}

}  // namespace pagedcore::gpu
