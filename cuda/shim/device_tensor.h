// Tensors in the shim's device memory as Python sees those of a GPU library: with DLPack's C exchange API, a device and
// a current stream.
#pragma once

#include <pybind11/pybind11.h>

namespace pagedcore::shim {

// The class DeviceTensor, and the current stream of its library.
void define_device_tensor(pybind11::module_& m);

}  // namespace pagedcore::shim
