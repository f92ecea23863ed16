// What the host asks of the GPU runtime around the ops: which devices there are, which one is current, readiness for
// graph capture, and the faults that kernels flagged. runtime.cu answers for CUDA, cuda/shim/runtime.cpp for the host
// shim. Needs no CUDA header and no GPU: without a driver there are no devices, and a sentence says why.
#pragma once

#include <cstdint>
#include <string>

namespace pagedcore::gpu {

// What the kernels were compiled for, as CMAKE_CUDA_ARCHITECTURES names it.
const char* images();

struct Driver {
  int devices = 0;
  int version = 0;      // of CUDA that the driver takes: 13000 is 13.0; 0 without a driver
  std::string problem;  // why there are no devices; empty where there are
};
Driver driver();

struct DeviceFacts {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
  int64_t memory_bytes = 0;
};
DeviceFacts device_facts(int device);

// The device whose memory an address is; 0 where it is nobody's.
int device_of(const void* memory);

// Makes a device current while it lives. Costs one cheap call where it is already.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int earlier_ = -1;  // -1: nothing to restore
};

// Loads every kernel onto the current device and allocates its fault words: after that no op does what a capture of a
// CUDA graph forbids.
void warm_up();

// Indices out of range are masked by the kernels, as nothing on the host has read them, and flagged here: words in
// mapped host memory, one per kind and device, which kernels set and the host reads without waiting for the device.
// Allocated at a device's first op or by warm_up.
uint32_t* fault_words(int device);

}  // namespace pagedcore::gpu
