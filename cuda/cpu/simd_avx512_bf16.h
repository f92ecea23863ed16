// AVX-512 with products of bfloat16 pairs (vdpbf16ps): two elements a lane, so half the instructions of the f32 path.
//
// The instruction itself is behind one function. With PAGEDCORE_EMULATE_DPBF16 that function does the same in f32, so
// that everything around it runs, and is tested, on machines without the instruction.
#pragma once

#define PAGEDCORE_DPBF16

#ifdef PAGEDCORE_EMULATE_DPBF16
#define PAGEDCORE_ISA avx512_bf16_emulated
#else
#define PAGEDCORE_ISA avx512_bf16
#endif

// This instruction set has a chunk order of its own for bf16.
#define PAGEDCORE_OWN_BF16_CHUNKS
#include "simd_avx512.h"

namespace pagedcore::cpu::PAGEDCORE_ISA {

// acc[i] + a[2i + 1] * b[2i + 1] + a[2i] * b[2i], the odd product first.
PAGEDCORE_FN Vec dpbf16(Vec acc, __m512i a, __m512i b) {
#ifdef PAGEDCORE_EMULATE_DPBF16
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const Vec odd_a = _mm512_castsi512_ps(_mm512_and_si512(a, high)),
            even_a = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16));
  const Vec odd_b = _mm512_castsi512_ps(_mm512_and_si512(b, high)),
            even_b = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
  return _mm512_fmadd_ps(even_a, even_b, _mm512_fmadd_ps(odd_a, odd_b, acc));
#else
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
}

// Chunk order: in each 128-bit lane the first four of eight elements are in `a`, the others in `b`. It is the order in
// which unpacking two rows makes pairs of tokens, so that sums over pairs and over single rows meet in one state.
PAGEDCORE_FN void load_chunk(const bf16* p, Vec& a, Vec& b) {
  const __m512i raw = _mm512_loadu_si512(p);
  a = _mm512_castsi512_ps(_mm512_unpacklo_epi16(_mm512_setzero_si512(), raw));
  b = _mm512_castsi512_ps(_mm512_unpackhi_epi16(_mm512_setzero_si512(), raw));
}

PAGEDCORE_FN void store_chunk(bf16* p, Vec a, Vec b) {
  const __m512i low = _mm512_srli_epi32(round_to_bf16(a), 16), high = _mm512_srli_epi32(round_to_bf16(b), 16);
  _mm512_storeu_si512(p, _mm512_packus_epi32(low, high));
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
