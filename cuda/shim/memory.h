// What the runtime needs of device memory beyond shim.h.
#pragma once

namespace pagedcore::shim {

// All device memory is mapped while this lives: the time of a launch.
class DeviceMemoryOpen {
 public:
  DeviceMemoryOpen();
  ~DeviceMemoryOpen();
  DeviceMemoryOpen(const DeviceMemoryOpen&) = delete;
  DeviceMemoryOpen& operator=(const DeviceMemoryOpen&) = delete;
};

}  // namespace pagedcore::shim
