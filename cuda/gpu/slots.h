// Where a token's K and V are written: the slot that the caller mapped it to, as a place in a block.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/params.h"
#include "report.h"

namespace pagedcore::gpu {

// What the kernels that write rows to slots are given.
struct WriteParams {
  CacheWriteParams write;
  int64_t num_blocks;
};

// Nowhere (block -1): a token that is not to be written, or, which is flagged, one whose slot is past the cache.
struct SlotPlace {
  int64_t block, offset;
};

PAGEDCORE_DEVICE SlotPlace place_of_token(const WriteParams& params, int64_t token) {
  const CacheWriteParams& p = params.write;
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return {-1, 0};
  if (slot >= params.num_blocks * p.block_size) {
    report(p.faults, DeviceFault::slot);
    return {-1, 0};
  }
  return {slot / p.block_size, slot % p.block_size};
}

}  // namespace pagedcore::gpu
