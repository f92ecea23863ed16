// A tile of 16 rows: decode, and a few query tokens a sequence.
//
// The query heads that share a KV head are packed into the rows of one tile, so K and V are read once per group: G flop
// a byte in 16 bits. Each warp takes 16 keys of each stage, with a pipeline of cp.async stages, a running maximum, sum
// and output of its own, and no barrier of the block until the keys end. Then the states are merged through shared
// memory. Why 16 rows, and tokens split over warps: a decode row tile has no more rows than that, wgmma's 64 would be
// 3/4 padding, and the output of 16 rows fits a warp's registers (64 of them at head size 128).
//
// Shared memory, with four warps (each its own K, V and stages) and three stages:
//
//   | warp 0: K V | K V | K V | warp 1: ... | warp 3: ... | valid bits, 128 B | Q, where not held in registers |
//                                                                             | or scales of K and V, of codes |
//   | records: one a warp, when the pipelines are empty   |
#pragma once

#include <cstdint>

#include "finish.h"
#include "record.h"
#include "tiled.h"
#include "warp_keys.h"

namespace pagedcore::gpu {

template <int kDim_, class T, int kThreads_>
struct FewRows {
  static constexpr int kDim = kDim_;
  static constexpr int kRows = 16;
  static constexpr int kThreads = kThreads_;  // of the block; those past kWarps help to write only
  using Record = gpu::Record<kRows, kDim>;
  // Above 128 two warps, so that a block fits the 99 KB of sm_86 and sm_89. The stages are to be chosen by measurement;
  // three fill 96 KiB at 128, and four of codes 64.
  static constexpr int kWarps = kDim <= 128 ? 4 : 2;
  static constexpr int kStages = kOfCodes<T> ? 4 : kDim <= 192 ? 3 : 2;
  static constexpr bool kQueryInShared = Operands<kDim, T>::kQueryInShared;
  using Cache = typename Operands<kDim, T>::Cache;
  using Query = typename Operands<kDim, T>::Query;
  using State = typename Operands<kDim, T>::State;
  static constexpr int kWarpKeys = 16;  // of a stage: the inner size of P V
  static constexpr int kStageKeys = kWarps * kWarpKeys;
  static constexpr int kSideBytes = kWarpKeys * kDim * static_cast<int>(sizeof(Cache));  // K of one warp, or V
  static constexpr int kStageBytes = 2 * kSideBytes;
  static constexpr int kPipelineBytes = kWarps * kStages * kStageBytes;
  static constexpr int kRecordsBytes = kWarps * Record::kFloats * 4;
  static constexpr int kMasksBytes = 128;
  static constexpr int kMasksAt = kPipelineBytes > kRecordsBytes ? kPipelineBytes : kRecordsBytes;
  static constexpr int kScalesAt = kMasksAt + kMasksBytes;  // [warp][stage][K, V][key]
  static constexpr int kQueryAt = kScalesAt + (kOfCodes<T> ? kWarps * kStages * 2 * kWarpKeys * 4 : 0);
  static_assert(kWarps * kStages * 4 <= kMasksBytes, "room for the masks");
  static constexpr int kSharedBytes = kQueryAt + (kQueryInShared ? kRows * kDim * 2 : 0);
  static_assert(kSharedBytes <= kMostSharedBytes, "shared memory of one block on sm_86 and sm_89");
  static_assert(kThreads >= kWarps * device::kWarpSize, "a warp for each share of the keys");
  static_assert(kUnitKeys % kStageKeys == 0, "stages begin where units do");

  // Keys [key, end) of a span; leaves the warps' records in shared memory. Reached by the whole block.
  static PAGEDCORE_MEMBER void attend(const PlannedAttention& params, const Span& s, int key, int end, char* shared) {
    State state;
    state.clear();
    if constexpr (kQueryInShared) {
      QueryInShared<kDim, T>::fill(params, s, kRows, kThreads, shared + kQueryAt);
      device::sync_threads();
    }
    const device::Lane lane = device::fresh_lane();
    const bool works = lane.warp < kWarps;
    if (works) attend_keys(params, s, key, end, shared, state);
    device::sync_threads();  // the records take the place of the pipelines
    if (works) write_record<kRows>(lane, state, 0, reinterpret_cast<float*>(shared) + lane.warp * Record::kFloats);
    device::sync_threads();
  }

  static PAGEDCORE_MEMBER void write(const PlannedAttention& params, const Span& s, char* shared) {
    write_output<FewRows, T, false>(params, s, warps_records(shared));
  }

  static PAGEDCORE_MEMBER void leave(char* shared, float* record) {
    write_folded<FewRows>(warps_records(shared), record);
  }

 private:
  static PAGEDCORE_MEMBER Parts warps_records(char* shared) {
    auto* records = reinterpret_cast<float*>(shared);
    return {records, records + Record::kFloats, Record::kFloats, kWarps};
  }

  // One warp's share: 16 keys of every stage.
  static PAGEDCORE_MEMBER void attend_keys(const PlannedAttention& params, const Span& s, int key, int end,
                                           char* shared, State& state) {
    const AttentionParams& p = params.attention;
    const device::Lane lane = device::fresh_lane();
    const SeenKeys seen = seen_keys(p, s);
    const int stages = (end - key + kStageKeys - 1) / kStageKeys;
    const int first_key = key + lane.warp * kWarpKeys;

    const auto pipeline = device::shared_address(shared) + lane.warp * kStages * kStageBytes;
    auto* masks = reinterpret_cast<uint32_t*>(shared + kMasksAt) + lane.warp * kStages;
    auto* scales = reinterpret_cast<float*>(shared + kScalesAt) + lane.warp * kStages * 2 * kWarpKeys;
    const Row rows[2] = {row_of(params, s, lane.id / 4), row_of(params, s, lane.id / 4 + 8)};
    Query query;
    if constexpr (kQueryInShared) {
      query.read_from(shared + kQueryAt, lane, 0);
    } else {
      query.load(p, lane, rows);
    }

    const auto place_in = [&](int stage) {
      return seen.place_of(params, first_key + stage * kStageKeys + lane.id % kWarpKeys);
    };
    Place place = place_in(0);  // of the stage to load next: a table entry is read a stage before it is needed
    const auto keys_in = [&](int slot) {
      const auto k_rows = pipeline + slot * kStageBytes;
      float* const k_scales = scales + slot * 2 * kWarpKeys;
      return SharedKeys{k_rows, k_rows + kSideBytes, k_scales, k_scales + kWarpKeys};
    };
    const auto load = [&](int stage) {
      const int slot = stage % kStages;
      if (stage < stages) {
        const uint32_t found = load_keys_of<kDim, kWarpKeys, T>(p, lane, s.kv_head, place, keys_in(slot));
        if (lane.id == 0) masks[slot] = found;
        place = place_in(stage + 1);
      }
      device::cp_async_commit();  // an empty group past the end, so that groups and stages keep the same count
    };
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
    for (int stage = 0; stage < stages; ++stage) {
      device::cp_async_wait<kStages - 2>();
      device::sync_warp();  // what every lane copied is there for all, and all have read the stage that is filled next
      load(stage + kStages - 1);
      const int slot = stage % kStages;
      const uint32_t valid[1] = {masks[slot]};
      attend_to<kDim, kWarpKeys, T>(params, lane, rows, first_key + stage * kStageKeys, false, valid, keys_in(slot),
                                    query, state);
    }
    device::cp_async_wait<0>();
    complete_sums(state);
  }
};

}  // namespace pagedcore::gpu
