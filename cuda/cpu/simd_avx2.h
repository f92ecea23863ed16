// Eight floats in a register: AVX2, FMA, F16C.
#pragma once

#include <immintrin.h>

#include "pagedcore/formats.h"

#define PAGEDCORE_ISA avx2

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kLanes = 8;
constexpr int kMicroRows = 6;
constexpr int kMicroVecs = 2;

using Vec = __m256;

PAGEDCORE_FN Vec set1(float x) { return _mm256_set1_ps(x); }
PAGEDCORE_FN Vec zero() { return _mm256_setzero_ps(); }
PAGEDCORE_FN Vec load(const float* p) { return _mm256_loadu_ps(p); }
PAGEDCORE_FN void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
PAGEDCORE_FN Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PAGEDCORE_FN Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
PAGEDCORE_FN Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PAGEDCORE_FN Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
PAGEDCORE_FN Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b where either is NaN
PAGEDCORE_FN Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

PAGEDCORE_FN float reduce_max(Vec v) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

PAGEDCORE_FN float reduce_add(Vec v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

PAGEDCORE_FN Vec combine_quads(Vec a, Vec b) {  // [a0+a2 a1+a3 b0+b2 b1+b3] in both 128-bit lanes
  return _mm256_add_ps(_mm256_blend_ps(a, b, 0xCC), _mm256_shuffle_ps(a, b, 0x4E));
}

PAGEDCORE_FN Vec combine_pairs(Vec a, Vec b) {  // [a0+a1 a2+a3 b0+b1 b2+b3]
  return _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xDD));
}

// Lane i of the result is the sum of the lanes of v[i].
PAGEDCORE_FN Vec reduce_each(const Vec (&v)[kLanes]) {
  const Vec low = combine_pairs(combine_quads(v[0], v[1]), combine_quads(v[2], v[3]));
  const Vec high = combine_pairs(combine_quads(v[4], v[5]), combine_quads(v[6], v[7]));
  return _mm256_add_ps(_mm256_blend_ps(low, high, 0xF0), _mm256_permute2f128_ps(low, high, 0x21));
}

// Rows become columns: 4 x 4 blocks within lanes first, then the lanes change places.
PAGEDCORE_FN void transpose(Vec (&v)[kLanes]) {
  Vec quad[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    const Vec a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const Vec c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    quad[i] = _mm256_shuffle_ps(a, c, 0x44);
    quad[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
    quad[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    quad[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
  }
}

// p * 2^n for integral n in [-127, 127]; n = -127 gives zero.
PAGEDCORE_FN Vec scale_by_power(Vec p, Vec n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23)));
}

PAGEDCORE_FN Vec round_nearest(Vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

PAGEDCORE_FN void load_chunk(const float* p, Vec& a, Vec& b) {
  a = _mm256_loadu_ps(p);
  b = _mm256_loadu_ps(p + kLanes);
}

PAGEDCORE_FN void load_chunk(const f16* p, Vec& a, Vec& b) {
  a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + kLanes)));
}

// Even elements in `a`, odd ones in `b`: one load and two cheap operations for 16 elements. store_chunk undoes the
// order.
PAGEDCORE_FN void load_chunk(const bf16* p, Vec& a, Vec& b) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}

// By way of f16, whose exponent is biased by 8 more: shifted into place, a code is 2^-8 of its value, subnormals too,
// and the conversion heeds no flush-to-zero mode. In order.
PAGEDCORE_FN void load_chunk(const e4m3* p, Vec& a, Vec& b) {
  const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8);
  const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f));
  const __m256i half = _mm256_or_si256(_mm256_or_si256(sign, _mm256_slli_epi16(magnitude, 7)),
                                       _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
  const Vec unit = set1(256.0f);
  a = mul(unit, _mm256_cvtph_ps(_mm256_castsi256_si128(half)));
  b = mul(unit, _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)));
}

PAGEDCORE_FN void store_chunk(float* p, Vec a, Vec b) {
  _mm256_storeu_ps(p, a);
  _mm256_storeu_ps(p + kLanes, b);
}

PAGEDCORE_FN void store_chunk(f16* p, Vec a, Vec b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + kLanes),
                   _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Rounded to nearest even in the upper half of each 32-bit lane; the lower half is junk.
PAGEDCORE_FN __m256i round_to_bf16(Vec v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}

PAGEDCORE_FN void store_chunk(bf16* p, Vec a, Vec b) {
  const __m256i even = _mm256_srli_epi32(round_to_bf16(a), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, round_to_bf16(b), 0xAA));
}

PAGEDCORE_FN void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
