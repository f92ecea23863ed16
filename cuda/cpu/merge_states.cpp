// merge_states on the CPU: memory decides, so rows are dealt out to the threads and each is read once.
#include <algorithm>
#include <atomic>

#include "cpu.h"
#include "pagedcore/formats.h"
#include "pagedcore/softmax.h"
#include "threads.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kElementsPerShare = 1 << 16;  // less is not worth waking a thread

template <class T>
T* row_of(const PartialOutput& state, int64_t token, int64_t head) {
  return static_cast<T*>(state.out) + token * state.out_token_stride + head * state.out_head_stride;
}

float& lse_of(const PartialOutput& state, int64_t token, int64_t head) {
  return state.lse[token * state.lse_token_stride + head * state.lse_head_stride];
}

template <class T>
void merge_rows(const MergeParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t token = row / p.num_heads, head = row % p.num_heads;
    const float lse_a = lse_of(p.a, token, head), lse_b = lse_of(p.b, token, head);
    const OutputFactors factors = output_factors(lse_a, lse_b, p.sinks ? p.sinks + head : nullptr);
    const T *a = row_of<T>(p.a, token, head), *b = row_of<T>(p.b, token, head);
    T* out = row_of<T>(p.total, token, head);
    for (int32_t d = 0; d < p.v_head_dim; ++d) {
      from_float(merge_element(factors, lse_a, to_float(a[d]), lse_b, to_float(b[d])), out[d]);
    }
    lse_of(p.total, token, head) = factors.lse;
  }
}

}  // namespace

void merge_states(const MergeParams& p, int num_threads) {
  const int64_t rows = p.num_tokens * p.num_heads;
  const int64_t shares = std::clamp<int64_t>(rows * p.v_head_dim / kElementsPerShare, 1, num_threads);
  const auto merge = p.dtype == DType::f32   ? merge_rows<float>
                     : p.dtype == DType::f16 ? merge_rows<f16>
                                             : merge_rows<bf16>;
  std::atomic<int64_t> cursor{0};
  parallel(static_cast<int>(shares), [&](int) {
    for (int64_t share; (share = cursor.fetch_add(1, std::memory_order_relaxed)) < shares;)
      merge(p, rows * share / shares, rows * (share + 1) / shares);
  });
}

}  // namespace pagedcore::cpu
