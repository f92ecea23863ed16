// Warp collectives and vector accesses of the shim: what device_host.h is made of.
#pragma once

#include <cstdint>
#include <cstring>

#include "pagedcore/formats.h"
#include "shim.h"

namespace pagedcore::shim {

float shuffle_xor(float x, int lane_mask, int line);
int shuffle(int x, int lane, int line);
uint32_t ballot(bool x, int line);

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed, int line);

// `is_bf16`: how the 16-bit patterns of a and b are read; else as f16.
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16, int line);

// Checks the alignment, and tells the race check.
void vector_read(const void* p, int bytes);
void vector_write(const void* p, int bytes);

inline uint32_t load_4(const void* p) {
  vector_read(p, 4);
  uint32_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class V>
V load_16(const void* p) {
  static_assert(sizeof(V) == 16);
  vector_read(p, 16);
  V value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class V>
void store_16(void* p, const V& value) {
  static_assert(sizeof(V) == 16);
  vector_write(p, 16);
  std::memcpy(p, &value, sizeof value);
}

// Atomics order themselves: the race check is told of them, and must not see a plain access.
int plain_add(int* p, int value);
void plain_set(uint32_t* p);  // to 1

}  // namespace pagedcore::shim
