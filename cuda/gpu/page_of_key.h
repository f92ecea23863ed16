// From a key's position to the block it is in. No host has looked at lengths and tables: whatever they say, nothing
// outside of them is read, and a key that has no block is masked.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/params.h"

namespace pagedcore::gpu {

// -1: a length past the table, a row that is not in it, or an id that is not a block's.
PAGEDCORE_DEVICE int block_of_key(const AttentionParams& p, int seq, int key) {
  const int row = p.block_table_rows != nullptr ? p.block_table_rows[seq] : seq;
  const int index = key / p.block_size;
  if (row < 0 || row >= p.table_rows || index >= p.max_blocks) return -1;
  const int block = p.block_table[row * p.block_table_stride + index];
  return block >= 0 && block < p.num_blocks ? block : -1;
}

}  // namespace pagedcore::gpu
