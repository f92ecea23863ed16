#include "binding.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "isa.h"
#include "threads.h"

namespace py = pybind11;

namespace pagedcore {

void refuse(const char* argument, std::string expected, std::string got) {
  throw ArgumentError(Fault::invalid_argument, argument, std::move(expected), std::move(got));
}

int64_t at_least(int64_t least, const char* argument, int64_t value) {
  if (value < least) refuse(argument, std::to_string(least) + " or more", std::to_string(value));
  return value;
}

int32_t size32(const Tensor& tensor, const char* symbol, int64_t size, int64_t limit) {
  if (size < 1 || size > limit) {
    throw ArgumentError(Fault::invalid_argument, tensor.name,
                        std::string(symbol) + " in [1, " + std::to_string(limit) + "]", std::to_string(size));
  }
  return static_cast<int32_t>(size);
}

int threads_of(PyObject* num_threads) {
  // Many more threads than processors gain nothing, and a runtime that the system refuses one ends the process.
  constexpr int kMostThreads = 64;
  const std::optional<int64_t> wanted = optional_int("num_threads", num_threads);
  const int most = cpu::max_threads();
  if (!wanted) return most;
  return static_cast<int>(std::min<int64_t>(at_least(1, "num_threads", *wanted), std::max(most, kMostThreads)));
}

// The environment variable is read by pagedcore.environment alone, once.
void require_isa() {
  if (cpu::isa_selected()) return;
  const py::object variable = py::module_::import("pagedcore.environment").attr("CPU_ISA");
  const py::object name = variable.attr("read")();
  if (name.is_none()) {
    cpu::select_best_isa();
  } else {
    const auto source = py::cast<std::string>(variable.attr("name"));
    cpu::select_isa(source.c_str(), py::cast<std::string>(name).c_str());
  }
}

DType require_caches(const Tensor& k, const Tensor& v, const Tensor& rows) {
  const auto quantised = [](const Tensor& t) { return t.dtype == DType::u8 || t.dtype == DType::e4m3; };
  if (quantised(k) && quantised(v)) return DType::e4m3;
  for (const Tensor* cache : {&k, &v}) {
    if (cache->dtype == rows.dtype) continue;
    require_same_dtype(*cache, rows,
                       quantised(k) != quantised(v)
                           ? "keep both K and V as codes, or neither"
                           : std::string("cast ") + rows.name + ", or allocate the caches in its dtype");
  }
  return rows.dtype;
}

namespace {

// The value, which must be None where the cache is not quantised.
PyObject* scales_of(const char* name, PyObject* value, DType kv_dtype) {
  if (given(value) && kv_dtype != DType::e4m3) {
    throw ArgumentError(Fault::unsupported, name, "None for a cache that is not quantised",
                        std::string("scales of a cache of ") + dtype_name(kv_dtype));
  }
  return value;
}

}  // namespace

ScalesArgument::ScalesArgument(const char* name, PyObject* value, DType kv_dtype)
    : tensor_(name, scales_of(name, value, kv_dtype), {DType::f32}) {}

Scales ScalesArgument::scales(Sizes& sizes) const {
  if (!get()) return {};
  const Tensor& t = *get();
  if (t.ndim == 1 && t.shape[0] == 1) return {t.as<float>(), 0, 0, 0};
  if (t.ndim == 1) {
    sizes.match(t, {Axis::num_kv_heads}, Sizes::Strides::any);
    return {t.as<float>(), 0, t.strides[0], 0};
  }
  if (t.ndim != 3) {
    refuse(t.name, "shape [1], [num_kv_heads] or [num_blocks, num_kv_heads, block_size]",
           std::to_string(t.ndim) + " dimension(s)");
  }
  sizes.match(t, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size}, Sizes::Strides::any);
  return {t.as<float>(), t.strides[0], t.strides[1], t.strides[2]};
}

}  // namespace pagedcore
