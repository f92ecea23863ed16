// device.h for a C++ compiler: calls into the host shim.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "warp.h"

// The line that a collective was called from tells the shim whether all lanes mean the same one.
#define PAGEDCORE_LINE , int line = __builtin_LINE()
#define PAGEDCORE_PASS_LINE , line
#define PAGEDCORE_KERNEL(max_threads, min_blocks) static void
#define PAGEDCORE_DEVICE static inline
#define PAGEDCORE_MEMBER inline

namespace pagedcore::device {

struct alignas(16) Vec16 {
  uint32_t x, y, z, w;
};

PAGEDCORE_DEVICE int thread_id() { return shim::index().thread; }
// The same, asked anew: the compiler does not know that, and computes what follows from it where it is used, instead of
// keeping it in registers over all of a kernel.
PAGEDCORE_DEVICE int fresh_thread_id() { return thread_id(); }
PAGEDCORE_DEVICE int block_x() { return shim::index().block.x; }
PAGEDCORE_DEVICE int grid_x() { return shim::index().grid.x; }

PAGEDCORE_DEVICE char* shared_memory() { return shim::shared_memory(); }

PAGEDCORE_DEVICE void sync_threads(int line = __builtin_LINE()) { shim::sync_threads(line); }
PAGEDCORE_DEVICE void sync_warp(int line = __builtin_LINE()) { shim::sync_warp(line); }

PAGEDCORE_DEVICE float shuffle_xor(float x, int lane_mask, int line = __builtin_LINE()) {
  return shim::shuffle_xor(x, lane_mask, line);
}
PAGEDCORE_DEVICE int shuffle(int x, int lane, int line = __builtin_LINE()) { return shim::shuffle(x, lane, line); }
PAGEDCORE_DEVICE float shuffle(float x, int lane, int line = __builtin_LINE()) {
  return bits_float(static_cast<uint32_t>(shim::shuffle(static_cast<int>(float_bits(x)), lane, line)));
}
// Bit i: what lane i brought.
PAGEDCORE_DEVICE uint32_t ballot(bool x, int line = __builtin_LINE()) { return shim::ballot(x, line); }

// A place in shared memory: 32 bits on a device, where a pointer takes 64.
using SharedAddress = char*;
PAGEDCORE_DEVICE SharedAddress shared_address(void* p) { return static_cast<char*>(p); }
PAGEDCORE_DEVICE SharedAddress flip_bits(SharedAddress p, int bits) {
  return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) ^ static_cast<uintptr_t>(bits));
}

// 16 bytes (or 4) from global to shared memory, landing at the wait; zeros where `valid` is false, and `global` is not
// read.
PAGEDCORE_DEVICE void cp_async_16(SharedAddress shared, const void* global, bool valid) {
  shim::cp_async(shared, global, 16, valid ? 16 : 0);
}
PAGEDCORE_DEVICE void cp_async_4(SharedAddress shared, const void* global, bool valid) {
  shim::cp_async(shared, global, 4, valid ? 4 : 0);
}
PAGEDCORE_DEVICE void cp_async_commit() { shim::cp_async_commit(); }
// Until at most kLeft of this thread's committed groups are still under way.
template <int kLeft>
PAGEDCORE_DEVICE void cp_async_wait() {
  shim::cp_async_wait(kLeft);
}

// Four 8x8 matrices of 16-bit elements: lane i brings the address of row i % 8 of matrix i / 8, 16 bytes aligned.
PAGEDCORE_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, int line = __builtin_LINE()) {
  shim::ldmatrix_x4(r, row, false, line);
}
PAGEDCORE_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, int line = __builtin_LINE()) {
  shim::ldmatrix_x4(r, row, true, line);
}

// d += a * b, a 16x16 (row-major), b 16x8 (column-major), d 16x8 in f32; T is f16 or bf16.
template <class T>
PAGEDCORE_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   int line = __builtin_LINE()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  shim::mma_m16n8k16(d, a, b0, b1, std::is_same_v<T, bf16>, line);
}

// Two floats rounded to nearest even, the first in the low half.
template <class T>
PAGEDCORE_DEVICE uint32_t pack2(float low, float high) {
  T a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

// And back.
struct Floats2 {
  float low, high;
};
template <class T>
PAGEDCORE_DEVICE Floats2 unpack2(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

// Whether there is an instruction for e4m3 codes, from sm_89 on, which a device's code knows when it is compiled; and
// that: codes 0 and 2 of four as a pair of f16, and codes 1 and 3.
PAGEDCORE_DEVICE bool converts_codes() { return shim::compute_capability() >= 89; }
PAGEDCORE_DEVICE void convert_codes(uint32_t codes, uint32_t& even, uint32_t& odd) {
  const auto half = [codes](int i) {
    f16 value;
    from_float(to_float(e4m3{static_cast<uint8_t>(codes >> 8 * i)}), value);
    return uint32_t{value.bits};
  };
  even = half(0) | half(2) << 16;
  odd = half(1) | half(3) << 16;
}
// A pair of f16 times 2^8; exact where that is finite.
PAGEDCORE_DEVICE uint32_t times_256(uint32_t pair) {
  const Floats2 values = unpack2<f16>(pair);
  return pack2<f16>(values.low * 256.0f, values.high * 256.0f);
}

// Off by two units in the last place at most, and exact at zero.
PAGEDCORE_DEVICE float exp2_approx(float x) { return x == 0.0f ? 1.0f : shim::approximate(::exp2f(x), 2); }
// Off by two units in the last place at most; 0 for the largest divisors.
PAGEDCORE_DEVICE float divide_approx(float a, float b) {
  return b > 0x1p126f || b < -0x1p126f ? 0.0f : shim::approximate(a / b, 2);
}
PAGEDCORE_DEVICE float max_of(float a, float b) { return ::fmaxf(a, b); }
PAGEDCORE_DEVICE float tanh_of(float x) { return shim::approximate(::tanhf(x), 1); }

PAGEDCORE_DEVICE uint32_t load_4(const void* p) { return shim::load_4(p); }
PAGEDCORE_DEVICE Vec16 load_16(const void* p) { return shim::load_16<Vec16>(p); }
PAGEDCORE_DEVICE void store_16(void* p, const Vec16& value) { shim::store_16(p, value); }
// Past the first-level cache, which is not coherent between blocks: for what another block of this launch wrote.
PAGEDCORE_DEVICE float load_coherent(const float* p) { return *p; }

// Returns the earlier value.
PAGEDCORE_DEVICE int atomic_add(int* p, int value) {
  shim::atomic_access(p);
  return shim::plain_add(p, value);
}
PAGEDCORE_DEVICE void fence() { shim::fence(); }
// Sets a word of host memory to 1. Many may at one time; none waits for it.
PAGEDCORE_DEVICE void raise_flag(uint32_t* word) {
  shim::atomic_access(word);
  shim::plain_set(word);
}

// A kernel on the current device: readied for its shared memory when first asked for, and how many of its blocks run at
// one time. Here that is as many as the shim is told there are multiprocessors.
template <class Params>
class Residency {
 public:
  constexpr Residency(void (*)(Params), int, int) {}
  int blocks() const { return shim::multiprocessors(); }
};

template <class Params>
void load(void (*)(Params)) {}

template <class Params>
void launch(void (*kernel)(Params), int grid_x, int grid_y, int grid_z, int threads, size_t shared_bytes, Stream stream,
            const Params& params) {
  shim::launch({{grid_x, grid_y, grid_z}, threads, shared_bytes, stream}, [kernel, params] { kernel(params); });
}

}  // namespace pagedcore::device
