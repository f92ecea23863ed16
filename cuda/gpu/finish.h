// From softmax states to the output: division, log-sum-exp, and the merge of an item that several blocks shared.
#pragma once

#include <cmath>
#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/softmax.h"
#include "record.h"
#include "rows.h"
#include "work.h"

namespace pagedcore::gpu {

// One column of a row's output, and with the first its log-sum-exp.
template <class T>
PAGEDCORE_DEVICE void write_column(const AttentionParams& p, const Row& row, int d, const Folded& f) {
  WithSink total{f.m, f.exact, f.rounded, 1.0f};
  if (p.sinks != nullptr) total = add_sink(f.m, f.exact, f.rounded, p.sinks[row.head]);
  T* out = static_cast<T*>(p.out) + row.token * p.out_token_stride + row.head * p.out_head_stride;
  from_float(total.w == 0.0f ? 0.0f : f.o * total.a / total.w, out[d]);
  if (p.lse != nullptr && d == 0) {
    p.lse[row.token * p.lse_token_stride + row.head * p.lse_head_stride] = log_sum_exp(total.m, total.l);
  }
}

// The rows of a tile from records of all their keys. kOthers: other blocks' of this launch.
template <class Policy, class T, bool kOthers>
PAGEDCORE_DEVICE void write_output(const AttentionParams& p, const Span& s, const Parts& parts) {
  for (int i = device::thread_id(); i < Policy::kRows * Policy::kDim; i += Policy::kThreads) {
    const int d = i % Policy::kDim;
    const Row row = row_of(p, s, i / Policy::kDim);
    if (row.valid) write_column<T>(p, row, d, fold<typename Policy::Record, kOthers>(parts, i / Policy::kDim, d));
  }
}

// Where pieces of items that several blocks share are left. At most two a block: record 0 of the item that began in an
// earlier one, record 1 of the one that begins here.
template <class Policy>
PAGEDCORE_DEVICE float* piece_record(const WorkPlan& plan, int block, int which) {
  return plan.partials + (int64_t{block} * 2 + which) * Policy::Record::kFloats;
}

// After a block has left its piece of an item: the last to arrive folds all of the item's pieces.
template <class Policy, class T>
PAGEDCORE_DEVICE void merge_if_last(const PlannedAttention& params, const Span& s, int* arrived) {
  const AttentionParams& p = params.attention;
  const WorkPlan& plan = params.plan;
  const int64_t units = plan.first_units[p.num_seqs];
  const int first = block_of_unit(units, plan.grid, s.item_begin);
  const int last = block_of_unit(units, plan.grid, s.item_end - 1);
  // Every thread's stores, then the barrier, then one thread's fence: that is what makes them visible with its count.
  device::sync_threads();
  if (device::thread_id() == 0) {
    device::fence();
    *arrived = device::atomic_add(plan.counters + first, 1);
    device::fence();
  }
  device::sync_threads();
  if (*arrived != last - first) return;
  const Parts pieces{piece_record<Policy>(plan, first, 1), piece_record<Policy>(plan, first + 1, 0),
                     2 * Policy::Record::kFloats, last - first + 1};
  write_output<Policy, T, true>(p, s, pieces);
  if (device::thread_id() == 0) plan.counters[first] = 0;  // for the next layer that uses this plan
}

// Tokens after the last sequence's, which are nobody's, see nothing.
template <class Policy, class T>
PAGEDCORE_DEVICE void clear_padding(const AttentionParams& p) {
  const int64_t first = p.query_start_loc[p.num_seqs];
  const int64_t rows = (p.num_tokens - first) * p.num_heads;
  for (int64_t i = device::block_x(); i < rows; i += device::grid_x()) {
    const int64_t token = first + i / p.num_heads, head = i % p.num_heads;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int d = device::thread_id(); d < Policy::kDim; d += Policy::kThreads) out[d] = T{};
    if (p.lse != nullptr && device::thread_id() == 0) {
      p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = -INFINITY;
    }
  }
}

}  // namespace pagedcore::gpu
