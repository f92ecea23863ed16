// What fills the module pagedcore._kernels: a function, so that the host shim's module can hold the same ops over its
// own device (cuda/shim/module.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace pagedcore {

void define_kernels(pybind11::module_& m);

}  // namespace pagedcore
