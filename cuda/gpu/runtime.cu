#include "runtime.h"

#include <atomic>
#include <mutex>

#include "gpu.h"
#include "pagedcore/device.h"
#include "pagedcore/faults.h"

namespace pagedcore::gpu {
namespace {

using device::check;

constexpr int kMaxDevices = 64;

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

const char* images() { return PAGEDCORE_IMAGES; }

Driver driver() {
  Driver found;
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) found.version = version;
  int count = 0;  // left alone by a call that fails
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) {
    found.devices = count;
  } else if (found.version == 0) {
    found.problem = "no NVIDIA driver was found (libcuda.so.1)";
  } else if (error == cudaErrorInsufficientDriver) {
    found.problem = "the NVIDIA driver takes CUDA " + version_text(found.version) +
                    ", and the kernels were built with " + version_text(CUDART_VERSION);
  } else {
    found.problem = error == cudaSuccess ? "the NVIDIA driver shows no GPU" : cudaGetErrorString(error);
  }
  cudaGetLastError();  // not for the next call to find
  return found;
}

DeviceFacts device_facts(int device) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  return {properties.name, properties.major, properties.minor, properties.multiProcessorCount,
          static_cast<int64_t>(properties.totalGlobalMem)};
}

int device_of(const void* memory) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, memory);
  cudaGetLastError();
  const bool known = attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return error == cudaSuccess && known ? attributes.device : 0;
}

DeviceGuard::DeviceGuard(int device) {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  if (current == device) return;
  check(cudaSetDevice(device), "cudaSetDevice");
  earlier_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (earlier_ >= 0) cudaSetDevice(earlier_);
}

uint32_t* fault_words(int device) {
  static std::atomic<uint32_t*> known[kMaxDevices];
  static std::mutex making;
  if (device < 0 || device >= kMaxDevices) return nullptr;  // masked all the same
  std::atomic<uint32_t*>& words = known[device];
  if (uint32_t* made = words.load(std::memory_order_acquire)) return made;
  const std::lock_guard<std::mutex> lock(making);
  if (uint32_t* made = words.load(std::memory_order_acquire)) return made;
  void* memory = nullptr;
  constexpr size_t kBytes = kDeviceFaults * sizeof(uint32_t);
  check(cudaHostAlloc(&memory, kBytes, cudaHostAllocMapped | cudaHostAllocPortable),
        "cudaHostAlloc of the fault words");
  auto* made = static_cast<uint32_t*>(memory);
  for (int i = 0; i < kDeviceFaults; ++i) made[i] = 0;
  words.store(made, std::memory_order_release);
  return made;
}

void warm_up() {
  int current = 0;
  check(cudaGetDevice(&current), "cudaGetDevice");
  fault_words(current);
  load_attention_generic();
  load_tiled();
  load_cache_ops();
  load_merge();
  load_quantise();
}

}  // namespace pagedcore::gpu
