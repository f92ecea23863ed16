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

struct Folded {
  float m, rounded, exact, o;
};

// Column d of a row, folded over all parts, records of type At, in index order. kOthers: the records are other blocks'
// of this launch.
template <class At, bool kOthers>
PAGEDCORE_DEVICE Folded fold(const Parts& parts, int row, int d) {
  const auto load = [](const float* p) { return kOthers ? device::load_coherent(p) : *p; };
  float m = -INFINITY;
  for (int i = 0; i < parts.count; ++i) m = device::max_of(m, load(parts[i] + At::stats(row)));
  const float reference = finite_max(m);
  Folded f{m, 0.0f, 0.0f, 0.0f};
  for (int i = 0; i < parts.count; ++i) {
    const float* part = parts[i];
    const float factor = device::exp2_approx(load(part + At::stats(row)) - reference);
    f.rounded = fmaf(factor, load(part + At::stats(row) + 1), f.rounded);
    f.exact = fmaf(factor, load(part + At::stats(row) + 2), f.exact);
    f.o = fmaf(factor, load(part + At::output(row, d)), f.o);
  }
  return f;
}

}  // namespace pagedcore::gpu
