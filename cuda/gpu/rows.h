// Query rows packed into tiles of kTileRows: all query heads of a KV head, for all query tokens of a sequence.
#pragma once

#include "pagedcore/device.h"
#include "pagedcore/mask.h"
#include "work.h"

namespace pagedcore::gpu {

// A row of the tile: which query token and head, and the keys [begin, end) it sees. A row past the last sees none.
struct Row {
  int64_t token;
  int head;
  int begin, end;
  bool valid;
};

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
  row.begin = static_cast<int>(keys.begin);
  row.end = static_cast<int>(keys.end);
  return row;
}

}  // namespace pagedcore::gpu
