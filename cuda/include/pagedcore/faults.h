// Indices that no host has read: a kernel that meets one out of range masks it and sets a word (gpu/runtime.h).
#pragma once

namespace pagedcore {

enum class DeviceFault {
  block,     // a block id outside of [0, num_blocks) where a query looks, or in a list of blocks
  length,    // a sequence that is longer than its row of the block table, or whose row is not in the table
  slot,      // a slot past the cache
  update,    // a change of a block table outside of it
  plan,      // a plan that was made for another call
  sequence,  // query starts or lengths that cannot be, or are beyond what the call says they are at most
};
constexpr int kDeviceFaults = 6;

}  // namespace pagedcore
