// Where the online softmax of one work item lives: m[rows], l[rows], w[rows], o[rows][stride], contiguous floats,
// rows ordered (KV head, query, query head of the group). l is the exact sum of weights, for the LSE; w the sum of the
// weights as they were multiplied into o, rounded where the kernel rounds them, for the division. o is unnormalised,
// and in the order of its instruction set's chunks until `finish` writes it out.
#pragma once

#include <cstdint>

#include "pagedcore/macros.h"

namespace pagedcore::cpu {

struct State {
  float* m;
  float* l;
  float* w;
  float* o;
  int64_t stride;
};

PAGEDCORE_FN int64_t state_floats(int64_t rows, int64_t stride) {
  return (3 * rows + 15) / 16 * 16 + rows * stride;  // o begins on a cache line
}

PAGEDCORE_FN State state_at(float* memory, int64_t rows, int64_t stride) {
  return {memory, memory + rows, memory + 2 * rows, memory + (3 * rows + 15) / 16 * 16, stride};
}

}  // namespace pagedcore::cpu
