// Tensors of any library as pointer, dtype, shape and strides, without linking to that library; and the checks on them.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "errors.h"
#include "pagedcore/params.h"

namespace pagedcore {

// A borrowed tensor argument. Taken from the DLPack C exchange API where the type has one (torch), else from the buffer
// protocol (NumPy), else from __array_interface__ (ml_dtypes' bfloat16, which the buffer protocol cannot name).
class Tensor {
 public:
  static constexpr int kMaxDims = 6;

  Tensor(const char* name, pybind11::handle object);
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  const char* name;
  char* data = nullptr;
  DType dtype = DType::f32;
  int element_size = 0;
  int ndim = 0;
  std::array<int64_t, kMaxDims> shape{};
  std::array<int64_t, kMaxDims> strides{};  // in elements
  bool read_only = false;

  int64_t size() const;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }

 private:
  bool from_exchange_api(pybind11::handle object);
  bool from_buffer(pybind11::handle object);
  bool from_array_interface(pybind11::handle object);
  void set_dtype(uint8_t code, int bits, const std::string& shown);
  void require_cpu(int32_t device_type) const;

  void require_memory() const;

  // A member of its own, so that a constructor that throws half-way gives the buffer back too.
  struct Buffer {
    Py_buffer view{};
    bool held = false;
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
      if (held) PyBuffer_Release(&view);
    }
  };
  Buffer buffer_;
};

// Symbolic sizes, unified across the arguments of one call: the first tensor to use a symbol fixes it, and a later one
// that disagrees is told who did.
class Sizes {
 public:
  // `symbols` names every axis of the tensor. The last axis must be contiguous.
  void match(const Tensor& tensor, std::initializer_list<const char*> symbols);
  int64_t operator[](const char* symbol) const;

 private:
  struct Entry {
    const char* symbol;
    int64_t size;
    const char* owner;
  };
  std::array<Entry, 16> entries_{};
  int count_ = 0;
};

const char* dtype_name(DType dtype);
void require_dtype(const Tensor& tensor, std::initializer_list<DType> allowed);
void require_same_dtype(const Tensor& tensor, const Tensor& reference);
// Memory that may be written, with a place of its own for every element.
void require_writable(const Tensor& tensor);
// Writing through the first must not change what the second reads: their address ranges must not meet.
void require_disjoint(const Tensor& written, const Tensor& read);

}  // namespace pagedcore
