// What the streaming kernel does differently where products of bfloat16 pairs exist (simd_avx512_bf16.h): query and key
// rows stay as they are in memory and meet in pairs along the row; weights are rounded to bfloat16 and meet the values
// of two tokens at once.
#pragma once

#include "dot.h"
#include "tile.h"
#include "values.h"

namespace pagedcore::cpu::PAGEDCORE_ISA {

template <>
struct DotOperand<bf16> {
  __m512i pairs;
};

PAGEDCORE_FN void load_operand(const bf16* p, DotOperand<bf16>& x) { x.pairs = _mm512_loadu_si512(p); }

PAGEDCORE_FN void stage_operand(float* staged, const DotOperand<bf16>& x) { _mm512_storeu_si512(staged, x.pairs); }

PAGEDCORE_FN void load_staged(const float* staged, DotOperand<bf16>& x) { x.pairs = _mm512_loadu_si512(staged); }

PAGEDCORE_FN Vec multiply_add(const DotOperand<bf16>& a, const DotOperand<bf16>& b, Vec sum) {
  return dpbf16(sum, a.pairs, b.pairs);
}

// Weights of `count` tokens as bfloat16, in place of the floats: pairs[t / 2] holds tokens t (low half) and t + 1.
// Tokens past `count` have weight 0 already. Returns the sum of the rounded weights.
PAGEDCORE_FN float round_weights(const float* weights, int count, uint32_t* pairs) {
  Vec sum = zero();
  for (int t = 0; t < count; t += kLanes) {
    const __m512i rounded = round_to_bf16(load(weights + t));
    sum = add(sum, _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(pairs + t / 2),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  return reduce_add(sum);
}

PAGEDCORE_FN __m512i load_raw(const bf16* p, int width) {
  if (width >= kChunk) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16((1u << width) - 1u, p);
}

// As stream_values, two tokens at a time. An odd last token meets a row of zeros.
template <int R, int N>
PAGEDCORE_FN void stream_value_pairs(const uint32_t* pairs, const float* alpha, const bf16* v, const TileOffsets& tile,
                                     int d, int width, float* o, int64_t o_stride, const Ahead<bf16>& ahead) {
  update_rows<R, N>(alpha, o + d, o_stride, [&](Vec(&a)[R][N], Vec(&b)[R][N]) PAGEDCORE_INLINE {
    for (int t = 0; t < tile.count; t += 2) {
      const bf16 *first = v + tile.v[t] + d, *second = t + 1 < tile.count ? v + tile.v[t + 1] + d : nullptr;
      prefetch_row(ahead, t, d, d + N * width);
      prefetch_row(ahead, t + 1, d, d + N * width);
      for (int n = 0; n < N; ++n) {
        const __m512i x = load_raw(first + n * kChunk, width);
        const __m512i y = second ? load_raw(second + n * kChunk, width) : _mm512_setzero_si512();
        const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
        for (int r = 0; r < R; ++r) {
          const __m512i weight = _mm512_set1_epi32(static_cast<int>(pairs[r * kTile / 2 + t / 2]));
          a[r][n] = dpbf16(a[r][n], low, weight);
          b[r][n] = dpbf16(b[r][n], high, weight);
        }
      }
    }
  });
}

// Overloads the general add_values: here w is the sum of the rounded weights, so that values of 1 give exactly 1.
template <int R>
PAGEDCORE_FN void add_values(const float* weights, const float* alpha, const bf16* v, const TileOffsets& tile,
                             int v_dim, const float*, float* w, float* o, int64_t o_stride, const Ahead<bf16>& ahead) {
  uint32_t pairs[kRowGroup * kTile / 2];
  for (int r = 0; r < R; ++r) {
    w[r] = w[r] * alpha[r] + round_weights(weights + r * kTile, tile.count, pairs + r * kTile / 2);
  }
  int d = 0;
  for (; d + kStep * kChunk <= v_dim; d += kStep * kChunk) {
    stream_value_pairs<R, kStep>(pairs, alpha, v, tile, d, kChunk, o, o_stride, ahead);
  }
  for (; d < v_dim; d += kChunk) {
    stream_value_pairs<R, 1>(pairs, alpha, v, tile, d, v_dim - d, o, o_stride, ahead);
  }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
