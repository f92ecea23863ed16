// Portable vectors: four floats in an array, which any compiler turns into whatever the baseline instruction set has.
#pragma once

#include <math.h>

#include "pagedcore/formats.h"

#define PAGEDCORE_ISA scalar

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kLanes = 4;
constexpr int kMicroRows = 4;  // register tile of the packed kernel: rows x vectors
constexpr int kMicroVecs = 2;

struct Vec {
  float lane[kLanes];
};

PAGEDCORE_FN Vec set1(float x) { return {{x, x, x, x}}; }
PAGEDCORE_FN Vec zero() { return set1(0.0f); }
PAGEDCORE_FN Vec load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }

PAGEDCORE_FN void store(float* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = v.lane[i];
}

#define PAGEDCORE_LANEWISE(name, expression)    \
  PAGEDCORE_FN Vec name(Vec a, Vec b) {         \
    Vec r;                                      \
    for (int i = 0; i < kLanes; ++i) {          \
      const float x = a.lane[i], y = b.lane[i]; \
      r.lane[i] = expression;                   \
    }                                           \
    return r;                                   \
  }
PAGEDCORE_LANEWISE(add, x + y)
PAGEDCORE_LANEWISE(sub, x - y)
PAGEDCORE_LANEWISE(mul, x* y)
PAGEDCORE_LANEWISE(div, x / y)
PAGEDCORE_LANEWISE(max, x > y ? x : y)  // y where either is NaN
#undef PAGEDCORE_LANEWISE

PAGEDCORE_FN Vec fma(Vec a, Vec b, Vec c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}

PAGEDCORE_FN float reduce_max(Vec v) {
  float m = v.lane[0];
  for (int i = 1; i < kLanes; ++i) m = m > v.lane[i] ? m : v.lane[i];
  return m;
}

PAGEDCORE_FN float reduce_add(Vec v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }

// Lane i of the result is the sum of the lanes of v[i].
PAGEDCORE_FN Vec reduce_each(const Vec (&v)[kLanes]) {
  return {{reduce_add(v[0]), reduce_add(v[1]), reduce_add(v[2]), reduce_add(v[3])}};
}

PAGEDCORE_FN void transpose(Vec (&v)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float t = v[i].lane[j];
      v[i].lane[j] = v[j].lane[i];
      v[j].lane[i] = t;
    }
  }
}

// p * 2^n for integral n in [-127, 127]; n = -127 gives zero.
PAGEDCORE_FN Vec scale_by_power(Vec p, Vec n) {
  for (int i = 0; i < kLanes; ++i) {
    const float power = n.lane[i] == n.lane[i] ? n.lane[i] : 0.0f;  // p is NaN already
    p.lane[i] *= bits_float(static_cast<uint32_t>(static_cast<int32_t>(power) + 127) << 23);
  }
  return p;
}

PAGEDCORE_FN Vec round_nearest(Vec v) {
  // Adding 1.5 * 2^23 leaves the integer in the last bits of the sum: exact for |x| < 2^22, far beyond the range used
  // here.
  for (int i = 0; i < kLanes; ++i) v.lane[i] = (v.lane[i] + 12582912.0f) - 12582912.0f;
  return v;
}

template <class T>
PAGEDCORE_FN void load_chunk(const T* p, Vec& a, Vec& b) {
  for (int i = 0; i < kLanes; ++i) {
    a.lane[i] = to_float(p[i]);
    b.lane[i] = to_float(p[kLanes + i]);
  }
}

template <class T>
PAGEDCORE_FN void store_chunk(T* p, Vec a, Vec b) {
  for (int i = 0; i < kLanes; ++i) {
    from_float(a.lane[i], p[i]);
    from_float(b.lane[i], p[kLanes + i]);
  }
}

PAGEDCORE_FN void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
