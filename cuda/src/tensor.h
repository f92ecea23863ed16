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

// What an axis counts, as shapes in messages name it.
enum class Axis : uint8_t {
  num_tokens,
  num_heads,
  num_kv_heads,
  head_dim,
  v_head_dim,
  num_blocks,
  block_size,
  num_seqs,
  num_starts,  // num_seqs + 1
  table_rows,
  max_blocks,
  num_pairs,
  pair,  // (src, dst)
  num_updates,
  update,  // (row, index, block)
  count,
  elements,
};

// The sizes of one call's axes, unified across its arguments: the first tensor with an axis fixes its size, and a later
// one that disagrees is told who did.
class Sizes {
 public:
  // `axes` names every axis of the tensor. The last one must be contiguous, unless any strides will do.
  enum class Strides : uint8_t { last_contiguous, any };
  void match(const Tensor& tensor, std::initializer_list<Axis> axes, Strides strides = Strides::last_contiguous);
  // 0 for an axis that no tensor had.
  int64_t operator[](Axis axis) const { return known(axis) ? sizes_[static_cast<size_t>(axis)] : 0; }

 private:
  bool known(Axis axis) const { return known_ >> static_cast<unsigned>(axis) & 1u; }
  [[noreturn]] void refuse_rank(const Tensor& tensor, std::initializer_list<Axis> axes) const;
  [[noreturn]] void refuse_size(const Tensor& tensor, Axis axis, size_t place) const;

  static constexpr size_t kNumAxes = static_cast<size_t>(Axis::elements) + 1;
  uint32_t known_ = 0;  // a bit an axis: those whose size and owner are set
  std::array<int64_t, kNumAxes> sizes_;
  std::array<const char*, kNumAxes> owners_;
  static_assert(kNumAxes <= 32, "a bit for every axis");
};

const char* dtype_name(DType dtype);
void require_dtype(const Tensor& tensor, std::initializer_list<DType> allowed);
void require_same_dtype(const Tensor& tensor, const Tensor& reference, const std::string& hint = {});
// Memory that may be written, with a place of its own for every element.
void require_writable(const Tensor& tensor);
// Memory without gaps, in the order of the axes.
void require_dense(const Tensor& tensor);
// Writing through the first must not change what the others read: their address ranges must not meet. Null is an
// argument that was not given.
void require_disjoint(const Tensor& written, std::initializer_list<const Tensor*> others);

}  // namespace pagedcore
