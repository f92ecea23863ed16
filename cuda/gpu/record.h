// Softmax states of a tile of rows on their way between warps, through shared memory, and between blocks, through the
// workspace; and how several become one.
#pragma once

#include <cmath>

#include "pagedcore/device.h"
#include "pagedcore/softmax.h"
#include "work.h"

namespace pagedcore::gpu {

// A state of a tile of kRows rows over some of its keys, in shared memory or in the workspace: m, the rounded and the
// exact sum of each row, then its output.
template <int kRows, int kDim>
struct Record {
  static constexpr int kFloats = kRows * (3 + kDim);
  static PAGEDCORE_MEMBER int stats(int row) { return row * 3; }
  static PAGEDCORE_MEMBER int output(int row, int d) { return kRows * 3 + row * kDim + d; }
};

// Records over disjoint keys of one tile: the first, and `count - 1` more that are evenly spaced.
struct Parts {
  const float* first;
  const float* rest;
  int64_t stride;  // between the rest, in floats
  int count;

  PAGEDCORE_MEMBER const float* operator[](int i) const { return i == 0 ? first : rest + (i - 1) * stride; }
};

// One column of a row's state.
struct Folded {
  float m, rounded, exact, o;
};

// 2^x of a whole x <= 0, exactly. References are whole numbers, so states are brought to one another without rounding.
PAGEDCORE_FN float power_of_two(float x) {
  if (x > -126.0f) return bits_float(static_cast<uint32_t>(static_cast<int>(x) + 127) << 23);
  return x != x ? x : 0.0f;
}

// 2^x of any whole x, and the nearest power that a float has where x is beyond them.
PAGEDCORE_FN float bounded_power_of_two(float x) {
  const float within = x > -126.0f ? x < 126.0f ? x : 126.0f : -126.0f;
  return bits_float(static_cast<uint32_t>(static_cast<int>(within) + 127) << 23);
}

// The state over the keys of both, brought to the larger of the two references. An empty state changes no bit of the
// other.
PAGEDCORE_DEVICE Folded merge(const Folded& a, const Folded& b) {
  const float m = device::max_of(a.m, b.m);
  const float reference = finite_max(m);
  const float of_a = power_of_two(a.m - reference), of_b = power_of_two(b.m - reference);
  return {m, fmaf(of_b, b.rounded, of_a * a.rounded), fmaf(of_b, b.exact, of_a * a.exact), fmaf(of_b, b.o, of_a * a.o)};
}

// Column d of a row, merged over all parts, records of type At, in index order. kOthers: the records are other blocks'
// of this launch.
template <class At, bool kOthers>
PAGEDCORE_DEVICE Folded fold(const Parts& parts, int row, int d) {
  const auto load = [](const float* p) { return kOthers ? device::load_coherent(p) : *p; };
  const auto part = [&](int i) {
    const float* from = parts[i];
    const float* stats = from + At::stats(row);
    return Folded{load(stats), load(stats + 1), load(stats + 2), load(from + At::output(row, d))};
  };
  Folded f = part(0);
  for (int i = 1; i < parts.count; ++i) f = merge(f, part(i));
  return f;
}

}  // namespace pagedcore::gpu
