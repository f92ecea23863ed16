#include "device_tensor.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "gpu/runtime.h"
#include "src/dlpack_abi.h"

namespace py = pybind11;

namespace pagedcore::shim {
namespace {

struct DeviceTensor {
  uintptr_t data;
  std::vector<int64_t> shape, strides;
  dlpack::DataType dtype;
  dlpack::Device device;
};

uintptr_t stream = 0;
int stream_asked_for = -1;

int view(void* object, dlpack::Tensor* out) {
  auto& tensor = py::cast<DeviceTensor&>(py::handle(static_cast<PyObject*>(object)));
  *out = {reinterpret_cast<void*>(tensor.data),
          tensor.device,
          static_cast<int32_t>(tensor.shape.size()),
          tensor.dtype,
          tensor.shape.data(),
          tensor.strides.data(),
          0};
  return 0;
}

int current_stream(int32_t, int32_t device, void** out) {
  stream_asked_for = device;
  *out = reinterpret_cast<void*>(stream);
  return 0;
}

dlpack::ExchangeApi api{{1, 3}, nullptr, nullptr, nullptr, nullptr, &view, &current_stream};

}  // namespace

void define_device_tensor(py::module_& m) {
  py::class_<DeviceTensor> type(m, "DeviceTensor", py::module_local());
  type.def(py::init([](uintptr_t data, std::vector<int64_t> shape, std::vector<int64_t> strides, int code, int bits,
                       int device_type, int device_id) {
             const dlpack::DataType dtype{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
             return DeviceTensor{data, std::move(shape), std::move(strides), dtype, {device_type, device_id}};
           }),
           py::arg("data"), py::arg("shape"), py::arg("strides"), py::arg("code"), py::arg("bits"),
           py::arg("device_type"), py::arg("device_id"));
  type.attr("__dlpack_c_exchange_api__") = py::capsule(&api, "dlpack_exchange_api");
  m.def("set_stream", [](uintptr_t value) { stream = value; });
  m.def("stream_asked_for", [] { return stream_asked_for; }, "device id of the last question for the current stream");
}

}  // namespace pagedcore::shim
