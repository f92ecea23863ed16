// Every intrinsic of the GPU kernels, once: threads, barriers, warp collectives, asynchronous copies, matrix products,
// atomics, launches. nvcc turns each into its instruction; a C++ compiler turns it into a call of the host shim, which
// runs the same kernels in the test suite (cuda/shim/shim.h).
//
// Rules that make the second possible, and that a kernel must keep:
//   * dynamic shared memory only, through shared_memory();
//   * warp collectives are reached by all 32 lanes, at one place in the source;
//   * nothing relies on lanes running in lockstep: sync_warp() where one lane reads what another wrote;
//   * blocks talk to each other through atomics and fences only, and never wait for one another.
#pragma once

#include <cstdint>

#include "pagedcore/formats.h"
#include "pagedcore/stream.h"

#if defined(__CUDACC__)
#include "pagedcore/device_cuda.h"
#else
#include "pagedcore/device_host.h"
#endif

namespace pagedcore::device {

constexpr int kWarpSize = 32;

PAGEDCORE_DEVICE int lane_id() { return thread_id() % kWarpSize; }
PAGEDCORE_DEVICE int warp_id() { return thread_id() / kWarpSize; }

// A thread's place in its block.
struct Lane {
  int id;
  int warp;
};
PAGEDCORE_DEVICE Lane fresh_lane() {
  const int thread = fresh_thread_id();
  return {thread % kWarpSize, thread / kWarpSize};
}

// Over the lanes of a group of `width` neighbours (a power of two): every lane gets the result.
PAGEDCORE_DEVICE float reduce_max(float x, int width = kWarpSize PAGEDCORE_LINE) {
  for (int step = width / 2; step > 0; step /= 2) x = max_of(x, shuffle_xor(x, step PAGEDCORE_PASS_LINE));
  return x;
}
PAGEDCORE_DEVICE float reduce_sum(float x, int width = kWarpSize PAGEDCORE_LINE) {
  for (int step = width / 2; step > 0; step /= 2) x += shuffle_xor(x, step PAGEDCORE_PASS_LINE);
  return x;
}

}  // namespace pagedcore::device
