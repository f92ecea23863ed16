// gpu/runtime.h for the host shim: as many devices as a test wants, all of them this process's memory.
#include "gpu/runtime.h"

#include <array>
#include <stdexcept>

#include "pagedcore/faults.h"
#include "shim.h"

namespace pagedcore {
namespace {

constexpr int kDevices = 2;
int current = 0;
int last = 0;
std::array<std::array<uint32_t, kDeviceFaults>, kDevices> faults{};

void require_device(int device) {
  if (device < 0 || device >= kDevices) throw std::runtime_error("device " + std::to_string(device) + " of the shim");
}

}  // namespace

namespace shim {

int current_device() { return current; }
int last_device() { return last; }

}  // namespace shim

namespace gpu {

const char* images() { return "shim"; }

Driver driver() { return {kDevices, 13000, ""}; }

DeviceFacts device_facts(int device) {
  require_device(device);
  return {"host shim", 8, 0, 1, 0};
}

int device_of(const void*) { return 0; }

DeviceGuard::DeviceGuard(int device) {
  require_device(device);
  last = device;
  if (device == current) return;
  earlier_ = current;
  current = device;
}

DeviceGuard::~DeviceGuard() {
  if (earlier_ >= 0) current = earlier_;
}

void warm_up() {}

uint32_t* fault_words(int device) {
  require_device(device);
  return faults[static_cast<size_t>(device)].data();
}

}  // namespace gpu
}  // namespace pagedcore
