// Which keys a query sees.
#pragma once

#include <cstdint>

#include "pagedcore/macros.h"
#include "pagedcore/params.h"

namespace pagedcore {

// Positions [begin, end) of one sequence; empty when begin >= end.
struct KeyRange {
  int64_t begin;
  int64_t end;
};

// Of query `i` (of `query_len`) of a sequence with `seq_len` tokens in the cache. The last query sits on the last
// token. Negative for padding rows (query_len 1, seq_len 0).
PAGEDCORE_FN int64_t query_position(int64_t seq_len, int64_t query_len, int64_t i) { return seq_len - query_len + i; }

// Keys visible to query `i`. Under a causal mask one at a negative position sees nothing.
PAGEDCORE_FN KeyRange visible_keys(const AttentionParams& p, int64_t seq_len, int64_t query_len, int64_t i) {
  const int64_t position = query_position(seq_len, query_len, i);
  KeyRange range{0, p.causal ? position + 1 : seq_len};
  if (p.window > 0 && position - p.window + 1 > 0) range.begin = position - p.window + 1;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// Keys seen by at least one of the queries [first, last): nothing outside is ever read, neither its table entries nor
// its slots.
PAGEDCORE_FN KeyRange visible_keys(const AttentionParams& p, int64_t seq_len, int64_t query_len, int64_t first,
                                   int64_t last) {
  const KeyRange a = visible_keys(p, seq_len, query_len, first);
  const KeyRange b = visible_keys(p, seq_len, query_len, last - 1);
  // Under a causal mask queries before the sequence's first token (query_len > seq_len) see nothing: their range is
  // [0, 0) and does not widen the union.
  return {a.begin < b.begin ? a.begin : b.begin, b.end};
}

}  // namespace pagedcore
