// Query rows packed into tiles of kTileRows: all query heads of a KV head, for all query tokens of a sequence.
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

// How far behind its position a row sees: as far as any position is, where there is no window.
PAGEDCORE_DEVICE int reach_of(const AttentionParams& p) {
  return p.window > 0 && p.window < INT32_MAX ? static_cast<int>(p.window) : INT32_MAX;
}

PAGEDCORE_DEVICE bool sees(const Row& row, int reach, int key) { return key < row.end && row.position - key < reach; }

PAGEDCORE_DEVICE Row row_of(const AttentionParams& p, const Span& s, int r) {
  const int group = p.num_heads / p.num_kv_heads;
  const int start = p.query_start_loc[s.seq];
  const int query_len = p.query_start_loc[s.seq + 1] - start;
  const int packed = s.row_tile * kTileRows + r;
  const int query = packed / group;
  Row row;
  row.valid = query < query_len;
  row.token = start + query;
  row.head = s.kv_head * group + packed % group;
  const KeyRange keys = row.valid ? visible_keys(p, p.seq_lens[s.seq], query_len, query) : KeyRange{0, 0};
  row.end = static_cast<int>(keys.end);
  row.position = static_cast<int>(query_position(p.seq_lens[s.seq], query_len, query));
  row.slope = p.alibi_slopes != nullptr && row.valid ? alibi_slope(p, row.head) : 0.0f;
  return row;
}

}  // namespace pagedcore::gpu
