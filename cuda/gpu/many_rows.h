// A tile of 64 or 128 rows: chunks of prompts, and prompts.
//
// Each warp has 16 rows, and their state in its registers from the first key to the last. The block walks over tiles of
// keys, 64 or 32 at a time, that all warps share: each warp copies its part of a tile's keys, a barrier makes it
// everybody's, and while the warps multiply the next tile is under way. Work per byte from pages: a flop a row, of
// codes two.
//
// Shared memory: the stages, the valid bits, and above head size 128 Q, or scales of codes.
//
//   | K, V of a tile | K, V of the next | ... | valid bits, a word a warp and stage; limits of a warp: 256 B | Q, where
//   not held | or scales of K and V |
#pragma once

#include <cstdint>

#include "finish.h"
#include "record.h"
#include "tiled.h"
#include "warp_keys.h"

namespace pagedcore::gpu {

template <int kDim_, class T_, int kWarps_>
struct ManyRows {
  using T = T_;
  static constexpr int kDim = kDim_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = kWarps * device::kWarpSize;
  static constexpr int kRows = kWarps * 16;
  using Record = gpu::Record<kRows, kDim>;
  // Scores of 64 keys take 32 registers a thread. Above 128 the output leaves no room for them, and shared memory none
  // for more keys.
  static constexpr int kKeys = kDim <= 128 ? 64 : 32;
  static constexpr int kStages = kDim <= 96 || kOfCodes<T> ? 3 : 2;
  static constexpr bool kQueryInShared = Operands<kDim, T>::kQueryInShared;
  using Cache = typename Operands<kDim, T>::Cache;
  using Query = typename Operands<kDim, T>::Query;
  using State = typename Operands<kDim, T>::State;
  static constexpr int kWarpKeys = kKeys / kWarps;  // that a warp copies of a tile
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Cache));
  static constexpr int kSideBytes = kKeys * kRowBytes;  // K of a tile, or V
  static constexpr int kMasksBytes = 128, kLimitsBytes = 128;
  static constexpr int kMasksAt = kStages * 2 * kSideBytes;
  static constexpr int kLimitsAt = kMasksAt + kMasksBytes;
  static constexpr int kScalesAt = kLimitsAt + kLimitsBytes;  // [stage][K, V][key]
  static constexpr int kQueryAt = kScalesAt + (kOfCodes<T> ? kStages * 2 * kKeys * 4 : 0);
  static_assert(kWarps * kStages * 4 <= kMasksBytes && kWarps * 16 <= kLimitsBytes, "room for the masks and limits");
  static constexpr int kSharedBytes = kQueryAt + (kQueryInShared ? kRows * kDim * 2 : 0);
  static_assert(kSharedBytes <= kMostSharedBytes, "shared memory of one block on sm_86 and sm_89");
  static_assert(kUnitKeys % kKeys == 0, "tiles begin where units do");
  static_assert(!kQueryInShared || Record::kFloats * 4 <= kSharedBytes, "room to finish rows in");

  // What the first and the last row of a warp see, in shared memory: keys before both or after both are skipped, keys
  // in both need no mask.
  struct alignas(16) Limits {
    int first_begin, last_begin, first_end, last_end;
  };

  State state;

  // Keys [key, end) of a span. Reached by the whole block.
  PAGEDCORE_MEMBER void attend(const PlannedAttention& params, const Span& s, int key, int end, char* shared) {
    const AttentionParams& p = params.attention;
    const device::Lane lane = device::fresh_lane();
    state.clear();
    const SeenKeys seen = seen_keys(p, s);
    const int tiles = (end - key + kKeys - 1) / kKeys;
    const auto stages = device::shared_address(shared);
    auto* masks = reinterpret_cast<uint32_t*>(shared + kMasksAt);
    auto* scales = reinterpret_cast<float*>(shared + kScalesAt);

    const int warp_row = lane.warp * 16;
    const int rows_here = rows_of_query(p, query_len_of(p, s.seq)) - s.tile * kRows;
    const bool works = warp_row < rows_here;
    auto* limits = reinterpret_cast<Limits*>(shared + kLimitsAt) + lane.warp;
    if (lane.id == 0) {
      const Row first = row_of(params, s, warp_row);
      const Row last = row_of(params, s, works && rows_here - 1 < warp_row + 15 ? rows_here - 1 : warp_row + 15);
      *limits = {begin_of(p, first), begin_of(p, last), first.end, last.end};
    }
    device::sync_warp();
    const Row rows[2] = {row_of(params, s, warp_row + lane.id / 4), row_of(params, s, warp_row + lane.id / 4 + 8)};
    Query query;
    if constexpr (kQueryInShared) {
      QueryInShared<kDim, T>::fill(params, s, kRows, kThreads, shared + kQueryAt);  // the first tile's barrier follows
      query.read_from(shared + kQueryAt, lane, warp_row);
    } else {
      query.load(p, lane, rows);
    }

    const auto place_in = [&](int tile) {
      return seen.place_of(params, key + tile * kKeys + lane.warp * kWarpKeys + lane.id % kWarpKeys);
    };
    Place place = place_in(0);  // of the tile to load next: a table entry is read a tile before it is needed
    const auto keys_in = [&](int slot, int first) {  // from key `first` of a stage on
      const auto k_rows = stages + slot * 2 * kSideBytes + first * kRowBytes;
      float* const k_scales = scales + slot * 2 * kKeys + first;
      return SharedKeys{k_rows, k_rows + kSideBytes, k_scales, k_scales + kKeys};
    };
    const auto load = [&](int tile) {
      if (tile < tiles) {
        const int slot = tile % kStages;
        const uint32_t found =
            load_keys_of<kDim, kWarpKeys, T>(p, lane, s.kv_head, place, keys_in(slot, lane.warp * kWarpKeys));
        if (lane.id == 0) masks[slot * kWarps + lane.warp] = found;
        place = place_in(tile + 1);
      }
      device::cp_async_commit();  // an empty group past the end, so that groups and tiles keep the same count
    };
#pragma unroll 1
    for (int tile = 0; tile < kStages - 1; ++tile) load(tile);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      device::cp_async_wait<kStages - 2>();
      device::sync_threads();  // what every thread copied is there for all, and all have read the tile that goes next
      load(tile + kStages - 1);
      const int tile_key = key + tile * kKeys;
      const Limits warp = *limits;
      if (!works || tile_key >= warp.last_end || tile_key + kKeys <= warp.first_begin) continue;

      const int slot = tile % kStages;
      uint32_t valid[kKeys / 32] = {};
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        valid[i * kWarpKeys / 32] |= masks[slot * kWarps + i] << i * kWarpKeys % 32;
      }
      bool all_visible = tile_key >= warp.last_begin && tile_key + kKeys <= warp.first_end;
#pragma unroll
      for (int i = 0; i < kKeys / 32; ++i) all_visible = all_visible && valid[i] == ~0u;
      attend_to<kDim, kKeys, T>(params, lane, rows, tile_key, all_visible, valid, keys_in(slot, 0), query, state);
    }
    device::cp_async_wait<0>();
    complete_sums(state);
  }

  PAGEDCORE_MEMBER void write(const PlannedAttention& params, const Span& s, char* shared) {
    if constexpr (kQueryInShared) {
      // The output leaves no registers to finish rows in.
      auto* record = reinterpret_cast<float*>(shared);
      device::sync_threads();  // the record takes the stages' place
      leave(shared, record);
      device::sync_threads();
      write_output<ManyRows, T, false>(params, s, {record, record, Record::kFloats, 1});
    } else {
      write_rows(params, s);
    }
  }

  PAGEDCORE_MEMBER void leave(char*, float* record) {
    const device::Lane lane = device::fresh_lane();
    write_record<kRows>(lane, state, lane.warp * 16, record);
  }

 private:
  PAGEDCORE_MEMBER void write_rows(const PlannedAttention& params, const Span& s) {
    const AttentionParams& p = params.attention;
    const device::Lane lane = device::fresh_lane();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Row row = row_of(params, s, lane.warp * 16 + lane.id / 4 + half * 8);
      if (!row.valid) continue;
      const RowEnd end = end_of_row(p, row, state.m[half], state.rounded[half], state.exact[half]);
      uint16_t* out = start_of_output(p, row);
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const uint32_t pair = pack_output<T>(p, end.value(state.o[i][half * 2]), end.value(state.o[i][half * 2 + 1]));
        out[State::column(lane, i, 0)] = static_cast<uint16_t>(pair);
        out[State::column(lane, i, 1)] = static_cast<uint16_t>(pair >> 16);
      }
      if (lane.id % 4 == 0) write_lse(p, row, end);
    }
  }
};

}  // namespace pagedcore::gpu
