// From a key's position to the block it is in. No host has looked at lengths and tables: whatever they say, nothing
// outside of them is read, and a key that has no block is masked.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/params.h"
#include "report.h"

namespace pagedcore::gpu {

// A sequence's row of the block table; without entries where there is no such row.
struct TableRow {
  const int32_t* blocks;
  int count;
};

PAGEDCORE_DEVICE TableRow table_row_of(const AttentionParams& p, int seq) {
  const int row = p.block_table_rows != nullptr ? p.block_table_rows[seq] : seq;
  if (row < 0 || row >= p.table_rows) return {p.block_table, 0};
  return {p.block_table + row * p.block_table_stride, static_cast<int>(p.max_blocks)};
}

// Entry `index` of the row. -1, and flagged: it is past the row, which callers that cut keys at its end never ask for,
// or no id of a block.
PAGEDCORE_DEVICE int block_at(const AttentionParams& p, const TableRow& row, int index) {
  if (index >= row.count) {
    report(p.faults, DeviceFault::length);
    return -1;
  }
  const int block = row.blocks[index];
  if (block >= 0 && block < p.num_blocks) return block;
  report(p.faults, DeviceFault::block);
  return -1;
}

}  // namespace pagedcore::gpu
