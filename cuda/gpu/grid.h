// How many blocks a launch has whose kernel loops over its items.
#pragma once

#include <cstdint>

namespace pagedcore::gpu {

// Enough to fill any GPU many times over; what is left goes round the loop.
constexpr int kMaxBlocks = 16384;

inline int grid_for(int64_t items) { return static_cast<int>(items < kMaxBlocks ? items : kMaxBlocks); }

}  // namespace pagedcore::gpu
