// Element types: 16-bit and 8-bit floats as bit patterns, and their exact conversions from and (rounding to nearest
// even) to f32.
#pragma once

#include <cstdint>
#include <cstring>

#include "pagedcore/macros.h"

namespace pagedcore {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, and 0x7f and 0xff are NaN (OCP's E4M3).
struct e4m3 {
  uint8_t bits;
};

PAGEDCORE_FN uint32_t float_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

PAGEDCORE_FN float bits_float(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

PAGEDCORE_FN float to_float(float x) { return x; }

PAGEDCORE_FN float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

PAGEDCORE_FN float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  if (magnitude >= 0x0400u) return bits_float(sign | ((magnitude << 13) + 0x38000000u));
  return bits_float(sign |
                    float_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));  // subnormal: units of 2^-24
}

PAGEDCORE_FN void from_float(float x, float& out) { out = x; }

PAGEDCORE_FN void from_float(float x, bf16& out) {
  const uint32_t u = float_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>(u >> 16 | 0x40u);  // keep a NaN a NaN
  } else {
    out.bits = static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
}

PAGEDCORE_FN void from_float(float x, f16& out) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    h = 0x7c00u;  // rounds past the largest finite f16
  } else if (magnitude >= 0x38800000u) {
    h = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    // Subnormal: adding 0.5 lines the value up so that the unit in the last place of the sum is 2^-24, and rounds
    // it to even.
    h = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out.bits = static_cast<uint16_t>(sign | h);
}

PAGEDCORE_FN float to_float(e4m3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80u) << 24;
  const uint32_t magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return bits_float(0x7fc00000u);
  if (magnitude >= 0x08u) return bits_float(sign | ((magnitude << 20) + 0x3c000000u));
  return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0.001953125f));  // subnormal: units of 2^-9
}

// What is larger than 448, infinity too, becomes 448; any NaN becomes 0x7f.
PAGEDCORE_FN void from_float(float x, e4m3& out) {
  const uint32_t u = float_bits(x);
  const uint32_t sign = u >> 24 & 0x80u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t code;
  if (magnitude > 0x7f800000u) {
    out.bits = 0x7fu;
    return;
  }
  if (magnitude >= 0x43e00000u) {
    code = 0x7eu;
  } else if (magnitude >= 0x3c800000u) {
    code = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  } else {
    // Subnormal: the unit in the last place of a sum with 2^14 is 2^-9.
    code = float_bits(bits_float(magnitude) + 16384.0f) - 0x46800000u;
  }
  out.bits = static_cast<uint8_t>(sign | code);
}

}  // namespace pagedcore
