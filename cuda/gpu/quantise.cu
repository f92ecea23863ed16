// reshape_and_cache into a quantised cache: this step's K and V become codes at their slots, and where each token and
// head has a scale of its own, that is made of the row and written with it. To the bit what docs/quantisation.md says.
//
// Cut: a warp has one row of K or of V, that is one token's of one head; each lane has every 32nd element. With scales
// of its own a row is read twice, the second time from the cache. Bytes: a row in, a byte an element out, and 4 for a
// scale that is made.
#include "gpu.h"
#include "grid.h"
#include "pagedcore/device.h"
#include "pagedcore/quantise.h"
#include "quantise.h"
#include "slots.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;

// `scale`: the row's place for it, or null where it is 1.
template <class T>
PAGEDCORE_DEVICE void quantise_row(const T* from, int count, float* scale, bool make_scale, e4m3* to) {
  float factor = 1.0f;
  if (make_scale) {
    float most = 0.0f;
    for (int d = lane_id(); d < count; d += kWarpSize) most = absolute_max(most, to_float(from[d]));
    factor = row_scale(reduce_max(most));
    if (lane_id() == 0) *scale = factor;
  } else if (scale != nullptr) {
    factor = *scale;
  }
  for (int d = lane_id(); d < count; d += kWarpSize) to[d] = quantise(to_float(from[d]), factor);
}

template <class T>
PAGEDCORE_KERNEL(kThreads, 1)
quantise_kernel(const WriteParams params) {
  const CacheWriteParams& p = params.write;
  const int64_t rows = p.num_tokens * p.num_kv_heads * 2;
  for (int64_t row = int64_t{block_x()} * kWarps + warp_id(); row < rows; row += int64_t{grid_x()} * kWarps) {
    const bool is_key = row % 2 == 0;
    const int64_t token = row / 2 / p.num_kv_heads, head = row / 2 % p.num_kv_heads;
    const SlotPlace slot = place_of_token(params, token);
    if (slot.block < 0) continue;
    const Pages& pages = is_key ? p.k : p.v;
    const Scales& scales = is_key ? p.k_scale : p.v_scale;
    const T* from = is_key ? static_cast<const T*>(p.key) + token * p.key_token_stride + head * p.key_head_stride
                           : static_cast<const T*>(p.value) + token * p.value_token_stride + head * p.value_head_stride;
    e4m3* to = static_cast<e4m3*>(pages.data) + slot.block * pages.block_stride + head * pages.head_stride +
               slot.offset * pages.token_stride;
    float* scale = scales.data == nullptr ? nullptr
                                          : scales.data + slot.block * scales.block_stride + head * scales.head_stride +
                                                slot.offset * scales.token_stride;
    quantise_row(from, static_cast<int>((is_key ? p.key_bytes : p.value_bytes) / p.element_size), scale,
                 is_key ? p.makes_k_scale : p.makes_v_scale, to);
  }
}

}  // namespace

void load_quantise() {
  load(quantise_kernel<float>);
  load(quantise_kernel<f16>);
  load(quantise_kernel<bf16>);
}

void quantise_and_cache(const CacheWriteParams& p, int64_t num_blocks, Stream stream) {
  const int64_t blocks = (p.num_tokens * p.num_kv_heads * 2 + kWarps - 1) / kWarps;
  const auto run = [&](auto kernel) {
    launch(kernel, grid_for(blocks), 1, 1, kThreads, 0, stream, WriteParams{p, num_blocks});
  };
  switch (p.dtype) {
    case DType::f32:
      return run(quantise_kernel<float>);
    case DType::f16:
      return run(quantise_kernel<f16>);
    case DType::bf16:
      return run(quantise_kernel<bf16>);
    default:
      throw std::invalid_argument("keys of a dtype that is no float");
  }
}

}  // namespace pagedcore::gpu
