// Attention of a step that decodes some sequences and computes chunks of others, in one launch: tiles of 16 rows
// (few_rows.h) for sequences of at most 16 rows a KV head, of 64 rows (many_rows.h) for the others. At head size 256
// all are of 64.
//
// Cut: as decode.cu; the line of all work counts a unit of 16 rows by its bytes and one of 64 rows by its flop.
// Shared memory: the larger of both, 96 KiB and a little at head size 128, so two blocks an SM on sm_90.
//
// Chosen when a sequence may have more than 16 rows a KV head and prefill.cu is not.
#include "attend.h"
#include "few_rows.h"
#include "many_rows.h"

namespace pagedcore::gpu {
namespace {

constexpr int kWarps = 4;

// Above kMostDimOfBothTiles registers leave no room for both sizes in one kernel.
template <int kDim, class T>
using Few = std::conditional_t<kDim <= kMostDimOfBothTiles, FewRows<kDim, T, kWarps * device::kWarpSize>,
                               ManyRows<kDim, T, kWarps>>;

template <int kDim, class T>
PAGEDCORE_KERNEL(kWarps* device::kWarpSize, (kDim <= 128 ? 2 : 1))
mixed_kernel(const PlannedAttention params) {
  attend_all<Few<kDim, T>, ManyRows<kDim, T, kWarps>, T>(params);
}

struct Mixed {
  template <int kDim, class T>
  static TiledKernel instance() {
    return tiled_kernel<Few<kDim, T>, ManyRows<kDim, T, kWarps>, mixed_kernel<kDim, T>>();
  }
};

}  // namespace

TiledKernel mixed_kernel_for(const AttentionParams& p) { return instance_for<Mixed>(p); }

}  // namespace pagedcore::gpu
