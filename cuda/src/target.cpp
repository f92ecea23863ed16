#include "target.h"

#include "dlpack_abi.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

std::string device_text(Device device) { return device.cuda ? "cuda:" + std::to_string(device.id) : "the CPU"; }

// For libraries that tell it in Python alone, if they are loaded.
device::Stream stream_from_python(const Tensor& tensor) {
  const py::object modules = py::module_::import("sys").attr("modules");
  const auto loaded = [&](const char* name) { return py::object(modules.attr("get")(name)); };
  py::object stream = py::none();
  if (tensor.source == Tensor::Source::cuda_array_interface) {
    if (const py::object cupy = loaded("cupy.cuda"); !cupy.is_none())
      stream = cupy.attr("get_current_stream")().attr("ptr");
  } else if (const py::object torch = loaded("torch.cuda"); !torch.is_none()) {
    stream = torch.attr("current_stream")(tensor.device.id).attr("cuda_stream");
  }
  return stream.is_none() ? nullptr : reinterpret_cast<device::Stream>(py::cast<uintptr_t>(stream));
}

}  // namespace

Device require_one_device(std::initializer_list<const Tensor*> tensors) {
  const Tensor* first = nullptr;
  for (const Tensor* tensor : tensors) {
    if (!tensor) continue;
    if (!first) {
      first = tensor;
      if (first->device.cuda && !kGpuBuilt) {
        throw ArgumentError(Fault::unsupported, first->name,
                            "a tensor on the CPU, as this build of pagedcore has no GPU kernels",
                            "one on " + device_text(first->device));
      }
    } else if (tensor->device.cuda != first->device.cuda || tensor->device.id != first->device.id) {
      throw ArgumentError(Fault::invalid_argument, tensor->name,
                          "a tensor on " + device_text(first->device) + " (as " + first->name + " is)",
                          "one on " + device_text(tensor->device));
    }
  }
  return first ? first->device : Device{};
}

void require_cpu(const Tensor& tensor) {
  if (!tensor.device.cuda) return;
  throw ArgumentError(Fault::unsupported, tensor.name, "a tensor on the CPU", "one on " + device_text(tensor.device));
}

void refuse_device(int device) {
  throw ArgumentError(Fault::unsupported, "device", "the CPU, as this build of pagedcore has no GPU kernels",
                      device_text({true, device}));
}

device::Stream current_stream(const Tensor& tensor) {
  if (tensor.exchange && tensor.exchange->current_stream) {
    void* stream = nullptr;
    if (tensor.exchange->current_stream(dlpack::kCUDA, tensor.device.id, &stream) != 0) throw py::error_already_set();
    return static_cast<device::Stream>(stream);
  }
  if (tensor.interface_stream != 0) return reinterpret_cast<device::Stream>(tensor.interface_stream);
  return stream_from_python(tensor);
}

}  // namespace pagedcore
