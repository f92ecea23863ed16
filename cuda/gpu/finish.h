// From softmax states to the output: division, log-sum-exp, and the pieces of items that were cut.
#pragma once

#include <cmath>
#include <cstdint>

#include "elements.h"
#include "pagedcore/device.h"
#include "pagedcore/softmax.h"
#include "record.h"
#include "rows.h"
#include "spans.h"
#include "work.h"

namespace pagedcore::gpu {

// How a row ends: its sum, of weights as the product with V saw them, and its log-sum-exp, of weights before rounding.
struct RowEnd {
  float inverse;  // of the sum
  float m, exact;
  bool empty;  // it saw no key: 0, whatever the others' keys left in its place

  PAGEDCORE_MEMBER float value(float o) const { return empty ? 0.0f : o * inverse; }
};

PAGEDCORE_DEVICE RowEnd end_of_row(const AttentionParams& p, const Row& row, float m, float rounded, float exact) {
  WithSink total{m, exact, rounded, 1.0f};
  if (p.sinks != nullptr) total = add_sink(m, exact, rounded, p.sinks[row.head]);
  return {device::divide_approx(total.a, total.w), total.m, total.l, total.w == 0.0f};
}

PAGEDCORE_DEVICE uint16_t* start_of_output(const AttentionParams& p, const Row& row) {
  return static_cast<uint16_t*>(p.out) + row.token * p.out_token_stride + row.head * p.out_head_stride;
}

PAGEDCORE_DEVICE void write_lse(const AttentionParams& p, const Row& row, const RowEnd& end) {
  if (p.lse != nullptr)
    p.lse[row.token * p.lse_token_stride + row.head * p.lse_head_stride] = log_sum_exp(end.m, end.exact);
}

// The rows of a tile from records of all their keys. kOthers: other blocks' of this launch.
template <class Policy, class T, bool kOthers>
PAGEDCORE_DEVICE void write_output(const PlannedAttention& params, const Span& s, const Parts& parts) {
  const AttentionParams& p = params.attention;
  for (int i = device::fresh_thread_id(); i < Policy::kRows * Policy::kDim; i += Policy::kThreads) {
    const int d = i % Policy::kDim;
    const Row row = row_of(params, s, i / Policy::kDim);
    if (!row.valid) continue;
    const Folded f = fold<typename Policy::Record, kOthers>(parts, i / Policy::kDim, d);
    const RowEnd end = end_of_row(p, row, f.m, f.rounded, f.exact);
    start_of_output(p, row)[d] = static_cast<uint16_t>(pack_output<T>(p, end.value(f.o), 0.0f));
    if (d == 0) write_lse(p, row, end);
  }
}

// The rows of a tile as one record, from parts that this block wrote. `to` may be the first of them.
template <class Policy>
PAGEDCORE_DEVICE void write_folded(const Parts& parts, float* to) {
  using At = typename Policy::Record;
  for (int i = device::fresh_thread_id(); i < Policy::kRows * Policy::kDim; i += Policy::kThreads) {
    const int row = i / Policy::kDim, d = i % Policy::kDim;
    to[At::output(row, d)] = fold<At, false>(parts, row, d).o;
  }
  // The sums are parts of the others' factors until here.
  device::sync_threads();
  for (int row = device::fresh_thread_id(); row < Policy::kRows; row += Policy::kThreads) {
    Folded f = fold<At, false>(parts, row, 0);
    to[At::stats(row)] = f.m;
    to[At::stats(row) + 1] = f.rounded;
    to[At::stats(row) + 2] = f.exact;
  }
}

// Where the pieces of a cut item are left, and how they become one. `kFloats`: of a record; all of a launch are spaced
// as the largest of its tiles needs.
//
//   cut where blocks meet      two records a block: of the item that begins in it and of the one that began before it
//   fixed pieces, with records one a piece, at its place in the line
//   fixed pieces, without      all of an item in one block, folded one by one into the first of the block's own two
template <int kFloats>
struct Pieces {
  const WorkPlan& plan;
  const Span& s;

  PAGEDCORE_MEMBER float* record(int64_t i) const { return plan.records + i * kFloats; }
  PAGEDCORE_MEMBER float* own(int which) const { return record(int64_t{device::block_x()} * 2 + which); }
  PAGEDCORE_MEMBER float* of_line(int unit) const { return record(2 * int64_t{plan.grid} + s.item_begin + unit); }
  PAGEDCORE_MEMBER bool lie_in_records() const { return !plan.fixed || has_records(plan, s); }

  // Where the piece that begins at `unit` belongs.
  PAGEDCORE_MEMBER float* at(int unit) const {
    if (!plan.fixed) return own(unit == 0 ? 1 : 0);
    return lie_in_records() ? of_line(unit) : own(unit == 0 ? 0 : 1);
  }
  PAGEDCORE_MEMBER Parts all(int first_block, int last_block) const {
    if (plan.fixed) return {of_line(0), of_line(1), kFloats, s.work.units};
    return {record(int64_t{first_block} * 2 + 1), record(int64_t{first_block} * 2 + 2), 2 * kFloats,
            last_block - first_block + 1};
  }
};

// After a block has left its pieces of an item: the last to arrive folds all of the item's.
template <class Policy, class T, int kFloats>
PAGEDCORE_DEVICE void merge_if_last(const PlannedAttention& params, const PlanHeader& header,
                                    const Pieces<kFloats>& pieces, int* arrived) {
  const int first = block_of(header, pieces.s.item_begin);
  const int last = last_block_of(header, pieces.s);
  // Every thread's stores, then the barrier, then one thread's fence: that is what makes them visible with its count.
  device::sync_threads();
  if (device::thread_id() == 0) {
    device::fence();
    *arrived = device::atomic_add(pieces.plan.counters + first, 1);
    device::fence();
  }
  device::sync_threads();
  if (*arrived != last - first) return;
  write_output<Policy, T, true>(params, pieces.s, pieces.all(first, last));
  if (device::thread_id() == 0) pieces.plan.counters[first] = 0;  // for the next layer that uses this plan
}

// Tokens after the last sequence's, which are nobody's, see nothing.
template <class Policy>
PAGEDCORE_DEVICE void clear_padding(const AttentionParams& p) {
  const int64_t end = p.query_start_loc[p.num_seqs];
  const int64_t first = end > 0 ? end : 0;  // no host has read it
  const int64_t rows = (p.num_tokens - first) * p.num_heads;
  for (int64_t i = device::block_x(); i < rows; i += device::grid_x()) {
    const int64_t token = first + i / p.num_heads, head = i % p.num_heads;
    uint16_t* out = static_cast<uint16_t*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int d = device::thread_id(); d < Policy::kDim; d += Policy::kThreads) out[d] = 0;
    if (p.lse != nullptr && device::thread_id() == 0) {
      p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = -INFINITY;
    }
  }
}

}  // namespace pagedcore::gpu
