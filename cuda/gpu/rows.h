// Query rows packed into tiles: all query heads of a KV head, for all query tokens of a sequence.
#pragma once

#include "pagedcore/device.h"
#include "pagedcore/mask.h"
#include "pagedcore/score.h"
#include "work.h"

namespace pagedcore::gpu {

// A row of the tile: which query token and head, its position, the end of the keys it sees (where they begin follows
// from position and window), and for ALiBi its head's slope. A row past the last sees none.
struct Row {
  int64_t token;
  int head;
  int position;
  int end;
  float slope;
  bool valid;
};

// The first key that a row sees, if it sees any.
PAGEDCORE_DEVICE int begin_of(const AttentionParams& p, const Row& row) {
  return p.window > 0 && row.position >= p.window ? row.position - static_cast<int>(p.window) + 1 : 0;
}

PAGEDCORE_DEVICE Row row_of(const PlannedAttention& params, const Span& s, int r) {
  const AttentionParams& p = params.attention;
  const int group = p.num_heads / p.num_kv_heads;
  const int start = p.query_start_loc[s.seq];
  const int query_len = p.query_start_loc[s.seq + 1] - start;
  const int packed = s.tile * s.work.rows + r;
  const int query = quotient(packed, params.plan.by_group);
  Row row;
  row.token = int64_t{start} + query;
  row.valid = query < query_len && row.token >= 0 && row.token < p.num_tokens;
  row.head = s.kv_head * group + packed - query * group;
  const KeyRange keys = row.valid ? visible_keys(p, p.seq_lens[s.seq], query_len, query) : KeyRange{0, 0};
  row.end = static_cast<int>(keys.end);
  row.position = static_cast<int>(query_position(p.seq_lens[s.seq], query_len, query));
  row.slope = p.alibi_slopes != nullptr && row.valid ? alibi_slope(p, row.head) : 0.0f;
  return row;
}

}  // namespace pagedcore::gpu
