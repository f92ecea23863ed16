// Small kernels with one fault each, and the same without it: what the shim itself is tested with.
#pragma once

#include <string>
#include <vector>

namespace pagedcore::shim {

std::vector<std::string> faulty_kernels();
// Throws KernelFault where the fault is found; returns a value that a right kernel would make 0.
float run_faulty(const std::string& name);

}  // namespace pagedcore::shim
