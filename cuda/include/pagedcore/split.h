// How the CPU cuts the attention of one call into work items; how a GPU does is in gpu/work.h.
#pragma once

#include <cstdint>

namespace pagedcore {

// Queries [query_begin, query_end) of one sequence, KV heads [head_begin, head_end), keys [key_begin, key_end).
//
// An item whose `group` is negative covers all keys of its rows and writes the output. Otherwise it is piece `piece` of
// a group: its state goes to a partial buffer, and whoever finishes the group's last piece folds the pieces in order
// and writes the output.
struct WorkItem {
  int32_t seq;
  int32_t query_begin, query_end;
  int32_t head_begin, head_end;
  int32_t group;
  int32_t piece;
  bool packed;  // many rows a KV head: one head only, by the packed kernel
  int64_t key_begin, key_end;
  // > 0: process the keys in pieces of this size (aligned to multiples of it) and fold them in order.
  int64_t piece_size;

  int32_t rows(int32_t queries_per_kv_head) const {
    return (query_end - query_begin) * (head_end - head_begin) * queries_per_kv_head;
  }
};

}  // namespace pagedcore
