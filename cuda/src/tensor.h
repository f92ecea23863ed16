// Tensors of any library as pointer, dtype, shape and strides, without linking to that library.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "errors.h"
#include "pagedcore/params.h"

namespace pagedcore {

namespace dlpack {
struct ExchangeApi;
}

// The CPU, or a CUDA device. Pinned host memory counts as the CPU's, managed memory as its device's.
struct Device {
  bool cuda = false;
  int32_t id = 0;
};

// A borrowed tensor argument. Taken from the DLPack C exchange API where the type has one (torch), else from the buffer
// protocol (NumPy), from __array_interface__ (ml_dtypes' bfloat16, which the buffer protocol cannot name), from
// __cuda_array_interface__ (CuPy), or from data_ptr() and its companions (a torch that is older than the exchange API).
class Tensor {
 public:
  enum class Source : uint8_t { exchange_api, buffer, array_interface, cuda_array_interface, attributes };

  static constexpr int kMaxDims = 6;

  // One whose dtype is not among `allowed` is refused; empty: any that pagedcore knows.
  Tensor(const char* name, pybind11::handle object, std::initializer_list<DType> allowed = {});
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const char* name;
  char* data = nullptr;
  DType dtype = DType::f32;
  int element_size = 0;
  int ndim = 0;
  // The first `ndim` of each are set; the rest is left as the memory was.
  std::array<int64_t, kMaxDims> shape;
  std::array<int64_t, kMaxDims> strides;  // in elements
  bool read_only = false;
  Device device;
  Source source = Source::buffer;
  const dlpack::ExchangeApi* exchange = nullptr;  // of the exchange API
  uintptr_t interface_stream = 0;                 // of __cuda_array_interface__; 0: it tells none

  bool empty() const;
  // Of all elements, without gaps between them.
  int64_t bytes() const {
    int64_t total = element_size;
    for (int i = 0; i < ndim; ++i) total *= shape[static_cast<size_t>(i)];
    return total;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

 private:
  bool from_exchange_api(pybind11::handle object);
  bool from_buffer(pybind11::handle object);
  bool from_array_interface(pybind11::handle object);
  bool from_cuda_array_interface(pybind11::handle object);
  bool from_attributes(pybind11::handle object);
  // Sizes and byte strides as a tuple each, the second None where the array is dense.
  void set_layout(pybind11::handle shape, pybind11::handle byte_strides);
  // False for a type that is none of DType's. What such a type is called is for messages.
  bool set_dtype(uint8_t code, int bits);
  static std::string type_name(uint8_t code, int bits);
  [[noreturn]] void refuse_dtype(const std::string& shown) const;
  [[noreturn]] void refuse_view() const;
  [[noreturn]] void refuse_memory() const;
  [[noreturn]] void refuse_rank(int given) const;
  void set_device(int32_t type, int32_t id);

  // A member of its own, so that a constructor that throws half-way gives the buffer back too.
  struct Buffer {
    Py_buffer view;
    bool held = false;
    Buffer() {}  // and leaves the view as it is: most tensors have none
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
      if (held) PyBuffer_Release(&view);
    }
  };
  Buffer buffer_;
  std::initializer_list<DType> allowed_;  // while it is made
};

const char* dtype_name(DType dtype);
bool is_one_of(DType dtype, std::initializer_list<DType> dtypes);
// Such as "float32, float16 or bfloat16".
std::string dtype_names(std::initializer_list<DType> dtypes);

}  // namespace pagedcore
