// What the runtime needs of device memory beyond shim.h.
#pragma once

#include <cstddef>

namespace pagedcore::shim {

// In the address build a kernel must not touch these bytes until they are allowed again; elsewhere nothing happens.
void forbid(const void* memory, size_t bytes);
void allow(const void* memory, size_t bytes);

// All device memory is mapped while this lives: the time of a launch.
class DeviceMemoryOpen {
 public:
  DeviceMemoryOpen();
  ~DeviceMemoryOpen();
  DeviceMemoryOpen(const DeviceMemoryOpen&) = delete;
  DeviceMemoryOpen& operator=(const DeviceMemoryOpen&) = delete;
};

}  // namespace pagedcore::shim
