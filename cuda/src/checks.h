// What is asked of a call's tensors beside what each is: sizes that agree, dtypes, memory.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "tensor.h"

namespace pagedcore {

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
