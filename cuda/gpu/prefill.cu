// Attention of prompts: tiles of 128 rows (many_rows.h), so that a key that was copied serves twice the rows.
//
// Cut: as decode.cu. Bytes: K and V of a KV head once per 128 rows. Shared memory: 64 KiB and a little at head size
// 128; registers leave one block an SM.
//
// Chosen when most sequences have many rows (paged_attention.cu) and the head size is 64 or 128. A row's result has
// the same bits as in a tile of 64.
#include "attend.h"
#include "many_rows.h"

namespace pagedcore::gpu {
namespace {

constexpr int kWarps = 8;

template <int kDim, class T>
PAGEDCORE_KERNEL(kWarps* device::kWarpSize, 1)
prefill_kernel(const PlannedAttention params) {
  using Rows = ManyRows<kDim, T, kWarps>;
  attend_all<Rows, Rows, T>(params);
}

struct Prefill {
  template <int kDim, class T>
  static TiledKernel instance() {
    if constexpr (takes_prefill(kDim)) {
      using Rows = ManyRows<kDim, T, kWarps>;
      return tiled_kernel<Rows, Rows, prefill_kernel<kDim, T>>();
    } else {
      throw std::invalid_argument("head_dim " + std::to_string(kDim) + " has no tiles of 128 rows");
    }
  }
};

}  // namespace

TiledKernel prefill_kernel_for(const AttentionParams& p) { return instance_for<Prefill>(p); }

}  // namespace pagedcore::gpu
