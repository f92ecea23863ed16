// The state of an online softmax, and how two states over disjoint sets of keys combine.
//
// A row's state is (m, l, o): m the largest score so far, l the sum of 2^(score - m), o the sum of 2^(score - m) * v,
// with scores in base 2 (multiplied by log2 e). An empty state is (-inf, 0, 0).
#pragma once

#include <math.h>

#include "pagedcore/macros.h"

namespace pagedcore {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// The reference point to subtract: exponents stay finite while a row has seen no key (m = -inf).
PAGEDCORE_FN float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

// Natural-log sum of exponentials of a finished row; -inf if it saw no key.
PAGEDCORE_FN float log_sum_exp(float m, float l) {
  return l == 0.0f && m == -INFINITY ? -INFINITY : (m + __builtin_log2f(l)) * kLn2;
}

// Factors that bring two states to their common maximum.
struct MergeFactors {
  float m, a, b;
};

PAGEDCORE_FN MergeFactors merge_factors(float m_a, float m_b) {
  const float m = m_a > m_b || m_a != m_a ? m_a : m_b;
  const float reference = finite_max(m);
  return {m, __builtin_exp2f(m_a - reference), __builtin_exp2f(m_b - reference)};
}

// A finished row and its head's sink: a logit that joins the sums and brings no value. A row that saw no key has no
// softmax, with a sink or without. Returns the sums, and `a`, what is left of the row's own weights.
struct WithSink {
  float m, l, w, a;
};

PAGEDCORE_FN WithSink add_sink(float m, float l, float w, float sink) {
  if (l == 0.0f && m == -INFINITY) return {m, l, w, 1.0f};
  const MergeFactors factors = merge_factors(m, sink * kLog2E);
  return {factors.m, l * factors.a + factors.b, w * factors.a + factors.b, factors.a};
}

// How two outputs over disjoint keys, and a sink or null, become one: factors of the outputs, and the log-sum-exp of
// all (natural units). Keys that nobody saw have a log-sum-exp of -inf and the factor 0; where that is all there is, a
// sink changes nothing.
struct OutputFactors {
  float a, b, lse;
};

PAGEDCORE_FN OutputFactors output_factors(float lse_a, float lse_b, const float* sink) {
  float top = lse_a > lse_b || lse_a != lse_a ? lse_a : lse_b;
  if (top == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  if (sink && !(*sink <= top)) top = *sink;
  const float a = __builtin_exp2f((lse_a - top) * kLog2E), b = __builtin_exp2f((lse_b - top) * kLog2E);
  const float total = a + b + (sink ? __builtin_exp2f((*sink - top) * kLog2E) : 0.0f);
  return {a / total, b / total, top + __builtin_log2f(total) * kLn2};
}

// One element. Where nobody saw a key there is nothing to multiply, whatever it holds.
PAGEDCORE_FN float merge_element(const OutputFactors& factors, float lse_a, float o_a, float lse_b, float o_b) {
  return (lse_a == -INFINITY ? 0.0f : factors.a * o_a) + (lse_b == -INFINITY ? 0.0f : factors.b * o_b);
}

}  // namespace pagedcore
