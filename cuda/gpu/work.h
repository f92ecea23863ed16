// How the attention of one call is cut over a fixed grid of blocks (stream-K).
//
// Every (sequence, tile of query rows, KV head) is an item; its keys are cut into units. All items of a call stand in
// one line, sequence by sequence and tile by tile, the KV heads of a tile side by side, each as long as its work: units
// times the weight of a unit of its tile. Block b of n takes the line from total * b / n to total * (b + 1) / n, so
// every block has the same work, whatever the lengths are. An item that lies in one block is finished there. One that
// spans several is cut where it may be, leaves a softmax state per piece, and the last block to arrive folds them in
// order.
//
// What a row's result is made of depends on the cuts of its item alone, and with split_size 0 (never cut) or n (cut at
// every n tokens) these depend on nothing else in the batch.
#pragma once

#include <cstdint>

#include "pagedcore/mask.h"
#include "pagedcore/params.h"
#include "pagedcore/score.h"

namespace pagedcore::gpu {

constexpr int kUnitKeys = 64;  // of a unit, unless split_size says otherwise; what tiles process is a divisor
// No piece is shorter, but for an item's last: merging a piece costs about as much as reading some tens of keys.
constexpr int kSmallestPiece = 128;
// Sequences with at most so many rows a KV head are decoded; one with more has tiles of many rows.
constexpr int kFewRows = 16;

// Keys of a fixed piece at most, and of a sequence: so that the end of a piece fits int32, whatever a length says.
constexpr int kLargestPiece = 1 << 24;
constexpr int kMostKeys = INT32_MAX - kLargestPiece;

// A tile of one KV head of a sequence, for all its KV heads.
struct alignas(16) TileItem {
  int64_t begin;  // of its first KV head, in the line
  int32_t seq;
  int32_t tile;
};

struct alignas(16) PlanHeader {
  int64_t total;  // length of the line
  int32_t num_items;
  int32_t blocks;     // that have work, of the grid
  uint64_t made_for;  // the call's WorkPlan::made_for
};

// Division of numbers below 2^31 by one that only the host knows before: a product and a shift, for every divisor.
struct Divisor {
  uint32_t multiplier, shift;

  static Divisor of(int32_t value) {
    uint32_t bits = 0;
    while (int64_t{1} << bits < value) ++bits;
    const uint64_t one = uint64_t{1} << (31 + bits);
    return {static_cast<uint32_t>((one + static_cast<uint64_t>(value) - 1) / static_cast<uint64_t>(value)), 31 + bits};
  }
};

PAGEDCORE_FN int quotient(int x, const Divisor& by) {
  return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * by.multiplier >> by.shift);
}

// How a launch cuts work, and the memory that it works with: in the caller's plan and workspace (paged_attention.cu).
struct WorkPlan {
  PlanHeader* header;
  int32_t* first_items;  // [num_seqs + 1] items before each sequence
  TileItem* items;       // [most_items + 1], the last one used an end mark
  int32_t* block_items;  // [grid] the item in which each block's work begins
  int32_t* counters;     // [grid] pieces that arrived, of the item that begins in each block and does not end there
  float* records;        // [2 * grid + most_pieces] softmax states of pieces (record.h)
  int32_t most_items;
  int32_t most_pieces;  // of fixed size, that have records of their own
  int32_t grid;
  int32_t few_tile, many_tile;      // rows of a tile, for sequences of at most kFewRows rows and for others
  int32_t few_weight, many_weight;  // of a unit
  int32_t unit_keys;                // of a unit: a multiple of kUnitKeys
  int32_t grain;                    // units: an item is cut at multiples of it; 0: nowhere
  bool fixed;                       // each unit is a piece, whichever blocks they lie in
  uint64_t made_for;                // all that the plan's arrays follow from but the lengths, in one number
  Divisor by_block_size, by_group;  // by tokens of a block, and by query heads of a KV head
  ScoreRule rule;                   // made once: in a kernel it would hold two registers
};

struct PlannedAttention {
  AttentionParams attention;
  WorkPlan plan;
};

// Query tokens of a sequence. No host has read the starts: one that decreases makes none, and no sequence has more than
// there are.
PAGEDCORE_FN int query_len_of(const AttentionParams& p, int seq) {
  const int64_t len = int64_t{p.query_start_loc[seq + 1]} - p.query_start_loc[seq];
  return static_cast<int>(len < 0 ? 0 : len < p.num_tokens ? len : p.num_tokens);
}

// Rows of a sequence and KV head are packed: row r is query r / group of head kv_head * group + r % group.
PAGEDCORE_FN int rows_of_query(const AttentionParams& p, int query_len) {
  return query_len <= 0 ? 0 : query_len * (p.num_heads / p.num_kv_heads);
}

PAGEDCORE_FN int tile_rows(const WorkPlan& plan, int rows) { return rows <= kFewRows ? plan.few_tile : plan.many_tile; }

PAGEDCORE_FN int tiles_of(const AttentionParams& p, const WorkPlan& plan, int query_len) {
  const int rows = rows_of_query(p, query_len);
  const int of_one = tile_rows(plan, rows);
  return (rows + of_one - 1) / of_one;
}

// The work on one tile for one KV head. From lengths alone: a plan is made without the cache and its table.
struct TileWork {
  int rows;        // of the tile, whether a query has them or not
  int begin, end;  // keys that any of its rows sees
  int first_key;   // of the first unit: at or before `begin`
  int units;       // at least one, so that rows that see nothing are written too
  int weight;
};

PAGEDCORE_FN TileWork tile_work(const AttentionParams& p, const WorkPlan& plan, int seq_len, int query_len, int tile) {
  const int rows = rows_of_query(p, query_len);
  const int group = p.num_heads / p.num_kv_heads;
  TileWork work;
  work.rows = tile_rows(plan, rows);
  work.weight = rows <= kFewRows ? plan.few_weight : plan.many_weight;
  const int first_row = tile * work.rows;
  const int last_row = first_row + work.rows < rows ? first_row + work.rows - 1 : rows - 1;
  const KeyRange keys = visible_keys(p, seq_len, query_len, first_row / group, last_row / group + 1);
  const int64_t end = keys.end < 0 ? 0 : keys.end < kMostKeys ? keys.end : kMostKeys;
  work.begin = static_cast<int>(keys.begin < end ? keys.begin : end);
  work.end = static_cast<int>(end);
  work.first_key = work.begin / plan.unit_keys * plan.unit_keys;
  work.units = (work.end - work.first_key + plan.unit_keys - 1) / plan.unit_keys;
  if (work.units < 1) work.units = 1;
  return work;
}

// Where block `block` begins.
PAGEDCORE_FN int64_t block_begin(const PlanHeader& header, int block) { return header.total * block / header.blocks; }

// The block that a place in the line belongs to.
PAGEDCORE_FN int block_of(const PlanHeader& header, int64_t place) {
  int block = static_cast<int>(place * header.blocks / header.total);
  while (block + 1 < header.blocks && block_begin(header, block + 1) <= place) ++block;
  return block;
}

// Blocks that have work. None is shorter than the longest grain, so each that lies inside an item has a piece of it.
PAGEDCORE_FN int blocks_with_work(const WorkPlan& plan, int64_t total) {
  const int weight = plan.few_weight > plan.many_weight ? plan.few_weight : plan.many_weight;
  const int64_t most = total / (plan.grain > 0 ? int64_t{plan.grain} * weight : 1);
  return static_cast<int>(most < 1 ? 1 : most < plan.grid ? most : plan.grid);
}

// Consecutive units of an item that one block works on.
struct Span {
  int seq;
  int kv_head;
  int tile;
  TileWork work;
  int64_t item_begin;  // in the line
  int grain;           // units; the item's own
  int begin, end;      // units
};

PAGEDCORE_FN bool is_whole(const Span& s) { return s.begin == 0 && s.end == s.work.units; }

// Units of an item before the place `place` in the line, as far as it may be cut.
PAGEDCORE_FN int units_before(const Span& s, int64_t place) {
  if (place <= s.item_begin) return 0;
  const int64_t step = int64_t{s.grain} * s.work.weight;
  const int64_t units = (place - s.item_begin + step - 1) / step * s.grain;
  return units < s.work.units ? static_cast<int>(units) : s.work.units;
}

// The last block that has a piece of the item: the one in which its last grain begins.
PAGEDCORE_FN int last_block_of(const PlanHeader& header, const Span& s) {
  const int64_t units = (s.work.units - 1) / s.grain * s.grain;
  return block_of(header, s.item_begin + units * s.work.weight);
}

}  // namespace pagedcore::gpu
