// Decode attention over paged KV on tensor cores: softmax(scale * Q K^T + mask) V for a few query tokens a sequence.
//
// Cut: a fixed grid of blocks shares all work evenly (work.h); each item is a tile of 16 rows (few_rows.h).
// Bytes: 4 * head_dim a key and KV head, of codes 2 * head_dim; nothing is read twice but page ids and the query.
// Shared memory: 96 KiB and a little at head size 128, so two blocks an SM on sm_90.
//
// Chosen when no sequence has more than 16 rows a KV head, the dtype is f16 or bf16, K and V have one head size of 64,
// 80, 96, 112, 128, 192 or 256 (of codes 64 or 128), and every row of Q, K and V starts on 16 bytes. At head size 256
// mixed.h takes what has a split_size.
#include "attend.h"
#include "few_rows.h"

namespace pagedcore::gpu {
namespace {

// Two warps above head size 128, else four.
template <int kDim, class T>
using DecodeRows = FewRows<kDim, T, kDim <= 128 ? 128 : 64>;

template <int kDim, class T>
PAGEDCORE_KERNEL((kDim <= 128 ? 128 : 64), (kDim <= 64    ? 4
                                            : kDim <= 128 ? 2
                                                          : 1))
decode_kernel(const PlannedAttention params) {
  using Rows = DecodeRows<kDim, T>;
  attend_all<Rows, Rows, T>(params);
}

struct Decode {
  template <int kDim, class T>
  static TiledKernel instance() {
    using Rows = DecodeRows<kDim, T>;
    return tiled_kernel<Rows, Rows, decode_kernel<kDim, T>>();
  }
};

}  // namespace

TiledKernel decode_kernel_for(const AttentionParams& p) { return instance_for<Decode>(p); }

}  // namespace pagedcore::gpu
