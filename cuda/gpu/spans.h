// From a block's place in the line of all units to the work there.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "work.h"

namespace pagedcore::gpu {

// The sequence that unit `unit` belongs to: 32 probes a round.
PAGEDCORE_DEVICE int sequence_of_unit(const PlannedAttention& params, int64_t unit) {
  int low = 0, high = params.attention.num_seqs - 1;
  while (low < high) {
    const int step = (high - low + device::kWarpSize) / device::kWarpSize;
    const int probe = low + device::lane_id() * step;
    const int before = device::bit_count(device::ballot(probe <= high && params.plan.first_units[probe] <= unit));
    low += (before - 1) * step;
    high = low + step - 1 < high ? low + step - 1 : high;
  }
  return low;
}

PAGEDCORE_DEVICE Span span_at(const PlannedAttention& params, int64_t unit, int64_t limit) {
  const AttentionParams& p = params.attention;
  Span s;
  s.seq = sequence_of_unit(params, unit);
  const int64_t query_len = int64_t{p.query_start_loc[s.seq + 1]} - p.query_start_loc[s.seq];
  const KeyUnits keys = key_units(p, p.seq_lens[s.seq], query_len);
  const int64_t before = params.plan.first_units[s.seq];
  const int64_t item = (unit - before) / keys.count;
  const int tiles = row_tiles(p, query_len);
  s.kv_head = static_cast<int>(item / tiles);
  s.row_tile = static_cast<int>(item % tiles);
  s.item_begin = before + item * keys.count;
  s.item_end = s.item_begin + keys.count;
  s.begin = unit;
  s.end = s.item_end < limit ? s.item_end : limit;
  s.first_key = keys.first;
  return s;
}

}  // namespace pagedcore::gpu
