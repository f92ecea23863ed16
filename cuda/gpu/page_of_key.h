// From a key's position to the block it is in. No host has looked at lengths and tables: whatever they say, nothing
// outside of them is read, and a key that has no block is masked.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/params.h"
#include "report.h"

namespace pagedcore::gpu {

// -1, and flagged: a length past the table, a row that is not in it, or an id that is not a block's.
PAGEDCORE_DEVICE int block_of_key(const AttentionParams& p, int seq, int key) {
  const int row = p.block_table_rows != nullptr ? p.block_table_rows[seq] : seq;
  const int index = key / p.block_size;
  if (row < 0 || row >= p.table_rows || index >= p.max_blocks) {
    report(p.faults, DeviceFault::length);
    return -1;
  }
  const int block = p.block_table[row * p.block_table_stride + index];
  if (block >= 0 && block < p.num_blocks) return block;
  report(p.faults, DeviceFault::block);
  return -1;
}

}  // namespace pagedcore::gpu
