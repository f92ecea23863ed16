// The host SIMT shim: runs a kernel's source as it stands, block by block, the threads of a block as fibers in seeded
// random order. What a GPU leaves undefined is made visible here:
//
//   * shared memory starts as NaN, and so does device memory;
//   * cp.async data is unreadable from its issue to its wait;
//   * a barrier that not all threads of the block reach is a fault, and so is a warp collective that not all 32 lanes
//     reach at one place, and a misaligned vector access;
//   * device memory is mapped only while a kernel runs: the host cannot read it by mistake;
//   * in the race-check build every access is compared with those of the other threads (races.h).
//
// It shows neither speed nor the hardware's memory ordering. One kernel runs at a time; no part of it is thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

namespace pagedcore::shim {

constexpr int kWarpSize = 32;

// A kernel did what a GPU would not forgive. The message says what, and which block and thread did it.
class KernelFault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Dim {
  int x = 1, y = 1, z = 1;
  int64_t count() const { return int64_t{x} * y * z; }
};

struct LaunchShape {
  Dim grid;
  int threads = kWarpSize;  // of a block, one-dimensional
  size_t shared_bytes = 0;
  const void* stream = nullptr;  // means nothing here; remembered for tests
};

// Runs `body` once per thread of the grid, or records the launch. Throws KernelFault.
void launch(const LaunchShape& shape, std::function<void()> body);

// Of the last launch, run or recorded.
uintptr_t last_stream();

// The device that is current (runtime.cpp), and the last one that a guard made so.
int current_device();
int last_device();

// What decides the order of blocks and threads, and the errors of approximate instructions.
void set_seed(uint64_t seed);

// Of the device: kernels that fill it launch that many blocks. 6 at first.
void set_multiprocessors(int count);
int multiprocessors();

// Of the device, as 89 for sm_89: which instructions it has. 80 at first, the least that the kernels run on.
void set_compute_capability(int capability);
int compute_capability();

// Launches are put aside instead of run, as in the capture of a graph, and run by `replay` with what device memory
// holds then.
class Recording {
 public:
  Recording();
  ~Recording();
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  void stop();
  void replay() const;

 private:
  friend void launch(const LaunchShape&, std::function<void()>);
  std::vector<std::pair<LaunchShape, std::function<void()>>> launches_;
};

// Device memory: unmapped outside kernels, 256-byte aligned as cudaMalloc gives it, poisoned with NaN.
void* allocate(size_t bytes, bool poison = true);
void release(void* memory);
void copy_to_device(void* device, const void* host, size_t bytes);
void copy_to_host(void* host, const void* device, size_t bytes);
bool is_device_memory(const void* address, size_t bytes);

// What follows is called by a running kernel, through device.h.

struct ThreadIndex {
  int thread;
  Dim block, grid;
  int threads;
};
const ThreadIndex& index();
char* shared_memory();
[[noreturn]] void fault(const std::string& what);

void sync_threads(int line);
void sync_warp(int line);

// All 32 lanes bring their operands; the last to arrive runs `complete` over them, in lane order. `kind` and `line`
// must agree across the lanes.
void collective(const char* kind, int line, void* operands, void (*complete)(void** operands));

void cp_async(void* shared, const void* global, int bytes, int valid_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);

void fence();
// Counts as an atomic access for the race check, and lets other blocks see what was fenced before.
void atomic_access(const void* address);

// `exact`, off by at most `ulps` units in the last place: the error that an approximate instruction is documented to
// have. It depends on the seed and on `exact` alone, as an instruction gives one operand one result.
float approximate(float exact, int ulps);

}  // namespace pagedcore::shim
