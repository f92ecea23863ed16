// A block's share of the line of all work, item by item. One thread walks, and the others read what it found in shared
// memory: kept in registers it would cost each of them two dozen while they multiply.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "report.h"
#include "work.h"

namespace pagedcore::gpu {

// Pieces of fixed size: whether each of the item's has a record of its own, which is that of its place in the line.
// Only then may they lie in different blocks.
PAGEDCORE_DEVICE bool has_records(const WorkPlan& plan, const Span& s) {
  return s.item_begin + s.work.units <= plan.most_pieces;
}

// Whether a sequence has as many tiles as when the plan was made.
PAGEDCORE_DEVICE bool has_tiles_as_planned(const AttentionParams& p, const WorkPlan& plan, int seq) {
  return plan.first_items[seq + 1] - plan.first_items[seq] == tiles_of(p, plan, query_len_of(p, seq));
}

// In shared memory.
struct BlockWork {
  PlanHeader header;
  int64_t place, limit;  // what is left of the block's share
  Span span;             // what is being worked on
  int item;              // the next one
  int more;              // whether there was a next one
  int arrived;           // blocks that had left their pieces before this one

  // By one thread.
  PAGEDCORE_MEMBER void start(const PlannedAttention& params) {
    header = *params.plan.header;
    place = limit = 0;
    if (header.made_for != params.plan.made_for) return report(params.attention.faults, DeviceFault::plan);
    item = params.plan.block_items[device::block_x()];
    if (device::block_x() >= header.blocks || header.num_items == 0) return;
    place = block_begin(header, device::block_x());
    limit = block_begin(header, device::block_x() + 1);
  }

  // What is past the table is part of the line, which is made without it, and is not looked at. Pieces that one block
  // has of it are not even counted: a length that is no length must not hold up a GPU.
  static PAGEDCORE_MEMBER void cut_at_table(const AttentionParams& p, const WorkPlan& plan, Span& s) {
    const int64_t table_end = p.max_blocks * p.block_size;
    if (s.work.end <= table_end) return;
    s.work.end = static_cast<int>(table_end);
    if (!plan.fixed || !is_whole(s)) return;
    const int64_t pieces = (table_end - s.work.first_key + plan.unit_keys - 1) / plan.unit_keys;
    s.work.units = s.end = pieces < 1 ? 1 : static_cast<int>(pieces);
  }

  // By the same thread: the next item of which the block has anything.
  PAGEDCORE_MEMBER void next(const PlannedAttention& params) {
    const AttentionParams& p = params.attention;
    const WorkPlan& plan = params.plan;
    more = 0;
    while (place < limit && more == 0) {
      const TileItem tile = plan.items[item];
      Span s;
      s.seq = tile.seq;
      s.tile = tile.tile;
      s.work = tile_work(p, plan, p.seq_lens[tile.seq], query_len_of(p, tile.seq), tile.tile);
      const int64_t length = int64_t{s.work.units} * s.work.weight;
      // Lengths have changed since the plan was made: the item would not be cut alike by all of its blocks, nor end
      // with the last KV head.
      const int64_t planned_end = plan.items[item + 1].begin;
      if (length * p.num_kv_heads != planned_end - tile.begin || !has_tiles_as_planned(p, plan, tile.seq)) {
        report(p.faults, DeviceFault::plan);
        place = planned_end;
        ++item;
        continue;
      }
      s.kv_head = static_cast<int>((place - tile.begin) / length);
      s.item_begin = tile.begin + s.kv_head * length;
      s.grain = plan.grain == 0 || (plan.fixed && !has_records(plan, s)) ? s.work.units : plan.grain;
      s.begin = units_before(s, place);
      s.end = units_before(s, limit);
      place = s.item_begin + length;
      cut_at_table(p, plan, s);
      if (s.kv_head + 1 == p.num_kv_heads) ++item;
      if (s.begin < s.end) more = 1;
      span = s;
    }
  }
};

}  // namespace pagedcore::gpu
