// Reads memory and does nothing with it: what an attention kernel's speed is measured against.
#pragma once

namespace pagedcore::cpu::PAGEDCORE_ISA {

// The sum of a range of floats, four accumulators wide; `bytes` is a multiple of 64 and `data` is aligned to 4.
static float read_range(const void* data, int64_t bytes) {
  const float* p = static_cast<const float*>(data);
  const int64_t count = bytes / 4;
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], load(p + i + j * kLanes));
  }
  float rest = 0.0f;
  for (; i < count; ++i) rest += p[i];
  return rest + reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
