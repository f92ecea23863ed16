// merge_states: two outputs over disjoint keys, each with its log-sum-exp, become one; sinks join here.
//
// Cut: a warp has one row, that is one token's output of one head, and each lane every 32nd column; the grid strides
// over all rows. Bytes: three rows an output row, nothing read twice; bandwidth decides.
#include "gpu.h"
#include "grid.h"
#include "pagedcore/device.h"
#include "pagedcore/softmax.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

template <class T>
PAGEDCORE_DEVICE T* row_of(const PartialOutput& state, int64_t token, int head) {
  return static_cast<T*>(state.out) + token * state.out_token_stride + head * state.out_head_stride;
}

PAGEDCORE_DEVICE float* lse_of(const PartialOutput& state, int64_t token, int head) {
  return state.lse + token * state.lse_token_stride + head * state.lse_head_stride;
}

template <class T>
PAGEDCORE_KERNEL(kThreads, 1)
merge_kernel(const MergeParams p) {
  const int64_t rows = p.num_tokens * p.num_heads;
  for (int64_t row = int64_t{block_x()} * kWarps + warp_id(); row < rows; row += int64_t{grid_x()} * kWarps) {
    const int64_t token = row / p.num_heads;
    const int head = static_cast<int>(row % p.num_heads);
    const float lse_a = *lse_of(p.a, token, head), lse_b = *lse_of(p.b, token, head);
    const OutputFactors factors = output_factors(lse_a, lse_b, p.sinks != nullptr ? p.sinks + head : nullptr);
    const T *a = row_of<T>(p.a, token, head), *b = row_of<T>(p.b, token, head);
    T* out = row_of<T>(p.total, token, head);
    for (int d = lane_id(); d < p.v_head_dim; d += kWarpSize) {
      from_float(merge_element(factors, lse_a, to_float(a[d]), lse_b, to_float(b[d])), out[d]);
    }
    if (lane_id() == 0) *lse_of(p.total, token, head) = factors.lse;
  }
}

}  // namespace

void load_merge() {
  load(merge_kernel<float>);
  load(merge_kernel<f16>);
  load(merge_kernel<bf16>);
}

void merge_states(const MergeParams& p, Stream stream) {
  const int64_t blocks = (p.num_tokens * p.num_heads + kWarps - 1) / kWarps;
  if (blocks == 0) return;
  const auto run = [&](auto kernel) { launch(kernel, grid_for(blocks), 1, 1, kThreads, 0, stream, p); };
  switch (p.dtype) {
    case DType::f32:
      return run(merge_kernel<float>);
    case DType::f16:
      return run(merge_kernel<f16>);
    case DType::bf16:
      return run(merge_kernel<bf16>);
    default:
      throw std::invalid_argument("states of a dtype that is no float");
  }
}

}  // namespace pagedcore::gpu
