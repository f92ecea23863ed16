// Attention over paged KV, the plain way: every dtype, head size up to 256, V narrower or wider than K, any stride, any
// block size, causal or not, sliding window, soft cap, ALiBi, sinks, and a cache of codes. It is the fallback of the
// tiled kernels and their oracle on the device.
//
// Cut: a warp has one row, that is one query token of one head; the grid strides over all rows. A row's keys go by in
// chunks of 32, a key per lane: the lane makes the whole dot product, the warp agrees on the chunk's maximum, and then
// each lane holds some of the output's columns and adds all 32 rows of V to them.
// Bytes: K and V of a sequence are read once per query row, with no reuse between the heads of a group. K is read by
// rows, a lane each, so an access of the warp touches 32 cache lines.
// Shared memory: head_dim floats of Q a warp.
#include <type_traits>

#include "gpu.h"
#include "grid.h"
#include "page_of_key.h"
#include "pagedcore/device.h"
#include "pagedcore/mask.h"
#include "pagedcore/score.h"
#include "pagedcore/softmax.h"
#include "report.h"
#include "sequences.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kColumns = kMaxHeadDim / kWarpSize;  // of the output, per lane

// The sequence that query token `token` belongs to: the last one that starts at or before it and is not empty.
PAGEDCORE_DEVICE int sequence_of(const AttentionParams& p, int64_t token) {
  int low = 0, high = p.num_seqs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.query_start_loc[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The scale of a key's row of codes.
PAGEDCORE_DEVICE float scale_at(const Scales& scales, int64_t block, int kv_head, int slot) {
  if (scales.data == nullptr) return 1.0f;
  return scales.data[block * scales.block_stride + kv_head * scales.head_stride + slot * scales.token_stride];
}

// T: of query and output; C: of the cache, T or a code.
template <class T, class C>
PAGEDCORE_DEVICE void attend_row(const AttentionParams& p, int64_t token, int head, float* q) {
  const int lane = lane_id();
  const bool padding = p.num_seqs == 0 || token >= p.query_start_loc[p.num_seqs];  // nobody's: it sees nothing
  const int seq = padding ? 0 : sequence_of(p, token);
  KeyRange keys{0, 0};
  int64_t position = 0;
  if (!padding) {
    const int64_t start = p.query_start_loc[seq];
    const int64_t query_len = p.query_start_loc[seq + 1] - start;
    keys = visible_keys(p, p.seq_lens[seq], query_len, token - start);
    position = query_position(p.seq_lens[seq], query_len, token - start);
  }
  const int kv_head = head / (p.num_heads / p.num_kv_heads);
  const TableRow table = padding ? TableRow{} : table_row_of(p, seq);
  // A length that is no length must not hold up the GPU: past the table there are no keys.
  const int64_t table_end = int64_t{table.count} * p.block_size;
  if (keys.end > table_end) {
    report(p.faults, DeviceFault::length);
    keys.end = table_end;
  }

  const T* query = static_cast<const T*>(p.query) + token * p.query_token_stride + head * p.query_head_stride;
  for (int d = lane; d < p.head_dim; d += kWarpSize) q[d] = to_float(query[d]);
  sync_warp();

  const ScoreRule rule = score_rule(p);
  const float slope = p.alibi_slopes != nullptr ? alibi_slope(p, head) : 0.0f;
  float m = -INFINITY, l = 0.0f;
  float o[kColumns] = {};
  for (int64_t first = keys.begin; first < keys.end; first += kWarpSize) {
    const int64_t key = first + lane;
    float score = -INFINITY;
    int block = -1;
    int slot = 0;
    if (key < keys.end) {
      block = block_at(p, table, static_cast<int>(key / p.block_size));
      slot = static_cast<int>(key % p.block_size);
    }
    if (block >= 0) {
      const C* k = static_cast<const C*>(p.k.data) + block * p.k.block_stride + kv_head * p.k.head_stride +
                   slot * p.k.token_stride;
      score = 0.0f;
      for (int d = 0; d < p.head_dim; ++d) score = fmaf(q[d], to_float(k[d]), score);
      if constexpr (std::is_same_v<C, e4m3>) score *= scale_at(p.k_scale, block, kv_head, slot);
      score *= rule.factor;
      if (rule.cap != 0.0f) score = rule.cap * tanh_of(score);
      if (slope != 0.0f) score = fmaf(-slope, fabsf(static_cast<float>(position - key)), score);
    }
    const float m_new = max_of(m, reduce_max(score));
    const float reference = finite_max(m_new);
    float weight = exp2_approx(score - reference);
    const float rescale = exp2_approx(m - reference);
    l = l * rescale + reduce_sum(weight);
    m = m_new;
    if constexpr (std::is_same_v<C, e4m3>) {
      if (block >= 0) weight *= scale_at(p.v_scale, block, kv_head, slot);
    }
    for (int i = 0; i < kColumns; ++i) o[i] *= rescale;

    const int count = static_cast<int>(keys.end - first < kWarpSize ? keys.end - first : kWarpSize);
    for (int j = 0; j < count; ++j) {
      const int key_block = shuffle(block, j);
      const int key_slot = shuffle(slot, j);
      const float key_weight = shuffle(weight, j);
      if (key_block < 0) continue;
      const C* v = static_cast<const C*>(p.v.data) + key_block * p.v.block_stride + kv_head * p.v.head_stride +
                   key_slot * p.v.token_stride;
      for (int i = 0; i < kColumns; ++i) {
        const int d = i * kWarpSize + lane;
        if (d < p.v_head_dim) o[i] = fmaf(key_weight, to_float(v[d]), o[i]);
      }
    }
  }

  WithSink total{m, l, l, 1.0f};
  if (p.sinks != nullptr) total = add_sink(m, l, l, p.sinks[head]);
  T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
  for (int i = 0; i < kColumns; ++i) {
    const int d = i * kWarpSize + lane;
    if (d < p.v_head_dim) from_float(total.w == 0.0f ? 0.0f : o[i] * total.a / total.w, out[d]);
  }
  if (p.lse != nullptr && lane == 0)
    p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = log_sum_exp(total.m, total.l);
  sync_warp();  // q is written again
}

template <class T, class C>
PAGEDCORE_KERNEL(kThreads, 1)
attention_kernel(const AttentionParams p) {
  check_sequences(p, int64_t{block_x()} * kThreads + thread_id(), int64_t{grid_x()} * kThreads);
  float* q = reinterpret_cast<float*>(shared_memory()) + warp_id() * p.head_dim;
  const int64_t rows = p.num_tokens * p.num_heads;
  for (int64_t row = int64_t{block_x()} * kWarps + warp_id(); row < rows; row += int64_t{grid_x()} * kWarps) {
    attend_row<T, C>(p, row / p.num_heads, static_cast<int>(row % p.num_heads), q);
  }
}

template <class T, class C>
void run(const AttentionParams& p, Stream stream) {
  const int64_t blocks = (p.num_tokens * p.num_heads + kWarps - 1) / kWarps;
  launch(attention_kernel<T, C>, grid_for(blocks), 1, 1, kThreads,
         static_cast<size_t>(kWarps * p.head_dim) * sizeof(float), stream, p);
}

template <class T>
void run(const AttentionParams& p, Stream stream) {
  if (p.kv_dtype == DType::e4m3) return run<T, e4m3>(p, stream);
  run<T, T>(p, stream);
}

}  // namespace

void load_attention_generic() {
  load(attention_kernel<float, float>);
  load(attention_kernel<f16, f16>);
  load(attention_kernel<bf16, bf16>);
  load(attention_kernel<float, e4m3>);
  load(attention_kernel<f16, e4m3>);
  load(attention_kernel<bf16, e4m3>);
}

void attention_generic(const AttentionParams& p, Stream stream) {
  if (p.num_tokens == 0) return;
  switch (p.dtype) {
    case DType::f32:
      return run<float>(p, stream);
    case DType::f16:
      return run<f16>(p, stream);
    case DType::bf16:
      return run<bf16>(p, stream);
    default:
      throw std::invalid_argument("attention over a dtype that is no float");
  }
}

}  // namespace pagedcore::gpu
