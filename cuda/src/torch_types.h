// torch's tensor types, as far as Python tells them.
#pragma once

#include <pybind11/pybind11.h>

namespace pagedcore {

// Called once, by pagedcore.torch.
void set_torch_types(const pybind11::type& tensor, const pybind11::type& parameter);

// Whether one of these is of a subclass of torch's tensors: a call on it must go through torch's dispatcher.
bool any_torch_subclass(PyObject* const* objects, Py_ssize_t count);

}  // namespace pagedcore
