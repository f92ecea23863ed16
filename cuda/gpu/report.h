// An index out of range, which the kernel masks, told to whoever asks (runtime.h).
#pragma once

#include "pagedcore/device.h"
#include "pagedcore/faults.h"

namespace pagedcore::gpu {

PAGEDCORE_DEVICE void report(uint32_t* faults, DeviceFault fault) {
  if (faults != nullptr) device::raise_flag(faults + static_cast<int>(fault));
}

}  // namespace pagedcore::gpu
