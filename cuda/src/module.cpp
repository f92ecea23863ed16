// pagedcore._kernels: the ops of the binding files, and what the module tells of itself.
#include "module.h"

#include <pybind11/stl.h>

#include "binding.h"
#include "isa.h"
#include "pagedcore/faults.h"
#include "target.h"
#include "threads.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

PyObject* any_torch_subclass_of(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  return PyBool_FromLong(any_torch_subclass(objects, count));
}

PyMethodDef methods[] = {
    {"any_torch_subclass", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&any_torch_subclass_of)),
     METH_FASTCALL, "any_torch_subclass(*objects)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

py::dict gpu_facts() {
  py::dict facts;
  if constexpr (kGpuBuilt) {
    facts["images"] = gpu::images();
    const gpu::Driver driver = gpu::driver();
    facts["driver"] = driver.version == 0 ? py::object(py::none()) : py::cast(driver.version);
    facts["problem"] = driver.problem.empty() ? py::object(py::none()) : py::cast(driver.problem);
    py::list devices;
    for (int i = 0; i < driver.devices; ++i) {
      const gpu::DeviceFacts device = gpu::device_facts(i);
      devices.append(py::dict(py::arg("name") = device.name,
                              py::arg("capability") = std::to_string(device.major) + "." + std::to_string(device.minor),
                              py::arg("multiprocessors") = device.multiprocessors,
                              py::arg("memory") = device.memory_bytes));
    }
    facts["devices"] = devices;
  } else {
    facts["images"] = py::none();
  }
  return facts;
}

void warm_up(int device) {
  if constexpr (kGpuBuilt) {
    without_gil([&] {
      const gpu::DeviceGuard guard(device);
      gpu::warm_up();
    });
  } else {
    refuse_device(device);
  }
}

std::vector<int> take_device_faults(int device) {
  std::vector<int> found;
  if constexpr (kGpuBuilt) {
    const gpu::DeviceGuard guard(device);
    uint32_t* const words = gpu::fault_words(device);
    for (int i = 0; words && i < kDeviceFaults; ++i) {
      if (__atomic_exchange_n(words + i, 0u, __ATOMIC_ACQ_REL) != 0) found.push_back(i);
    }
  } else {
    refuse_device(device);
  }
  return found;
}

}  // namespace

void define_kernels(py::module_& m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ArgumentError&) {
      set_python_error();
    }
  });
  for (PyMethodDef* functions : {attention_methods, cache_methods, merge_methods, probe_methods, methods}) {
    if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
  }
  m.def("set_torch_types", &set_torch_types, py::arg("tensor"), py::arg("parameter"));
  m.def("cpu_isa", [] {
    require_isa();
    return cpu::selected_isa().name;
  });
  m.def("cpu_isas", &cpu::runnable_isas);
  m.def("select_cpu_isa", [](const char* name) { cpu::select_isa("name", name); }, py::arg("name"));
  m.def("thread_runtime", &cpu::thread_runtime);
  m.def("max_threads", &cpu::max_threads);
  define_attention(m);
  define_explain(m);
  m.def("gpu_facts", &gpu_facts);
  m.def("warm_up", &warm_up, py::arg("device"));
  m.def("take_device_faults", &take_device_faults, py::arg("device"));
}

}  // namespace pagedcore

#if !defined(PAGEDCORE_WITHOUT_MODULE)
PYBIND11_MODULE(_kernels, m) { pagedcore::define_kernels(m); }
#endif
