// Attention of a step that decodes some sequences and computes chunks of others, in one launch: tiles of 16 rows
// (few_rows.h) for sequences of at most 16 rows a KV head, of 64 rows (many_rows.h) for the others. At head size 256
// all are of 64.
//
// Cut: as decode.cu; the line of all work counts a unit of 16 rows by its bytes and one of 64 rows by its flop.
// Bytes: as decode.cu for sequences of few rows, K and V of a KV head once per 64 rows for the others.
// Shared memory: the larger of both, 96 KiB and a little at head size 128, so two blocks an SM on sm_90.
//
// Chosen when a sequence may have more than 16 rows a KV head and prefill.cu is not. The instances, which take longer
// to compile than all others, are in a file for each kind of elements: mixed_f16.cu, mixed_bf16.cu, mixed_codes.cu.
#pragma once

#include "attend.h"
#include "few_rows.h"
#include "many_rows.h"

namespace pagedcore::gpu {

constexpr int kMixedWarps = 4;

// Above kMostDimOfBothTiles registers leave no room for both sizes in one kernel.
template <int kDim, class T>
using MixedFew = std::conditional_t<kDim <= kMostDimOfBothTiles, FewRows<kDim, T, kMixedWarps * device::kWarpSize>,
                                    ManyRows<kDim, T, kMixedWarps>>;

template <int kDim, class T>
PAGEDCORE_KERNEL(kMixedWarps* device::kWarpSize, (kDim <= 128 ? 2 : 1))
mixed_kernel(const PlannedAttention params) {
  attend_all<MixedFew<kDim, T>, ManyRows<kDim, T, kMixedWarps>, T>(params);
}

struct Mixed {
  template <int kDim, class T>
  static TiledKernel instance() {
    return tiled_kernel<MixedFew<kDim, T>, ManyRows<kDim, T, kMixedWarps>, mixed_kernel<kDim, T>>();
  }
};

template <class T>
TiledKernel mixed_kernel_of(const AttentionParams& p) {
  return instance_for<Mixed, T>(p);
}

}  // namespace pagedcore::gpu
