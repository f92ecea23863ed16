// Decode attention over paged KV on tensor cores: tiles of 16 rows (R16).
//
// Computes softmax(scale * Q K^T + mask) V for a few query tokens a sequence. The query heads that share a KV head are
// packed into the rows of one tile, so K and V are read once per group: G flop a byte in 16 bits.
//
// Cut: a fixed grid of blocks shares all work evenly (work.h). A block takes its spans one after another; within a
// span, each of its four warps takes 16 keys of each stage of 64, with a pipeline of cp.async stages, a running
// maximum, sum and output of its own, and no barrier of the block until the span ends. Then the four states are merged
// through shared memory. Why 16 rows by tokens split over warps: a decode row tile has no more rows than that, wgmma's
// 64 would be 3/4 padding, and the output of 16 rows fits a warp's registers (64 of them at head size 128).
//
// Bytes: 4 * head_dim a key and KV head; nothing is read twice but page ids and the query.
// Shared memory: kStages * 4 warps * 16 keys * 4 * head_dim bytes (96 KiB at head size 128: two blocks an SM on sm_90),
// reused for the merge, and the pages' valid bits.
//
// Chosen when rows per (sequence, KV head) are few, dtype is f16 or bf16, K and V have one head size of 64, 80, 96,
// 112, 128, 192 or 256, and every row of Q, K and V starts on 16 bytes.
#include "finish.h"
#include "load.h"
#include "query.h"
#include "record.h"
#include "rows.h"
#include "scores.h"
#include "spans.h"
#include "state.h"
#include "tiled.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kWarpKeys = 16;  // of a stage: the inner size of P V

template <int kDim_, class T>
struct DecodePolicy {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = 16;
  using Record = gpu::Record<kRows, kDim>;
  // Above 128 the output takes 96 or 128 registers a thread: two warps, so that a block fits the 99 KB of sm_86 and
  // sm_89, and Q is read from shared memory at each step instead of being held. The stages are to be chosen by
  // measurement; three fill 96 KiB at 128.
  static constexpr int kWarps = kDim <= 128 ? 4 : 2;
  static constexpr int kStages = kDim <= 192 ? 3 : 2;
  static constexpr bool kQueryInShared = kDim > 128;
  using Query = std::conditional_t<kQueryInShared, QueryInShared<kDim, T>, QueryInRegisters<kDim, T>>;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStageKeys = kWarps * kWarpKeys;
  static constexpr int kStagesPerUnit = kUnitKeys / kStageKeys;
  static constexpr int kStageBytes = 2 * kWarpKeys * kDim * 2;  // K and V of one warp
  static constexpr int kPipelineBytes = kWarps * kStages * kStageBytes;
  static constexpr int kRecordsBytes = kWarps * Record::kFloats * 4;
  static constexpr int kMasksAt = kPipelineBytes > kRecordsBytes ? kPipelineBytes : kRecordsBytes;
  static constexpr int kQueryAt = kMasksAt + 128;
  static_assert(kWarps * kStages * 4 <= 128, "room for the masks");
  static constexpr int kSharedBytes = kQueryAt + (kQueryInShared ? kRows * kDim * 2 : 0);
  static_assert(kSharedBytes <= kMostSharedBytes, "shared memory of one block on sm_86 and sm_89");
};

// One warp's share of a span: 16 keys of every stage.
template <class Policy, class T>
PAGEDCORE_DEVICE void attend_span(const AttentionParams& p, const Span& s, char* shared,
                                  WarpState<Policy::kDim>& state) {
  constexpr int kDim = Policy::kDim;
  constexpr int kStages = Policy::kStages;
  const int query_len = p.query_start_loc[s.seq + 1] - p.query_start_loc[s.seq];
  const KeyRange seen = visible_keys(p, p.seq_lens[s.seq], query_len, 0, query_len);
  const int stages = static_cast<int>(s.end - s.begin) * Policy::kStagesPerUnit;
  const int first_key = static_cast<int>(s.first_key + (s.begin - s.item_begin) * kUnitKeys) + warp_id() * kWarpKeys;

  char* pipeline = shared + warp_id() * kStages * Policy::kStageBytes;
  auto* masks = reinterpret_cast<uint32_t*>(shared + Policy::kMasksAt) + warp_id() * kStages;
  const Row rows[2] = {row_of(p, s, lane_id() / 4), row_of(p, s, lane_id() / 4 + 8)};
  typename Policy::Query query;
  if constexpr (Policy::kQueryInShared) {
    query = {shared + Policy::kQueryAt, 0};
    query.fill(p, s, Policy::kRows, Policy::kThreads, shared + Policy::kQueryAt);
    sync_threads();
  } else {
    query.load(p, rows);
  }

  const auto load = [&](int stage) {
    const int slot = stage % kStages;
    if (stage < stages) {
      char* k_rows = pipeline + slot * Policy::kStageBytes;
      const int key = first_key + stage * Policy::kStageKeys + lane_id() % kWarpKeys;
      const uint32_t found = load_keys<kDim, kWarpKeys, T>(p, s.kv_head, place_of_key(p, s.seq, seen, key), k_rows,
                                                           k_rows + kWarpKeys * Tile<kDim>::kRowBytes);
      if (lane_id() == 0) masks[slot] = found;
    }
    cp_async_commit();  // an empty group past the end, so that groups and stages keep the same count
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  for (int stage = 0; stage < stages; ++stage) {
    cp_async_wait<kStages - 2>();
    sync_warp();  // what every lane copied is there for all, and all have read the stage whose place is filled next
    load(stage + kStages - 1);
    const int slot = stage % kStages;
    const char* k_rows = pipeline + slot * Policy::kStageBytes;
    const uint32_t valid[1] = {masks[slot]};
    float score[kWarpKeys / 8][4];
    multiply_keys<kWarpKeys>(query, k_rows, score);
    finish_scores<kWarpKeys>(p, rows, first_key + stage * Policy::kStageKeys, valid, score);
    fold_keys<kDim, kWarpKeys, T>(score, k_rows + kWarpKeys * Tile<kDim>::kRowBytes, state);
  }
  cp_async_wait<0>();
  complete_sums(state);
}

// A span that is not all of its item: the warps' states as one record in the workspace.
template <class Policy>
PAGEDCORE_DEVICE void write_piece(const Parts& parts, float* to) {
  using At = typename Policy::Record;
  for (int i = thread_id(); i < Policy::kRows * Policy::kDim; i += Policy::kThreads) {
    const int row = i / Policy::kDim, d = i % Policy::kDim;
    const Folded f = fold<At, false>(parts, row, d);
    to[At::output(row, d)] = f.o;
    if (d == 0) {
      to[At::stats(row)] = f.m;
      to[At::stats(row) + 1] = f.rounded;
      to[At::stats(row) + 2] = f.exact;
    }
  }
}

template <class Policy, class T>
PAGEDCORE_KERNEL(Policy::kThreads, Policy::kDim <= 128 ? 2 : 1)
decode_kernel(const PlannedAttention params) {
  const AttentionParams& p = params.attention;
  char* shared = shared_memory();
  auto* arrived = reinterpret_cast<int*>(shared + Policy::kMasksAt);  // once the pipeline is empty
  auto* records = reinterpret_cast<float*>(shared);
  clear_padding<Policy, T>(p);

  const int64_t units = params.plan.first_units[p.num_seqs];
  const int64_t limit = first_unit(units, params.plan.grid, block_x() + 1);
  for (int64_t unit = first_unit(units, params.plan.grid, block_x()); unit < limit;) {
    const Span s = span_at(params, unit, limit);
    WarpState<Policy::kDim> state = empty_state<Policy::kDim>();
    attend_span<Policy, T>(p, s, shared, state);
    sync_threads();  // the records take the place of the pipelines
    write_record<Policy::kRows>(state, 0, records + warp_id() * Policy::Record::kFloats);
    sync_threads();
    const Parts parts{records, records + Policy::Record::kFloats, Policy::Record::kFloats, Policy::kWarps};
    if (s.begin == s.item_begin && s.end == s.item_end) {
      write_output<Policy, T, false>(p, s, parts);
    } else {
      write_piece<Policy>(parts, piece_record<Policy>(params.plan, block_x(), s.begin == s.item_begin ? 1 : 0));
      merge_if_last<Policy, T>(params, s, arrived);
    }
    sync_threads();  // the pipelines take the place of the records
    unit = s.end;
  }
}

struct Decode {
  template <int kDim, class T>
  static TiledKernel instance() {
    using Policy = DecodePolicy<kDim, T>;
    return tiled_kernel<Policy, decode_kernel<Policy, T>>();
  }
};

}  // namespace

TiledKernel decode_kernel_for(const AttentionParams& p) { return instance_for<Decode>(p); }

}  // namespace pagedcore::gpu
