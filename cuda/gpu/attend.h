// What a block of a tiled kernel does: the items of its share of the line, each by tiles of the size that it has.
#pragma once

#include <type_traits>

#include "finish.h"
#include "spans.h"
#include "tiled.h"

namespace pagedcore::gpu {

// One span by tiles of one size: FewRows or ManyRows. kFloats: of a record of this launch.
template <class Rows, class T, int kFloats>
PAGEDCORE_DEVICE void attend_span(const PlannedAttention& params, BlockWork& work, char* shared) {
  const WorkPlan& plan = params.plan;
  const Span& s = work.span;
  const Pieces<kFloats> pieces{plan, s};
  Rows rows;
#pragma unroll 1
  for (int unit = s.begin; unit < s.end;) {
    const int next_unit = plan.fixed ? unit + 1 : s.end;  // where the next piece begins
    const int unit_key = s.work.first_key + unit * plan.unit_keys;
    const int seen_from = s.work.begin / kUnitKeys * kUnitKeys;  // a unit of many keys may begin long before
    const int piece_end = s.work.first_key + next_unit * plan.unit_keys;
    rows.attend(params, s, unit_key > seen_from ? unit_key : seen_from, piece_end < s.work.end ? piece_end : s.work.end,
                shared);
    if (next_unit - unit == s.work.units) {
      rows.write(params, s, shared);
      return;
    }
    rows.leave(shared, pieces.at(unit));
    device::sync_threads();  // the piece is all there, and shared memory free again
    if (unit > 0 && !pieces.lie_in_records()) {
      write_folded<Rows>({pieces.own(0), pieces.own(1), kFloats, 2}, pieces.own(0));
      device::sync_threads();
    }
    unit = next_unit;
  }
  if (!is_whole(s)) {
    merge_if_last<Rows, T>(params, work.header, pieces, &work.arrived);
  } else if (pieces.lie_in_records()) {
    // Nothing is counted: the counter of this block is of an item that ends in another.
    write_output<Rows, T, false>(params, s, pieces.all(0, 0));
  } else {
    write_output<Rows, T, false>(params, s, {pieces.own(0), pieces.own(0), kFloats, 1});
  }
}

template <class Few, class Many>
struct SharedMemory {
  static constexpr int kTiles = Few::kSharedBytes > Many::kSharedBytes ? Few::kSharedBytes : Many::kSharedBytes;
  static constexpr int kBytes = kTiles + static_cast<int>(sizeof(BlockWork));
  static_assert(kTiles % alignof(BlockWork) == 0, "the block's work follows");
  static_assert(kBytes <= kMostSharedBytes, "shared memory of one block on sm_86 and sm_89");
};

// All of a block's work. Few: tiles for sequences of at most kFewRows rows, Many: for others; the same if a kernel has
// one size only.
template <class Few, class Many, class T>
PAGEDCORE_DEVICE void attend_all(const PlannedAttention& params) {
  constexpr int kFloats = Many::Record::kFloats;
  char* shared = device::shared_memory();
  auto& work = *reinterpret_cast<BlockWork*>(shared + SharedMemory<Few, Many>::kTiles);
  clear_padding<Many>(params.attention);
  if (device::thread_id() == 0) work.start(params);
  for (;;) {
    if (device::thread_id() == 0) work.next(params);
    device::sync_threads();
    if (work.more == 0) return;
    if constexpr (std::is_same_v<Few, Many>) {
      attend_span<Many, T, kFloats>(params, work, shared);
    } else if (work.span.work.rows == Few::kRows) {
      attend_span<Few, T, kFloats>(params, work, shared);
    } else {
      attend_span<Many, T, kFloats>(params, work, shared);
    }
    device::sync_threads();  // the next item's pipeline takes this one's place, and its span
  }
}

// What the host needs of an instance.
template <class Few, class Many, void (*kKernel)(PlannedAttention)>
TiledKernel tiled_kernel() {
  constexpr int kBytes = SharedMemory<Few, Many>::kBytes;
  static const device::Residency<PlannedAttention> residency(kKernel, Many::kThreads, kBytes);
  return {kKernel,           Many::kThreads, kBytes, Few::kRows, Many::kRows, int64_t{Many::Record::kFloats} * 4,
          residency.blocks()};
}

}  // namespace pagedcore::gpu
