// What the binding of every op shares: scalars and sizes to plain numbers, refusals, the entry of a method table.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <new>
#include <string>

#include "call.h"
#include "checks.h"
#include "errors.h"

namespace pagedcore {

// The functions of each file, ended by an empty entry.
extern PyMethodDef attention_methods[];
extern PyMethodDef cache_methods[];
extern PyMethodDef merge_methods[];
extern PyMethodDef probe_methods[];

// The text is the signature as inspect and stubtest see it.
#define PAGEDCORE_METHOD(function, signature, text)                                                     \
  {#function, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<signature, function>)), \
   METH_FASTCALL | METH_KEYWORDS, #function text "\n--\n\n"}

// try_`function`: all arguments by position, and False where the call must go through torch's dispatcher.
#define PAGEDCORE_TRY_METHOD(function, signature, text)                                                  \
  {"try_" #function,                                                                                     \
   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry_by_position<signature, function>)), \
   METH_FASTCALL, "try_" #function text "\n--\n\n"}

inline constexpr std::initializer_list<DType> kFloats = {DType::f32, DType::f16, DType::bf16};
inline constexpr std::initializer_list<DType> kCaches = {DType::f32, DType::f16, DType::bf16, DType::e4m3, DType::u8};

[[noreturn]] void refuse(const char* argument, std::string expected, std::string got);

inline Pages pages_of(const Tensor& t) { return {t.data, t.strides[0], t.strides[1], t.strides[2]}; }

// What attention has beside its ops.
void define_attention(pybind11::module_& m);
void define_explain(pybind11::module_& m);

// The value, which must be `least` or more.
int64_t at_least(int64_t least, const char* argument, int64_t value);
// A size that must be at least 1 and fit the 32 bits that kernels keep it in.
int32_t size32(const Tensor& tensor, const char* symbol, int64_t size, int64_t limit = INT32_MAX);
// How many threads a CPU op runs on: num_threads, or what the runtime that the process has says.
int threads_of(PyObject* num_threads);
// The two caches of a call whose rows have the dtype of `rows`: of the same dtype, or both quantised (float8_e4m3fn, or
// uint8 with the same codes). Returns the cache's.
DType require_caches(const Tensor& k, const Tensor& v, const Tensor& rows);

// How attention may be cut: tokens of a piece, 0 for no cut, -1 where the planner decides.
int64_t split_size_of(PyObject* value);
// Heads, head sizes and the block size of an attention call.
void read_heads(AttentionParams& p, const Sizes& sizes, const Tensor& query, const Tensor& k, const Tensor& v);

// A tensor argument that may be absent or None. Not std::optional, which clears the room for a tensor that is not
// there: of the many that attention takes, that cost as much as the tensors it was given.
class OptionalTensor {
 public:
  OptionalTensor(const char* name, PyObject* value, std::initializer_list<DType> allowed = {}) : given_(given(value)) {
    if (given_) new (&tensor_) Tensor(name, value, allowed);
  }
  OptionalTensor(const OptionalTensor&) = delete;
  OptionalTensor& operator=(const OptionalTensor&) = delete;
  ~OptionalTensor() {
    if (given_) tensor_.~Tensor();
  }

  // Null where it was not given.
  const Tensor* get() const { return given_ ? &tensor_ : nullptr; }

 private:
  const bool given_;
  union {
    Tensor tensor_;
  };
};

// k_scale or v_scale: float32 [1], [num_kv_heads] or [num_blocks, num_kv_heads, block_size].
class ScalesArgument {
 public:
  ScalesArgument(const char* name, PyObject* value, DType kv_dtype);

  // Unifies the sizes; those of the caches must be known.
  Scales scales(Sizes& sizes) const;
  bool per_token() const { return get() && get()->ndim == 3; }
  const Tensor* get() const { return tensor_.get(); }

 private:
  OptionalTensor tensor_;
};

// Chooses the instruction set at the first call that needs one.
void require_isa();

}  // namespace pagedcore
