// How a row of K or V becomes codes and a factor. docs/quantisation.md is the specification.
#pragma once

#include "pagedcore/formats.h"
#include "pagedcore/macros.h"

namespace pagedcore {

constexpr float kMostE4m3 = 448.0f;

// The larger of `most` and |x|, where x is finite.
PAGEDCORE_FN float absolute_max(float most, float x) {
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  return magnitude < 0x7f800000u && bits_float(magnitude) > most ? bits_float(magnitude) : most;
}

// The factor of a row whose largest finite magnitude is `most`; never 0, so that a row can be divided by it.
PAGEDCORE_FN float row_scale(float most) {
  const float scale = most / kMostE4m3;
  return scale > 0.0f ? scale : 1.0f;
}

PAGEDCORE_FN e4m3 quantise(float x, float scale) {
  e4m3 code;
  from_float(x / scale, code);
  return code;
}

}  // namespace pagedcore
