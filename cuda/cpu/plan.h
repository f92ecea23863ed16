// Cuts one call into work items of roughly equal cost for the threads at hand.
#pragma once

#include <cstdint>
#include <vector>

#include "pagedcore/params.h"
#include "pagedcore/split.h"

namespace pagedcore::cpu {

struct Group {
    int32_t first_item;  // its pieces are items [first_item, first_item + num_pieces), in order
    int32_t num_pieces;
};

struct Plan {
    std::vector<WorkItem> items;
    std::vector<int32_t> order;  // indices of items, the most expensive first
    std::vector<Group> groups;
    int64_t max_rows = 0;  // of any item
    int64_t cost = 0;      // keys x rows over all items, for choosing the number of threads
};

// tile_rows: an item with at least so many query rows a KV head is cut by queries and heads as well.
void make_plan(const AttentionParams& params, int tile_rows, int64_t split_size, int num_threads, Plan& plan);

}  // namespace pagedcore::cpu
