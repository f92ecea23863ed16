#include "torch_types.h"

namespace pagedcore {
namespace {

// Null until they are told. Guarded by the GIL.
PyTypeObject* torch_tensor = nullptr;
PyTypeObject* torch_parameter = nullptr;

}  // namespace

void set_torch_types(const pybind11::type& tensor, const pybind11::type& parameter) {
  torch_tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch_parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

bool any_torch_subclass(PyObject* const* objects, Py_ssize_t count) {
  if (!torch_tensor) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyTypeObject* const type = Py_TYPE(objects[i]);
    if (type == torch_tensor || type == torch_parameter) continue;
    // A static type cannot derive from torch's: so None, numbers and NumPy's arrays are told by a flag.
    if (!PyType_HasFeature(type, Py_TPFLAGS_HEAPTYPE)) continue;
    if (PyType_IsSubtype(type, torch_tensor)) return true;
  }
  return false;
}

}  // namespace pagedcore
