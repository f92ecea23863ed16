// Cuts one call into work items of roughly equal cost for the threads at hand.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"
#include "pagedcore/params.h"
#include "pagedcore/split.h"

namespace pagedcore::cpu {

struct Group {
  int64_t first_partial;  // of the call's partial states, one a piece and in order
  int32_t num_pieces;
};

struct Plan {
  std::vector<WorkItem> items;
  std::vector<WorkItem> wholes;  // before splitting; kept for its memory
  std::vector<int32_t> order;    // indices of items, the most expensive first
  std::vector<Group> groups;
  int64_t num_partials = 0;  // pieces of all groups
  int64_t stream_rows = 0;   // most rows of a streamed item
  int64_t packed_rows = 0;   // most rows of a packed item
  int64_t cost = 0;          // keys x rows over all items, for choosing the number of threads
};

void make_plan(const AttentionParams& params, const Isa& isa, int num_threads, Plan& plan);

}  // namespace pagedcore::cpu
