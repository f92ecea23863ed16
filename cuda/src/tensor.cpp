#include "tensor.h"

#include <algorithm>
#include <cstring>
#include <iterator>

#include "dlpack_abi.h"
#include "target.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

// Types whose exchange API was looked up: one attribute lookup and capsule check per type and process. Guarded by the
// GIL.
struct TypeApi {
  PyTypeObject* type;
  const dlpack::ExchangeApi* api;
};
std::array<TypeApi, 8> known_types{};
int num_known_types = 0;

const dlpack::ExchangeApi* usable(const dlpack::ExchangeApi* api) {
  while (api && api->version.major != 1) api = api->previous;
  return api && api->view ? api : nullptr;
}

const dlpack::ExchangeApi* lookup_api(PyTypeObject* type) {
  for (const char* name : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    const auto attribute =
        py::reinterpret_steal<py::object>(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name));
    if (!attribute) {
      PyErr_Clear();
      continue;
    }
    void* pointer = nullptr;
    if (PyCapsule_IsValid(attribute.ptr(), "dlpack_exchange_api")) {
      pointer = PyCapsule_GetPointer(attribute.ptr(), "dlpack_exchange_api");
    } else if (PyLong_Check(attribute.ptr())) {
      pointer = PyLong_AsVoidPtr(attribute.ptr());  // the older name is an address
      if (!pointer) PyErr_Clear();
    }
    if (const auto* api = usable(static_cast<const dlpack::ExchangeApi*>(pointer))) return api;
  }
  return nullptr;
}

const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  for (int i = 0; i < num_known_types; ++i) {
    if (known_types[static_cast<size_t>(i)].type == type) return known_types[static_cast<size_t>(i)].api;
  }
  const dlpack::ExchangeApi* api = lookup_api(type);
  if (num_known_types < static_cast<int>(known_types.size())) {
    Py_INCREF(type);  // the entry outlives any reference of the caller
    known_types[static_cast<size_t>(num_known_types++)] = {type, api};
  }
  return api;
}

constexpr auto kNoType = static_cast<dlpack::TypeCode>(255);
constexpr std::initializer_list<DType> kAllDTypes = {DType::f32, DType::f16, DType::bf16, DType::e4m3,
                                                     DType::i32, DType::i64, DType::u8};

}  // namespace

Tensor::Tensor(const char* name, py::handle object, std::initializer_list<DType> allowed)
    : name(name), allowed_(allowed) {
  if (!from_exchange_api(object) && !from_buffer(object) && !from_array_interface(object) && !from_attributes(object) &&
      !from_cuda_array_interface(object)) {
    throw ArgumentError(Fault::type, name,
                        "a tensor (torch, NumPy, CuPy, or any with DLPack's C exchange API or the buffer protocol)",
                        Py_TYPE(object.ptr())->tp_name);
  }
  if (allowed.size() != 0 && !is_one_of(dtype, allowed)) refuse_dtype(dtype_name(dtype));
  const bool aligned = (reinterpret_cast<uintptr_t>(data) & static_cast<uintptr_t>(element_size - 1)) == 0;
  if ((!data || !aligned) && !empty()) refuse_memory();
}

bool Tensor::empty() const {
  for (int i = 0; i < ndim; ++i) {
    if (shape[static_cast<size_t>(i)] == 0) return true;
  }
  return false;
}

// A torch tensor may have given its storage up, and a NumPy array may begin in the middle of an element.
void Tensor::refuse_memory() const {
  if (!data)
    throw ArgumentError(Fault::invalid_argument, name, "a tensor with memory behind it", "one without storage");
  throw ArgumentError(Fault::invalid_argument, name,
                      "memory aligned to its element size, " + std::to_string(element_size) + " bytes",
                      "misaligned memory");
}

void Tensor::set_device(int32_t type, int32_t id) {
  if (type == dlpack::kCPU || type == dlpack::kCUDAHost) return;
  if (type != dlpack::kCUDA && type != dlpack::kCUDAManaged) {
    throw ArgumentError(Fault::invalid_argument, name, "a tensor on the CPU or a CUDA device",
                        "one on DLPack device type " + std::to_string(type));
  }
  device = {true, id};
}

bool Tensor::set_dtype(uint8_t code, int bits) {
  element_size = bits / 8;
  if (code == dlpack::kFloat && bits == 32)
    dtype = DType::f32;
  else if (code == dlpack::kFloat && bits == 16)
    dtype = DType::f16;
  else if (code == dlpack::kBfloat && bits == 16)
    dtype = DType::bf16;
  else if (code == dlpack::kInt && bits == 32)
    dtype = DType::i32;
  else if (code == dlpack::kInt && bits == 64)
    dtype = DType::i64;
  else if (code == dlpack::kUInt && bits == 8)
    dtype = DType::u8;
  else if (code == dlpack::kFloat8E4m3fn && bits == 8)
    dtype = DType::e4m3;
  else
    return false;
  return true;
}

std::string Tensor::type_name(uint8_t code, int bits) {
  switch (code) {
    case dlpack::kInt:
      return "int" + std::to_string(bits);
    case dlpack::kUInt:
      return "uint" + std::to_string(bits);
    case dlpack::kFloat:
      return "float" + std::to_string(bits);
    case dlpack::kBfloat:
      return "bfloat" + std::to_string(bits);
    case dlpack::kComplex:
      return "complex" + std::to_string(bits);
    case dlpack::kBool:
      return "bool";
    default:
      return "DLPack type (" + std::to_string(code) + ", " + std::to_string(bits) + " bits)";
  }
}

void Tensor::refuse_dtype(const std::string& shown) const {
  if (allowed_.size() == 0) {
    throw ArgumentError(Fault::invalid_argument, name, "dtype " + dtype_names(kAllDTypes), shown);
  }
  ArgumentError error(Fault::invalid_argument, name, "dtype " + dtype_names(allowed_), shown);
  const bool torch = source == Source::exchange_api || source == Source::attributes;
  const std::string wanted = dtype_name(*allowed_.begin());
  // Only caches may hold codes. To cast one would be to copy a pool for a call, and to write into the copy.
  if (std::find(allowed_.begin(), allowed_.end(), DType::e4m3) != allowed_.end()) {
    error.hint = "allocate the caches in the dtype of what is written to them, or for codes";
  } else {
    error.hint =
        "cast it, as by " + std::string(name) + (torch ? ".to(torch." + wanted + ")" : ".astype('" + wanted + "')");
  }
  throw error;
}

// The exchange API's own error, if it left one, is part of the message.
void Tensor::refuse_view() const {
  std::string reason = "one that DLPack cannot show";
  if (PyErr_Occurred()) {
    const py::error_already_set error;
    const std::string text = error.what();  // some libraries add their stack
    reason += " (" + text.substr(0, text.find('\n')) + ")";
  }
  throw ArgumentError(Fault::invalid_argument, name,
                      "a dense tensor with memory of its own (as inside torch.func's transforms, such as vmap and "
                      "grad, and on device 'meta' there is none)",
                      reason);
}

void Tensor::refuse_rank(int given) const {
  throw ArgumentError(Fault::invalid_argument, name, "at most " + std::to_string(kMaxDims) + " dimensions",
                      std::to_string(given));
}

bool Tensor::from_exchange_api(py::handle object) {
  const dlpack::ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()));
  if (!api) return false;
  dlpack::Tensor view{};
  if (api->view(object.ptr(), &view) != 0) refuse_view();
  source = Source::exchange_api;
  exchange = api;
  set_device(view.device.type, view.device.id);
  if (view.ndim > kMaxDims) refuse_rank(view.ndim);
  if (view.dtype.lanes != 1) throw ArgumentError(Fault::invalid_argument, name, "a scalar dtype", "a vector dtype");
  if (!set_dtype(view.dtype.code, view.dtype.bits)) refuse_dtype(type_name(view.dtype.code, view.dtype.bits));
  data = static_cast<char*>(view.data) + view.byte_offset;
  ndim = view.ndim;
  int64_t dense = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    shape[static_cast<size_t>(i)] = view.shape[i];
    strides[static_cast<size_t>(i)] = view.strides ? view.strides[i] : dense;
    dense *= view.shape[i];
  }
  return true;
}

bool Tensor::from_buffer(py::handle object) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  const Py_buffer& view = buffer_.view;
  if (PyObject_GetBuffer(object.ptr(), &buffer_.view, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    return false;
  }
  buffer_.held = true;
  read_only = view.readonly != 0;
  const char* format = view.format ? view.format : "B";
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  const bool single = format[0] != '\0' && format[1] == '\0';
  const dlpack::TypeCode code = !single                         ? kNoType
                                : std::strchr("efd", *format)   ? dlpack::kFloat
                                : std::strchr("bhilq", *format) ? dlpack::kInt
                                : std::strchr("BHILQ", *format) ? dlpack::kUInt
                                : *format == '?'                ? dlpack::kBool
                                                                : kNoType;
  const int bits = static_cast<int>(view.itemsize) * 8;
  if (!set_dtype(code, bits))
    refuse_dtype(code == kNoType ? std::string("buffer format '") + view.format + "'" : type_name(code, bits));
  if (view.ndim > kMaxDims) refuse_rank(view.ndim);
  data = static_cast<char*>(view.buf);
  ndim = view.ndim;
  int64_t dense = view.itemsize;
  for (int i = ndim - 1; i >= 0; --i) {
    const int64_t bytes = view.strides ? view.strides[i] : dense;  // ctypes gives none, though they were asked for
    if (bytes % view.itemsize != 0) {
      throw ArgumentError(Fault::invalid_argument, name, "strides that are multiples of the element size",
                          std::to_string(bytes) + " bytes");
    }
    shape[static_cast<size_t>(i)] = view.shape[i];
    strides[static_cast<size_t>(i)] = bytes / view.itemsize;
    dense *= view.shape[i];
  }
  return true;
}

bool Tensor::from_array_interface(py::handle object) {
  if (!py::hasattr(object, "__array_interface__") || !py::hasattr(object, "dtype")) return false;
  const auto interface = py::cast<py::dict>(object.attr("__array_interface__"));
  const std::string dtype_text = py::str(object.attr("dtype"));
  const auto shape_tuple = py::cast<py::tuple>(interface["shape"]);
  const auto pointer = py::cast<py::tuple>(interface["data"]);
  if (dtype_text == "bfloat16") {
    set_dtype(dlpack::kBfloat, 16);
  } else if (dtype_text == "float8_e4m3fn") {
    set_dtype(dlpack::kFloat8E4m3fn, 8);
  } else {
    refuse_dtype("dtype " + dtype_text);
  }
  source = Source::array_interface;
  data = reinterpret_cast<char*>(py::cast<uintptr_t>(pointer[0]));
  read_only = py::cast<bool>(pointer[1]);
  set_layout(shape_tuple, interface.contains("strides") ? py::object(interface["strides"]) : py::none());
  return true;
}

bool Tensor::from_cuda_array_interface(py::handle object) {
  if (!py::hasattr(object, "__cuda_array_interface__")) return false;
  const auto interface = py::cast<py::dict>(object.attr("__cuda_array_interface__"));
  const auto field = [&](const char* key) { return interface.contains(key) ? py::object(interface[key]) : py::none(); };
  if (!field("mask").is_none()) throw ArgumentError(Fault::invalid_argument, name, "an array without a mask", "one");
  const auto type = py::cast<std::string>(field("typestr"));
  const bool bfloat16 =
      py::hasattr(object, "dtype") && py::cast<std::string>(py::str(object.attr("dtype"))) == "bfloat16";
  const char kind = type.size() == 3 && type[0] != '>' ? type[1] : '\0';
  const dlpack::TypeCode code = bfloat16      ? dlpack::kBfloat
                                : kind == 'f' ? dlpack::kFloat
                                : kind == 'i' ? dlpack::kInt
                                : kind == 'u' ? dlpack::kUInt
                                              : kNoType;
  if (!set_dtype(code, type.size() == 3 ? (type[2] - '0') * 8 : 0)) refuse_dtype("typestr '" + type + "'");
  const auto pointer = py::cast<py::tuple>(field("data"));
  source = Source::cuda_array_interface;
  data = reinterpret_cast<char*>(py::cast<uintptr_t>(pointer[0]));
  read_only = py::cast<bool>(pointer[1]);
  set_layout(field("shape"), field("strides"));
  if (const py::object stream = field("stream"); !stream.is_none()) interface_stream = py::cast<uintptr_t>(stream);
  // The interface does not say which device. CuPy does; else the driver knows whose memory it is.
  int id = 0;
  if (const py::object own = py::getattr(object, "device", py::none()); py::hasattr(own, "id")) {
    id = py::cast<int>(own.attr("id"));
  } else if constexpr (kGpuBuilt) {
    id = gpu::device_of(data);
  }
  set_device(dlpack::kCUDA, id);
  return true;
}

bool Tensor::from_attributes(py::handle object) {
  for (const char* attribute : {"data_ptr", "dtype", "device", "shape", "stride"}) {
    if (!py::hasattr(object, attribute)) return false;
  }
  const std::string type = py::str(object.attr("dtype"));
  const struct {
    const char* name;
    dlpack::TypeCode code;
    int bits;
  } types[] = {{"torch.float32", dlpack::kFloat, 32},
               {"torch.float16", dlpack::kFloat, 16},
               {"torch.bfloat16", dlpack::kBfloat, 16},
               {"torch.int32", dlpack::kInt, 32},
               {"torch.int64", dlpack::kInt, 64},
               {"torch.uint8", dlpack::kUInt, 8},
               {"torch.float8_e4m3fn", dlpack::kFloat8E4m3fn, 8}};
  const auto* known = std::find_if(std::begin(types), std::end(types), [&](const auto& t) { return type == t.name; });
  source = Source::attributes;
  if (known == std::end(types)) refuse_dtype("dtype " + type);
  set_dtype(known->code, known->bits);
  const auto device_type = py::cast<std::string>(object.attr("device").attr("type"));
  if (device_type == "cuda") {
    set_device(dlpack::kCUDA, py::cast<int>(object.attr("device").attr("index")));
  } else if (device_type != "cpu") {
    throw ArgumentError(Fault::invalid_argument, name, "a tensor on the CPU or a CUDA device", "one on " + device_type);
  }
  data = reinterpret_cast<char*>(py::cast<uintptr_t>(object.attr("data_ptr")()));
  const py::tuple elements = object.attr("stride")();
  py::tuple bytes(elements.size());
  for (size_t i = 0; i < elements.size(); ++i) bytes[i] = py::cast<int64_t>(elements[i]) * element_size;
  set_layout(object.attr("shape"), bytes);
  return true;
}

void Tensor::set_layout(py::handle given_shape, py::handle byte_strides) {
  const py::tuple sizes{py::reinterpret_borrow<py::object>(given_shape)};
  if (sizes.size() > kMaxDims) refuse_rank(static_cast<int>(sizes.size()));
  ndim = static_cast<int>(sizes.size());
  int64_t dense = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    const auto axis = static_cast<size_t>(i);
    shape[axis] = py::cast<int64_t>(sizes[axis]);
    if (shape[axis] < 0)
      throw ArgumentError(Fault::invalid_argument, name, "sizes of 0 or more", std::to_string(shape[axis]));
    if (byte_strides.is_none()) {
      strides[axis] = dense;
    } else {
      const auto bytes = py::cast<int64_t>(py::reinterpret_borrow<py::tuple>(byte_strides)[axis]);
      if (bytes % element_size != 0)
        throw ArgumentError(Fault::invalid_argument, name, "strides that are multiples of the element size",
                            std::to_string(bytes) + " bytes");
      strides[axis] = bytes / element_size;
    }
    dense *= shape[axis];
  }
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return "float32";
    case DType::f16:
      return "float16";
    case DType::bf16:
      return "bfloat16";
    case DType::i32:
      return "int32";
    case DType::i64:
      return "int64";
    case DType::e4m3:
      return "float8_e4m3fn";
    default:
      return "uint8";
  }
}

bool is_one_of(DType dtype, std::initializer_list<DType> dtypes) {
  for (const DType each : dtypes) {
    if (each == dtype) return true;
  }
  return false;
}

std::string dtype_names(std::initializer_list<DType> dtypes) {
  std::string names;
  size_t left = dtypes.size();
  for (const DType dtype : dtypes) {
    names += (names.empty() ? "" : left == 1 ? " or " : ", ") + std::string(dtype_name(dtype));
    --left;
  }
  return names;
}

}  // namespace pagedcore
