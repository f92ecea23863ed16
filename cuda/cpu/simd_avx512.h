// Sixteen floats in a register: AVX-512 F, BW, DQ, VL.
#pragma once

#include <immintrin.h>

#include "pagedcore/formats.h"

#ifndef PAGEDCORE_ISA
#define PAGEDCORE_ISA avx512
#endif

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kLanes = 16;
constexpr int kMicroRows = 8;
constexpr int kMicroVecs = 2;

using Vec = __m512;

PAGEDCORE_FN Vec set1(float x) { return _mm512_set1_ps(x); }
PAGEDCORE_FN Vec zero() { return _mm512_setzero_ps(); }
PAGEDCORE_FN Vec load(const float* p) { return _mm512_loadu_ps(p); }
PAGEDCORE_FN void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
PAGEDCORE_FN Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PAGEDCORE_FN Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
PAGEDCORE_FN Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PAGEDCORE_FN Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
PAGEDCORE_FN Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b where either is NaN
PAGEDCORE_FN Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PAGEDCORE_FN float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
PAGEDCORE_FN float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }

// Each of the three combine steps below adds two vectors after a blend and one shuffle, so that a pair of vectors
// becomes one whose halves (of the register, of a lane, of a pair) belong to different inputs. Fifteen steps turn
// sixteen vectors into the vector of their sums.
PAGEDCORE_FN Vec combine_quads(Vec a, Vec b) {  // [a0+a2 a1+a3 b0+b2 b1+b3] in every 128-bit lane
  return _mm512_add_ps(_mm512_mask_blend_ps(0xCCCC, a, b), _mm512_shuffle_ps(a, b, 0x4E));
}

PAGEDCORE_FN Vec combine_pairs(Vec a, Vec b) {  // [a0+a1 a2+a3 b0+b1 b2+b3]
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}

PAGEDCORE_FN Vec combine_lanes(Vec a, Vec b) {  // [A0+A2 A1+A3 B0+B2 B1+B3] of 128-bit lanes
  return _mm512_add_ps(_mm512_mask_blend_ps(0xFF00, a, b), _mm512_shuffle_f32x4(a, b, 0x4E));
}

// Lane i of the result is the sum of the lanes of v[i].
PAGEDCORE_FN Vec reduce_each(const Vec (&v)[kLanes]) {
  Vec quad[4];
  for (int i = 0; i < 4; ++i)
    quad[i] = combine_pairs(combine_quads(v[4 * i], v[4 * i + 1]), combine_quads(v[4 * i + 2], v[4 * i + 3]));
  const Vec x = combine_lanes(quad[0], quad[1]), y = combine_lanes(quad[2], quad[3]);
  return _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
}

// Rows become columns: 4 x 4 blocks within lanes first, then the lanes change places.
PAGEDCORE_FN void transpose(Vec (&v)[kLanes]) {
  Vec quad[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const Vec a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const Vec c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    quad[i] = _mm512_shuffle_ps(a, c, 0x44);
    quad[i + 1] = _mm512_shuffle_ps(a, c, 0xEE);
    quad[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    quad[i + 3] = _mm512_shuffle_ps(b, d, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    const Vec a = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0x88),
              b = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0xDD);
    const Vec c = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0x88);
    const Vec d = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0xDD);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(a, c, 0xDD);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xDD);
  }
}

// p * 2^n for integral n >= -127; n = -127 gives zero.
PAGEDCORE_FN Vec scale_by_power(Vec p, Vec n) {
  const __mmask16 normal = _mm512_cmp_ps_mask(n, _mm512_set1_ps(-127.0f), _CMP_NLE_UQ);  // true for NaN
  return _mm512_maskz_scalef_ps(normal, p, n);
}

PAGEDCORE_FN Vec round_nearest(Vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

PAGEDCORE_FN void load_chunk(const float* p, Vec& a, Vec& b) {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + kLanes);
}

PAGEDCORE_FN void load_chunk(const f16* p, Vec& a, Vec& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes)));
}

// By way of f16, whose exponent is biased by 8 more: shifted into place, a code is 2^-8 of its value, subnormals too,
// and the conversion heeds no flush-to-zero mode. In order.
PAGEDCORE_FN void load_chunk(const e4m3* p, Vec& a, Vec& b) {
  const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(code, _mm512_set1_epi16(0x80)), 8);
  __m512i half = _mm512_or_si512(sign, _mm512_slli_epi16(magnitude, 7));
  const __mmask32 nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  half = _mm512_mask_mov_epi16(half, nan, _mm512_set1_epi16(0x7e00));
  const Vec unit = set1(256.0f);
  a = mul(unit, _mm512_cvtph_ps(_mm512_castsi512_si256(half)));
  b = mul(unit, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)));
}

#ifndef PAGEDCORE_OWN_BF16_CHUNKS
// Even elements in `a`, odd ones in `b`: one load and two cheap operations for 32 elements. store_chunk undoes the
// order.
PAGEDCORE_FN void load_chunk(const bf16* p, Vec& a, Vec& b) {
  const __m512i raw = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_slli_epi32(raw, 16));
  b = _mm512_castsi512_ps(_mm512_and_si512(raw, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
#endif

PAGEDCORE_FN void store_chunk(float* p, Vec a, Vec b) {
  _mm512_storeu_ps(p, a);
  _mm512_storeu_ps(p + kLanes, b);
}

PAGEDCORE_FN void store_chunk(f16* p, Vec a, Vec b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + kLanes),
                      _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rounded to nearest even in the upper half of each 32-bit lane; the lower half is junk.
PAGEDCORE_FN __m512i round_to_bf16(Vec v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x00400000));
}

#ifndef PAGEDCORE_OWN_BF16_CHUNKS
PAGEDCORE_FN void store_chunk(bf16* p, Vec a, Vec b) {
  const __m512i even = _mm512_srli_epi32(round_to_bf16(a), 16);
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAAu, even, round_to_bf16(b)));
}
#endif

PAGEDCORE_FN void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
