#include "checks.h"

#include <algorithm>

namespace pagedcore {
namespace {

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int i = 0; i < tensor.ndim; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[static_cast<size_t>(i)]);
  return text + "]";
}

const char* axis_name(Axis axis) {
  static constexpr const char* kNames[] = {
      "num_tokens", "num_heads",    "num_kv_heads", "head_dim",   "v_head_dim", "num_blocks", "block_size",
      "num_seqs",   "num_seqs + 1", "table_rows",   "max_blocks", "num_pairs",  "2",          "num_updates",
      "3",          "count",        "elements"};
  static_assert(sizeof kNames / sizeof *kNames == static_cast<size_t>(Axis::elements) + 1, "a name for every axis");
  return kNames[static_cast<size_t>(axis)];
}

}  // namespace

void Sizes::refuse_rank(const Tensor& tensor, std::initializer_list<Axis> axes) const {
  std::string expected = "[";
  for (const Axis axis : axes) expected += (expected.size() > 1 ? ", " : "") + std::string(axis_name(axis));
  throw ArgumentError(Fault::invalid_argument, tensor.name, "shape " + expected + "]", shape_text(tensor));
}

void Sizes::refuse_size(const Tensor& tensor, Axis axis, size_t place) const {
  throw ArgumentError(Fault::invalid_argument, tensor.name,
                      std::string(axis_name(axis)) + " = " + std::to_string((*this)[axis]) + " on axis " +
                          std::to_string(place) + " (as " + owners_[static_cast<size_t>(axis)] + " has)",
                      "shape " + shape_text(tensor));
}

void Sizes::match(const Tensor& tensor, std::initializer_list<Axis> axes, Strides strides) {
  if (tensor.ndim != static_cast<int>(axes.size())) refuse_rank(tensor, axes);
  size_t place = 0;
  for (const Axis axis : axes) {
    const auto index = static_cast<size_t>(axis);
    const int64_t size = tensor.shape[place];
    if (!known(axis)) {
      known_ |= 1u << index;
      sizes_[index] = size;
      owners_[index] = tensor.name;
    } else if (sizes_[index] != size) {
      refuse_size(tensor, axis, place);
    }
    ++place;
  }
  if (strides == Strides::any) return;
  const auto last = static_cast<size_t>(tensor.ndim - 1);
  if (tensor.ndim > 0 && tensor.shape[last] > 1 && tensor.strides[last] != 1 && !tensor.empty()) {
    throw ArgumentError(Fault::invalid_argument, tensor.name, "a contiguous last axis (stride 1)",
                        "stride " + std::to_string(tensor.strides[last]));
  }
}

void require_dtype(const Tensor& tensor, std::initializer_list<DType> allowed) {
  if (is_one_of(tensor.dtype, allowed)) return;
  throw ArgumentError(Fault::invalid_argument, tensor.name, "dtype " + dtype_names(allowed), dtype_name(tensor.dtype));
}

void require_same_dtype(const Tensor& tensor, const Tensor& reference, const std::string& hint) {
  if (tensor.dtype == reference.dtype) return;
  ArgumentError error(Fault::invalid_argument, tensor.name,
                      std::string("dtype ") + dtype_name(reference.dtype) + " (as " + reference.name + " has)",
                      dtype_name(tensor.dtype));
  error.hint = hint;
  throw error;
}

void require_writable(const Tensor& tensor) {
  if (tensor.read_only)
    throw ArgumentError(Fault::invalid_argument, tensor.name, "writable memory", "a read-only array");
  if (tensor.empty()) return;  // its strides mean nothing
  for (int i = 0; i < tensor.ndim; ++i) {
    const auto axis = static_cast<size_t>(i);
    if (tensor.shape[axis] > 1 && tensor.strides[axis] == 0) {
      throw ArgumentError(Fault::invalid_argument, tensor.name, "memory of its own for every element",
                          "stride 0 on axis " + std::to_string(i) + " of " + shape_text(tensor));
    }
  }
}

void require_dense(const Tensor& tensor) {
  int64_t dense = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    const auto axis = static_cast<size_t>(i);
    if (tensor.shape[axis] > 1 && tensor.strides[axis] != dense && !tensor.empty()) {
      throw ArgumentError(Fault::invalid_argument, tensor.name, "contiguous memory",
                          "stride " + std::to_string(tensor.strides[axis]) + " on axis " + std::to_string(i) + " of " +
                              shape_text(tensor));
    }
    dense *= tensor.shape[axis];
  }
}

namespace {

struct Span {
  const char *begin, *end;
};

Span span_of(const Tensor& tensor) {
  int64_t low = 0, high = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    const auto axis = static_cast<size_t>(i);
    if (tensor.shape[axis] == 0) return {tensor.data, tensor.data};
    const int64_t extent = (tensor.shape[axis] - 1) * tensor.strides[axis];
    (extent < 0 ? low : high) += extent;
  }
  return {tensor.data + low * tensor.element_size, tensor.data + (high + 1) * tensor.element_size};
}

}  // namespace

void require_disjoint(const Tensor& written, std::initializer_list<const Tensor*> others) {
  const Span a = span_of(written);
  if (a.begin == a.end) return;
  for (const Tensor* other : others) {
    if (!other) continue;
    const Span b = span_of(*other);
    if (b.begin == b.end || a.end <= b.begin || b.end <= a.begin) continue;
    throw ArgumentError(Fault::invalid_argument, written.name, std::string("memory apart from ") + other->name,
                        "overlapping memory");
  }
}

}  // namespace pagedcore
