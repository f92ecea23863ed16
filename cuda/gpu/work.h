// How the attention of one call is cut over a fixed grid of blocks (stream-K).
//
// Every (sequence, KV head, tile of rows) is an item; its keys are cut into units of kUnitKeys. All units of a call
// stand in one line, sequence by sequence, and block b of a grid of n takes [b * units / n, (b + 1) * units / n): every
// block has the same work to within one unit, whatever the lengths are. An item that lies in one block is finished
// there. One that spans several leaves a partial state per block, and the last block to arrive folds them in order.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/mask.h"
#include "pagedcore/params.h"

namespace pagedcore::gpu {

constexpr int kUnitKeys = 64;
constexpr int kTileRows = 16;

// Rows of a sequence and KV head, packed: row r is query r / group of head kv_head * group + r % group.
PAGEDCORE_FN int row_tiles(const AttentionParams& p, int64_t query_len) {
  const int64_t rows = query_len * (p.num_heads / p.num_kv_heads);
  return static_cast<int>((rows + kTileRows - 1) / kTileRows);
}

// Keys that any query of the sequence sees, from a multiple of kUnitKeys on. At least one unit where there is a query,
// so that a row that sees nothing is written too.
struct KeyUnits {
  int64_t first;
  int count;
};

PAGEDCORE_FN KeyUnits key_units(const AttentionParams& p, int64_t seq_len, int64_t query_len) {
  const KeyRange keys = visible_keys(p, seq_len, query_len, 0, query_len);
  const int64_t first = keys.begin / kUnitKeys * kUnitKeys;
  const int64_t units = (keys.end - first + kUnitKeys - 1) / kUnitKeys;
  return {first, units < 1 ? 1 : static_cast<int>(units)};
}

PAGEDCORE_FN int64_t units_of_sequence(const AttentionParams& p, int64_t seq_len, int64_t query_len) {
  if (query_len <= 0) return 0;
  return int64_t{p.num_kv_heads} * row_tiles(p, query_len) * key_units(p, seq_len, query_len).count;
}

// Device memory that a planned attention works with: in the caller's plan and workspace (paged_attention.cu).
struct WorkPlan {
  int64_t* first_units;  // [num_seqs + 1] work units before each sequence, and in all
  int32_t* counters;     // [grid] pieces that arrived, of the item that begins in each block and does not end there
  float* partials;       // [grid, 2] records (record.h): what a block has of items that others share
  int grid;              // blocks of the attention kernel
};

struct PlannedAttention {
  AttentionParams attention;
  WorkPlan plan;
};

// Consecutive units of one item.
struct Span {
  int seq;
  int kv_head;
  int row_tile;
  int64_t item_begin, item_end;  // in the line of all units
  int64_t begin, end;            // of these, the ones of this span
  int64_t first_key;             // of the item's first unit
};

// The first unit of block `block`. With fewer units than blocks the last blocks have none: those between two pieces of
// an item always have one.
PAGEDCORE_FN int64_t first_unit(int64_t units, int grid, int block) {
  if (units < grid) return block < units ? block : units;
  return units * block / grid;
}

// The block that unit `unit` belongs to.
PAGEDCORE_FN int block_of_unit(int64_t units, int grid, int64_t unit) {
  if (units < grid) return static_cast<int>(unit);
  int block = static_cast<int>(unit * grid / units);
  while (block + 1 < grid && first_unit(units, grid, block + 1) <= unit) ++block;
  return block;
}

}  // namespace pagedcore::gpu
