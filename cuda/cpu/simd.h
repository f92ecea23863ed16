// What every instruction set shares, over the names of its wrapper header (simd_scalar.h, simd_avx2.h, simd_avx512.h):
// Vec, kLanes and the operations on them.
//
// A *chunk* is 2 * kLanes consecutive elements of a row, held in two vectors in whatever order loads fastest;
// load_chunk and store_chunk of one type agree on the order, and nothing in between depends on it.
#pragma once

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kChunk = 2 * kLanes;

PAGEDCORE_FN int round_up_chunk(int n) { return (n + kChunk - 1) / kChunk * kChunk; }

// The first n elements of a chunk; the rest are zero. Never reads past them.
template <class T>
PAGEDCORE_FN void load_partial_chunk(const T* p, int n, Vec& a, Vec& b) {
  T whole[kChunk] = {};
  __builtin_memcpy(whole, p, static_cast<unsigned long>(n) * sizeof(T));
  load_chunk(whole, a, b);
}

template <class T>
PAGEDCORE_FN void store_partial_chunk(T* p, int n, Vec a, Vec b) {
  T whole[kChunk];
  store_chunk(whole, a, b);
  __builtin_memcpy(p, whole, static_cast<unsigned long>(n) * sizeof(T));
}

// (2^f - 1) / f for f in [-0.5, 0.5]: minimax, where 2^f = 1 + f * this.
PAGEDCORE_FN Vec exp2_quotient(Vec f) {
  Vec p = set1(1.535336196e-4f);
  p = fma(p, f, set1(1.339887502e-3f));
  p = fma(p, f, set1(9.618436918e-3f));
  p = fma(p, f, set1(5.550332367e-2f));
  p = fma(p, f, set1(2.402264774e-1f));
  return fma(p, f, set1(6.931471825e-1f));
}

// 2^x for x <= 0, exactly 0 below 2^-126 (so that masked keys, at -inf, have weight 0), NaN for NaN; relative error
// under 1e-7.
PAGEDCORE_FN Vec exp2_nonpositive(Vec x) {
  x = max(set1(-127.0f), x);  // in this order: max keeps its second operand's NaN
  const Vec n = round_nearest(x);
  const Vec f = sub(x, n);  // in [-0.5, 0.5]
  return scale_by_power(fma(exp2_quotient(f), f, set1(1.0f)), n);
}

// tanh x = (2^y - 1) / (2^y + 1) with y = 2 x / ln 2; NaN for NaN; relative error under 4e-7, near 0 too: 2^y - 1 is
// put together without the 1 that would cancel.
PAGEDCORE_FN Vec tanh(Vec x) {
  constexpr float kOne = 40.0f;  // from 2^40 on the quotient is 1
  Vec y = mul(set1(2.88539008177792681472f), x);
  y = max(set1(-kOne), y);
  y = sub(zero(), max(set1(-kOne), sub(zero(), y)));
  const Vec n = round_nearest(y);
  const Vec f = sub(y, n);
  const Vec power = scale_by_power(set1(1.0f), n);
  const Vec less_one = fma(power, mul(exp2_quotient(f), f), sub(power, set1(1.0f)));
  return div(less_one, add(less_one, set1(2.0f)));
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
