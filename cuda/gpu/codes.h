// Attention over e4m3 codes: what differs from a cache of 16-bit elements (query.h, scores.h, state.h).
//
// Codes stay codes in shared memory and become f16 when they are fragments, four of a register at a time: the even ones
// of the four and the odd ones are the two registers that mma takes. So of each 16 columns a thread has 4 neighbours,
// where 16-bit elements would give it two pairs:
//
//   * Q K^T adds over the columns in any order: Q's are held in the order that K's come in;
//   * V's are read through ldmatrix.trans as pairs of bytes, and an mma has the even columns of 16, or the odd ones;
//     the output is put back in order where it leaves the registers (CodesState::column).
//
// Scales are the keys'. K's multiply columns of the scores. V's enter the weights, which f16 would often not hold then:
// the output has a reference of its own, and weights are relative to that.
#pragma once

#include <cmath>
#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/quantise.h"
#include "query.h"
#include "record.h"
#include "rows.h"
#include "scores.h"
#include "state.h"
#include "tile.h"

namespace pagedcore::gpu {

// 2^-8 of the codes in the high bytes of two times 16 bits, as f16: a code is one that lacks a bit of exponent. NaN
// stays NaN, where shifting alone would make 480 of it.
PAGEDCORE_FN uint32_t shifted_codes(uint32_t high_bytes) {
  const uint32_t magnitude = high_bytes >> 1 & 0x3f803f80u;
  const uint32_t nan = (magnitude + 0x00800080u) & 0x40004000u;
  return (high_bytes & 0x80008000u) | magnitude | nan;
}

// Of four codes the first and third, and the second and fourth, as pairs of f16.
PAGEDCORE_DEVICE void decode(uint32_t codes, uint32_t& even, uint32_t& odd) {
  if (device::converts_codes()) {
    device::convert_codes(codes, even, odd);
  } else {
    even = device::times_256(shifted_codes(codes << 8));
    odd = device::times_256(shifted_codes(codes));
  }
}

// A warp's 16 rows of Q as f16, in registers. Each row is scaled by a power of two so that its largest element is one
// of f16's largest: bf16 reaches further, and what f16 rounds is then below 2^-38 of that element.
template <int kDim_>
struct QueryOfCodes {
  static constexpr int kDim = kDim_;

  uint32_t held[kDim / 16][4];
  float scale[2];  // of the rows

  // `rows`: lane / 4 and lane / 4 + 8 of the warp's.
  PAGEDCORE_MEMBER void load(const AttentionParams& p, device::Lane lane, const Row (&rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint16_t* from = start_of_query(p, rows[half]) + lane.id % 4 * 4;
      const auto pair = [&](int at) {
        const uint32_t bits = rows[half].valid ? device::load_4(from + at) : 0u;
        return p.dtype == DType::f16 ? device::unpack2<f16>(bits) : device::unpack2<bf16>(bits);
      };
      float most = 0.0f;
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        const device::Floats2 first = pair(step * 16), second = pair(step * 16 + 2);
        most = absolute_max(absolute_max(most, first.low), first.high);
        most = absolute_max(absolute_max(most, second.low), second.high);
      }
      // 2^(e - 15) where the largest is in [2^e, 2^(e + 1)), and its inverse; both are normal numbers.
      const uint32_t exponent = float_bits(device::reduce_max(most, 4)) >> 23;
      const uint32_t bounded = exponent < 16 ? 16 : exponent;
      scale[half] = bits_float((bounded - 15) << 23);
      const float inverse = bits_float((269 - bounded) << 23);
#pragma unroll
      for (int step = 0; step < kDim / 16; ++step) {
        const device::Floats2 first = pair(step * 16), second = pair(step * 16 + 2);
        held[step][half] = device::pack2<f16>(first.low * inverse, second.low * inverse);
        held[step][half + 2] = device::pack2<f16>(first.high * inverse, second.high * inverse);
      }
    }
  }
};

// As multiply_keys of 16-bit elements. `k_scales`: of the keys.
template <int kKeys, int kDim>
PAGEDCORE_DEVICE void multiply_codes(device::Lane lane, const QueryOfCodes<kDim>& query, device::SharedAddress k_rows,
                                     const float* k_scales, float (&score)[kKeys / 8][4]) {
  using Rows = Tile<kDim, 1>;
  clear_scores<kKeys>(score);
  const auto row = k_rows + Rows::offset(lane.id / 16 * 8 + lane.id % 8, lane.id / 8 % 2);
#pragma unroll
  for (int pair = 0; pair < kDim / 32; ++pair) {
#pragma unroll
    for (int first = 0; first < kKeys; first += 16) {
      uint32_t k[4];  // 8 keys by 16 columns each: of keys 0 to 7 two steps of columns, and of keys 8 to 15
      device::ldmatrix_x4(k, Rows::at_step(row, pair) + first * Rows::kRowBytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t even, odd;
        decode(k[i], even, odd);
        device::mma_m16n8k16<f16>(score[first / 8 + i / 2], query.held[pair * 2 + i % 2], even, odd);
      }
    }
  }
  const float* of_lane = k_scales + lane.id % 4 * 2;
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) score[i][c] *= query.scale[c / 2] * of_lane[i * 8 + c % 2];
  }
}

// A warp's state. The output is relative to 2^n: n is a whole number within kLazyGrowth of the largest
// log2(weight * scale of V) of the row's keys, on the scale of scores, and grows as the reference of the sums does.
template <int kDim>
struct CodesState : WarpState<kDim> {
  float n[2];  // until complete_sums, then O is relative to 2^m as it is everywhere

  PAGEDCORE_MEMBER void clear() {
    WarpState<kDim>::clear();
    n[0] = n[1] = -INFINITY;
  }

  static PAGEDCORE_MEMBER int column(device::Lane lane, int i, int c) {
    return i / 2 * 16 + lane.id % 4 * 4 + c * 2 + i % 2;
  }
};

// Brings the output of rows whose weights times scales outgrew its reference to them, as rescale does. `most`: of each
// row the largest weight times scale, relative to 2^m.
template <int kDim>
PAGEDCORE_DEVICE void rescale_output(const float (&most)[2], CodesState<kDim>& state) {
  float reference[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // The power of two above it. Where all scales are 0 there is none.
    const int exponent = static_cast<int>(float_bits(most[half]) >> 23) - 126;
    reference[half] = most[half] > 0.0f ? state.m[half] + static_cast<float>(exponent) : -INFINITY;
  }
  const bool grown = reference[0] > state.n[0] + kLazyGrowth || reference[1] > state.n[1] + kLazyGrowth;
  if (device::ballot(grown) == 0) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (reference[half] > state.n[half] + kLazyGrowth) {
      scale_output(half, power_of_two(state.n[half] - reference[half]), state);
      state.n[half] = reference[half];
    }
  }
}

// How far weights times scales may lie below weights: as far as floats do, but for the subnormal ones.
constexpr float kMostLift = 126.0f;
constexpr float kLeastNormalHalf = 6.103515625e-5f;  // 2^-14

// What a weight times scale is multiplied with to be compared with weights. 0, so that it is not, where that is no
// float.
PAGEDCORE_DEVICE float inverse_of(float scale) {
  return fabsf(scale) < 0x1p-126f ? 0.0f : device::divide_approx(1.0f, scale);
}

// As fold_keys of 16-bit elements; leaves nothing in `score`. `v_scales`: of the keys.
template <int kKeys, int kDim>
PAGEDCORE_DEVICE void fold_codes(device::Lane lane, float (&score)[kKeys / 8][4], const float* v_scales,
                                 device::SharedAddress v_rows, CodesState<kDim>& state) {
  using Rows = Tile<kDim, 1>;
  const float* of_lane = v_scales + lane.id % 4 * 2;
  float top[2];
  largest_scores<kKeys>(score, top);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (top[half] > state.m[half] + kLazyGrowth) rescale_sums(half, top[half], state);
  }
  float most[2] = {0.0f, 0.0f};
  const float m[2] = {finite_max(state.m[0]), finite_max(state.m[1])};
#pragma unroll
  for (int i = 0; i < kKeys / 8; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float weight = device::exp2_approx(score[i][c] - m[c / 2]);
      state.exact[c / 2] += weight;
      score[i][c] = weight * of_lane[i * 8 + c % 2];
      most[c / 2] = device::max_of(most[c / 2], fabsf(score[i][c]));
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) most[half] = device::reduce_max(most[half], 4);
  rescale_output(most, state);

  float to_output[2], to_sum[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float drop = device::max_of(state.n[half] - m[half], -kMostLift);
    to_output[half] = bounded_power_of_two(-drop);
    to_sum[half] = bounded_power_of_two(drop);
  }
  const auto row = v_rows + Rows::offset(lane.id / 8 % 2 * 8 + lane.id % 8, lane.id / 16);
#pragma unroll
  for (int first = 0; first < kKeys; first += 16) {
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* scale = of_lane + first + i * 8;
      const float inverse[2] = {inverse_of(scale[0]), inverse_of(scale[1])};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&s)[4] = score[first / 8 + i];
        const float low = s[half * 2] * to_output[half], high = s[half * 2 + 1] * to_output[half];
        const uint32_t pair = device::pack2<f16>(low, high);
        weights[i * 2 + half] = pair;
        // What rounding adds to a weight, and so to the sum by which O is divided. Of weights that are small beside
        // others because V's scale is, it says nothing: the sum has those as they are.
        const device::Floats2 seen = device::unpack2<f16>(pair);
        float added = 0.0f;
        if (fabsf(seen.low) >= kLeastNormalHalf) added = (seen.low - low) * inverse[0];
        if (fabsf(seen.high) >= kLeastNormalHalf) added = fmaf(seen.high - high, inverse[1], added);
        state.rounded[half] = fmaf(added, to_sum[half], state.rounded[half]);
      }
    }
#pragma unroll
    for (int pair = 0; pair < kDim / 32; ++pair) {
      uint32_t v[4];  // 8 keys by 16 columns each: of one step of columns keys 0 to 7 and 8 to 15, and of the next
      device::ldmatrix_x4_trans(v, Rows::at_step(row, pair) + first * Rows::kRowBytes);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t even[2], odd[2];
        decode(v[step * 2], even[0], odd[0]);
        decode(v[step * 2 + 1], even[1], odd[1]);
        device::mma_m16n8k16<f16>(state.o[pair * 4 + step * 2], weights, even[0], even[1]);
        device::mma_m16n8k16<f16>(state.o[pair * 4 + step * 2 + 1], weights, odd[0], odd[1]);
      }
    }
  }
}

// After the last key. `rounded` had what rounding added.
template <int kDim>
PAGEDCORE_DEVICE void complete_sums(CodesState<kDim>& state) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.rounded[half] += state.exact[half];
    scale_output(half, bounded_power_of_two(state.n[half] - finite_max(state.m[half])), state);
  }
  complete_sums(static_cast<WarpState<kDim>&>(state));
}

}  // namespace pagedcore::gpu
