// Query rows meeting key rows, a chunk at a time. The general way is f32; an instruction set may specialise it for a
// type.
#pragma once

namespace pagedcore::cpu::PAGEDCORE_ISA {

template <class T>
struct DotOperand {
  Vec a, b;
};

template <class T>
PAGEDCORE_FN void load_operand(const T* p, DotOperand<T>& x) {
  load_chunk(p, x.a, x.b);
}

// At most kChunk floats of staging memory a chunk.
template <class T>
PAGEDCORE_FN void stage_operand(float* staged, const DotOperand<T>& x) {
  store(staged, x.a);
  store(staged + kLanes, x.b);
}

template <class T>
PAGEDCORE_FN void load_staged(const float* staged, DotOperand<T>& x) {
  x.a = load(staged);
  x.b = load(staged + kLanes);
}

template <class T>
PAGEDCORE_FN Vec multiply_add(const DotOperand<T>& a, const DotOperand<T>& b, Vec sum) {
  return fma(a.b, b.b, fma(a.a, b.a, sum));
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
