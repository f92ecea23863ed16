// Where a call runs: on the one device that all of its tensors are on, and for a GPU on the tensor library's current
// stream.
#pragma once

#include <initializer_list>

#include "call.h"
#include "gpu/gpu.h"
#include "gpu/runtime.h"
#include "tensor.h"

namespace pagedcore {

#if defined(PAGEDCORE_GPU)
constexpr bool kGpuBuilt = true;
#else
constexpr bool kGpuBuilt = false;  // what is under `if constexpr` then is not linked
#endif

// The device of all of `tensors`; null is one that was not given. The first fixes it, and one that is elsewhere is told
// so.
Device require_one_device(std::initializer_list<const Tensor*> tensors);
void require_cpu(const Tensor& tensor);
// Where a device is asked for by number and this build has no GPU kernels.
[[noreturn]] void refuse_device(int device);

// The stream that the library of this CUDA tensor would put its own work on.
device::Stream current_stream(const Tensor& tensor);

// Runs `work(stream, fault words)` with the tensor's device current and the GIL released.
template <class Work>
void on_gpu(const Tensor& tensor, const Work& work) {
  if constexpr (kGpuBuilt) {
    const device::Stream stream = current_stream(tensor);
    without_gil([&] {
      const gpu::DeviceGuard guard(tensor.device.id);
      work(stream, gpu::fault_words(tensor.device.id));
    });
  }
}

}  // namespace pagedcore
