// From a token of a sequence to the address of its K and V rows.
#pragma once

#include <cstdint>

#include "pagedcore/macros.h"
#include "pagedcore/params.h"

namespace pagedcore {

PAGEDCORE_FN const int32_t* table_row(const AttentionParams& p, int32_t seq) {
  const int64_t row = p.block_table_rows ? p.block_table_rows[seq] : seq;
  return p.block_table + row * p.block_table_stride;
}

// Element offsets, from head 0 of block 0, of tokens [begin, begin + count) of a sequence. Walks the table once; one
// division a call.
PAGEDCORE_FN void token_offsets(const AttentionParams& p, const int32_t* table, int64_t begin, int count,
                                int64_t* k_offsets, int64_t* v_offsets) {
  int64_t index = begin / p.block_size;
  int32_t slot = static_cast<int32_t>(begin - index * p.block_size);
  int done = 0;
  while (done < count) {
    const int64_t block = table[index++];
    const int64_t k = block * p.k.block_stride, v = block * p.v.block_stride;
    for (; slot < p.block_size && done < count; ++slot, ++done) {
      k_offsets[done] = k + slot * p.k.token_stride;
      v_offsets[done] = v + slot * p.v.token_stride;
    }
    slot = 0;
  }
}

// The same for the scales of a quantised cache.
PAGEDCORE_FN void scale_offsets(const AttentionParams& p, const int32_t* table, int64_t begin, int count,
                                int64_t* k_offsets, int64_t* v_offsets) {
  for (int i = 0; i < count; ++i) {
    const int64_t block = table[(begin + i) / p.block_size], slot = (begin + i) % p.block_size;
    k_offsets[i] = block * p.k_scale.block_stride + slot * p.k_scale.token_stride;
    v_offsets[i] = block * p.v_scale.block_stride + slot * p.v_scale.token_stride;
  }
}

}  // namespace pagedcore
