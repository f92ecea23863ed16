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
#include "gpu.h"
#include "page_of_key.h"
#include "pagedcore/softmax.h"
#include "record.h"
#include "rows.h"
#include "tile.h"
#include "work.h"

namespace pagedcore::gpu {
namespace {

using namespace device;

constexpr int kWarpKeys = 16;  // of a stage: the inner size of P V

// Scores are in base 2. While a row's maximum grows by less than this its reference stays: weights are at most 2^8,
// which f16 holds, and the output need not be rescaled.
constexpr float kLazyGrowth = 8.0f;

template <int kDim_>
struct DecodePolicy {
  static constexpr int kDim = kDim_;
  // Above 128 the output takes 96 or 128 registers a thread: two warps, so that a block fits the 99 KB of sm_86 and
  // sm_89, and Q is read from shared memory at each step instead of being held. The stages are to be chosen by
  // measurement; three fill 96 KiB at 128.
  static constexpr int kWarps = kDim <= 128 ? 4 : 2;
  static constexpr int kStages = kDim <= 192 ? 3 : 2;
  static constexpr bool kQueryInShared = kDim > 128;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kStageKeys = kWarps * kWarpKeys;
  static constexpr int kStagesPerUnit = kUnitKeys / kStageKeys;
  static constexpr int kStageBytes = 2 * kWarpKeys * kDim * 2;  // K and V of one warp
  static constexpr int kPipelineBytes = kWarps * kStages * kStageBytes;
  static constexpr int kRecordFloats = Record<kDim>::kFloats;
  static_assert(kRecordFloats == partial_floats(kDim), "what the workspace is made for");
  static constexpr int kRecordsBytes = kWarps * kRecordFloats * 4;
  static constexpr int kMasksAt = kPipelineBytes > kRecordsBytes ? kPipelineBytes : kRecordsBytes;
  static constexpr int kQueryAt = kMasksAt + 128;
  static_assert(kWarps * kStages * 4 <= 128, "room for the masks");
  static constexpr int kSharedBytes = kQueryAt + (kQueryInShared ? kTileRows * kDim * 2 : 0);
  static_assert(kSharedBytes <= 99 * 1024, "shared memory of one block on sm_86 and sm_89");
};

// The sequence that unit `unit` belongs to: 32 probes a round.
PAGEDCORE_DEVICE int sequence_of_unit(const PlannedAttention& params, int64_t unit) {
  int low = 0, high = params.attention.num_seqs - 1;
  while (low < high) {
    const int step = (high - low + kWarpSize) / kWarpSize;
    const int probe = low + lane_id() * step;
    const int before = bit_count(ballot(probe <= high && params.plan.first_units[probe] <= unit));
    low += (before - 1) * step;
    high = low + step - 1 < high ? low + step - 1 : high;
  }
  return low;
}

PAGEDCORE_DEVICE Span span_at(const PlannedAttention& params, int64_t unit, int64_t limit) {
  const AttentionParams& p = params.attention;
  Span s;
  s.seq = sequence_of_unit(params, unit);
  const int64_t query_len = int64_t{p.query_start_loc[s.seq + 1]} - p.query_start_loc[s.seq];
  const KeyUnits keys = key_units(p, p.seq_lens[s.seq], query_len);
  const int64_t before = params.plan.first_units[s.seq];
  const int64_t item = (unit - before) / keys.count;
  const int tiles = row_tiles(p, query_len);
  s.kv_head = static_cast<int>(item / tiles);
  s.row_tile = static_cast<int>(item % tiles);
  s.item_begin = before + item * keys.count;
  s.item_end = s.item_begin + keys.count;
  s.begin = unit;
  s.end = s.item_end < limit ? s.item_end : limit;
  s.first_key = keys.first;
  return s;
}

// What one thread keeps of its warp's state over 16 rows: rows lane / 4 and lane / 4 + 8, as mma lays them out.
template <int kDim>
struct WarpState {
  float m[2];        // reference of the exponents, at most kLazyGrowth below the maximum
  float rounded[2];  // sums of weights as the product with V sees them; of this thread's columns until the end
  float exact[2];    // sums before rounding, for the log-sum-exp
  float o[kDim / 8][4];
};

// The 16 keys of one stage of one warp: page offsets found by lanes 0 to 15, rows copied by all.
template <class Policy, class T>
PAGEDCORE_DEVICE void load_stage(const AttentionParams& p, const Span& s, KeyRange seen, int key, char* stage,
                                 uint32_t* mask) {
  constexpr int kDim = Policy::kDim;
  using Rows = Tile<kDim>;
  const int lane = lane_id();
  const int mine = key + lane % kWarpKeys;
  int block = -1;
  int slot = 0;
  if (mine >= seen.begin && mine < seen.end) {
    block = block_of_key(p, s.seq, mine);
    slot = mine % p.block_size;
  }
  const uint32_t valid = ballot(block >= 0);
  if (lane == 0) *mask = valid;
  const T* k = static_cast<const T*>(p.k.data) + s.kv_head * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + s.kv_head * p.v.head_stride;
  char* k_rows = stage;
  char* v_rows = stage + kWarpKeys * Rows::kRowBytes;
  constexpr int kCopies = kWarpKeys * Rows::kChunks;
  static_assert(kCopies % kWarpSize == 0, "every lane makes as many copies");
#pragma unroll 2  // more would keep that many pairs of 64-bit addresses in registers
  for (int i = 0; i < kCopies / kWarpSize; ++i) {
    const int copy = i * kWarpSize + lane;
    const int row = copy / Rows::kChunks, chunk = copy % Rows::kChunks;
    const int row_block = shuffle(block, row);
    const int row_slot = shuffle(slot, row);
    const bool readable = row_block >= 0;
    const int64_t k_at =
        readable ? row_block * p.k.block_stride + row_slot * p.k.token_stride + chunk * kChunkElements : 0;
    const int64_t v_at =
        readable ? row_block * p.v.block_stride + row_slot * p.v.token_stride + chunk * kChunkElements : 0;
    cp_async_16(k_rows + Rows::offset(row, chunk), k + k_at, readable);
    cp_async_16(v_rows + Rows::offset(row, chunk), v + v_at, readable);
  }
}

// The tile's rows of Q as mma's fragments, a step of 16 columns at a time: held in registers, or read from shared
// memory.
template <class Policy, class T>
struct Query {
  uint32_t held[Policy::kQueryInShared ? 1 : Policy::kDim / 16][4];
  const char* tile;

  // Reached by the whole block.
  PAGEDCORE_MEMBER void load(const AttentionParams& p, const Span& s, char* shared) {
    if constexpr (Policy::kQueryInShared) {
      using Rows = Tile<Policy::kDim>;
      for (int i = thread_id(); i < kTileRows * Rows::kChunks; i += Policy::kThreads) {
        const int r = i / Rows::kChunks, chunk = i % Rows::kChunks;
        const Row row = row_of(p, s, r);
        store_16(shared + Rows::offset(r, chunk),
                 row.valid ? load_16(start_of(p, row) + chunk * kChunkElements) : Vec16{});
      }
      tile = shared;
      sync_threads();
    } else {
      const int pair = lane_id() % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Row row = row_of(p, s, lane_id() / 4 + half * 8);
        const T* from = start_of(p, row) + pair;
#pragma unroll
        for (int step = 0; step < Policy::kDim / 16; ++step) {
          held[step][half] = row.valid ? load_4(from + step * 16) : 0u;
          held[step][half + 2] = row.valid ? load_4(from + step * 16 + 8) : 0u;
        }
      }
    }
  }

  PAGEDCORE_MEMBER void fragment(int step, uint32_t (&a)[4]) const {
    if constexpr (Policy::kQueryInShared) {
      const int lane = lane_id();
      ldmatrix_x4(a, tile + Tile<Policy::kDim>::offset(lane / 8 % 2 * 8 + lane % 8, step * 2 + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[step][i];
    }
  }

 private:
  static PAGEDCORE_MEMBER const T* start_of(const AttentionParams& p, const Row& row) {
    return static_cast<const T*>(p.query) + row.token * p.query_token_stride + row.head * p.query_head_stride;
  }
};

// Scores of 16 rows by 16 keys, masked, in base 2: score[i][c] is key i * 8 + lane % 4 * 2 + c % 2 of row c / 2.
template <class Policy, class T>
PAGEDCORE_DEVICE void score_stage(const AttentionParams& p, const Row (&rows)[2], const Query<Policy, T>& query,
                                  int key, const char* stage, uint32_t valid, float (&score)[2][4]) {
  using Rows = Tile<Policy::kDim>;
  const int lane = lane_id();
#pragma unroll
  for (int i = 0; i < 4; ++i) score[0][i] = score[1][i] = 0.0f;
  const int key_row = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < Policy::kDim / 16; ++step) {
    uint32_t q[4], k[4];
    query.fragment(step, q);
    ldmatrix_x4(k, stage + Rows::offset(key_row, step * 2 + lane / 8 % 2));
    mma_m16n8k16<T>(score[0], q, k[0], k[1]);
    mma_m16n8k16<T>(score[1], q, k[2], k[3]);
  }
  const float scale = p.scale * kLog2E;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int index = i * 8 + lane % 4 * 2 + c % 2;
      const Row& row = rows[c / 2];
      const bool visible = key + index >= row.begin && key + index < row.end && (valid >> index & 1u) != 0;
      score[i][c] = visible ? score[i][c] * scale : -INFINITY;
    }
  }
}

// Folds 16 keys into the state: new references, weights, sums, O += P V.
template <class Policy, class T>
PAGEDCORE_DEVICE void fold_stage(const float (&score)[2][4], const char* v_rows, WarpState<Policy::kDim>& state) {
  using Rows = Tile<Policy::kDim>;
  constexpr int kDim = Policy::kDim;
  const int lane = lane_id();
  float top[2];
  bool grown = false;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float a = max_of(score[0][half * 2], score[0][half * 2 + 1]);
    const float b = max_of(score[1][half * 2], score[1][half * 2 + 1]);
    top[half] = reduce_max(max_of(a, b), 4);
    // Also where nothing was seen before: the reference is -inf then, and so is the difference of a first key to it.
    grown = grown || top[half] > state.m[half] + kLazyGrowth;
  }
  if (ballot(grown) != 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (top[half] > state.m[half] + kLazyGrowth) {
        const float factor = exp2_approx(state.m[half] - top[half]);
        state.m[half] = top[half];
        state.rounded[half] *= factor;
        state.exact[half] *= factor;
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          state.o[i][half * 2] *= factor;
          state.o[i][half * 2 + 1] *= factor;
        }
      }
    }
  }
  uint32_t weights[4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float reference = finite_max(state.m[half]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float low = exp2_approx(score[i][half * 2] - reference);
      const float high = exp2_approx(score[i][half * 2 + 1] - reference);
      const uint32_t pair = pack2<T>(low, high);
      weights[i * 2 + half] = pair;
      state.exact[half] += low + high;
      state.rounded[half] += to_float(T{static_cast<uint16_t>(pair)}) + to_float(T{static_cast<uint16_t>(pair >> 16)});
    }
  }
  const int row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t v[4];
    ldmatrix_x4_trans(v, v_rows + Rows::offset(row, step * 2 + lane / 16));
    mma_m16n8k16<T>(state.o[step * 2], weights, v[0], v[1]);
    mma_m16n8k16<T>(state.o[step * 2 + 1], weights, v[2], v[3]);
  }
}

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
  Query<Policy, T> query;
  query.load(p, s, shared + Policy::kQueryAt);

  const auto load = [&](int stage) {
    const int slot = stage % kStages;
    if (stage < stages) {
      load_stage<Policy, T>(p, s, seen, first_key + stage * Policy::kStageKeys, pipeline + slot * Policy::kStageBytes,
                            masks + slot);
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
    const char* rows_of_k = pipeline + slot * Policy::kStageBytes;
    float score[2][4];
    score_stage<Policy, T>(p, rows, query, first_key + stage * Policy::kStageKeys, rows_of_k, masks[slot], score);
    fold_stage<Policy, T>(score, rows_of_k + kWarpKeys * Tile<kDim>::kRowBytes, state);
  }
  cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    state.rounded[half] = reduce_sum(state.rounded[half], 4);
    state.exact[half] = reduce_sum(state.exact[half], 4);
  }
}

template <int kDim>
PAGEDCORE_DEVICE void write_record(const WarpState<kDim>& state, float* to) {
  using At = Record<kDim>;
  const int lane = lane_id();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    if (lane % 4 == 0) {
      to[At::stats(row)] = state.m[half];
      to[At::stats(row) + 1] = state.rounded[half];
      to[At::stats(row) + 2] = state.exact[half];
    }
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      to[At::output(row, i * 8 + lane % 4 * 2)] = state.o[i][half * 2];
      to[At::output(row, i * 8 + lane % 4 * 2 + 1)] = state.o[i][half * 2 + 1];
    }
  }
}

template <class Policy, class T, bool kOthers>
PAGEDCORE_DEVICE void write_output(const AttentionParams& p, const Span& s, const Parts& parts) {
  for (int i = thread_id(); i < kTileRows * Policy::kDim; i += Policy::kThreads) {
    const int d = i % Policy::kDim;
    const Row row = row_of(p, s, i / Policy::kDim);
    if (!row.valid) continue;
    const Folded f = fold<Policy::kDim, kOthers>(parts, i / Policy::kDim, d);
    T* out = static_cast<T*>(p.out) + row.token * p.out_token_stride + row.head * p.out_head_stride;
    from_float(f.rounded == 0.0f ? 0.0f : f.o / f.rounded, out[d]);
    if (p.lse != nullptr && d == 0) {
      p.lse[row.token * p.lse_token_stride + row.head * p.lse_head_stride] = log_sum_exp(f.m, f.exact);
    }
  }
}

template <class Policy>
PAGEDCORE_DEVICE void write_partial(const Parts& parts, float* to) {
  using At = Record<Policy::kDim>;
  for (int i = thread_id(); i < kTileRows * Policy::kDim; i += Policy::kThreads) {
    const int row = i / Policy::kDim, d = i % Policy::kDim;
    const Folded f = fold<Policy::kDim, false>(parts, row, d);
    to[At::output(row, d)] = f.o;
    if (d == 0) {
      to[At::stats(row)] = f.m;
      to[At::stats(row) + 1] = f.rounded;
      to[At::stats(row) + 2] = f.exact;
    }
  }
}

// A span that is not all of its item: leaves its state, and folds all of the item's pieces if it is the last to arrive.
template <class Policy, class T>
PAGEDCORE_DEVICE void finish_piece(const PlannedAttention& params, const Span& s, const Parts& parts, int* arrived) {
  const AttentionParams& p = params.attention;
  const WorkPlan& plan = params.plan;
  const int64_t units = plan.first_units[p.num_seqs];
  const int first = block_of_unit(units, plan.grid, s.item_begin);
  const int last = block_of_unit(units, plan.grid, s.item_end - 1);
  // At most two pieces a block: record 0 of the item that began in an earlier one, record 1 of the one that begins
  // here.
  const auto record = [&](int block, int which) {
    return plan.partials + (int64_t{block} * 2 + which) * Policy::kRecordFloats;
  };
  write_partial<Policy>(parts, record(block_x(), s.begin == s.item_begin ? 1 : 0));
  // Every thread's stores, then the barrier, then one thread's fence: that is what makes them visible with its count.
  sync_threads();
  if (thread_id() == 0) {
    fence();
    *arrived = atomic_add(plan.counters + first, 1);
    fence();
  }
  sync_threads();
  if (*arrived != last - first) return;
  write_output<Policy, T, true>(p, s,
                                {record(first, 1), record(first + 1, 0), 2 * Policy::kRecordFloats, last - first + 1});
  if (thread_id() == 0) plan.counters[first] = 0;  // for the next layer that uses this plan
}

// Tokens after the last sequence's, which are nobody's, see nothing.
template <class Policy, class T>
PAGEDCORE_DEVICE void clear_padding(const AttentionParams& p) {
  const int64_t first = p.query_start_loc[p.num_seqs];
  const int64_t rows = (p.num_tokens - first) * p.num_heads;
  for (int64_t i = block_x(); i < rows; i += grid_x()) {
    const int64_t token = first + i / p.num_heads, head = i % p.num_heads;
    T* out = static_cast<T*>(p.out) + token * p.out_token_stride + head * p.out_head_stride;
    for (int d = thread_id(); d < Policy::kDim; d += Policy::kThreads) out[d] = T{};
    if (p.lse != nullptr && thread_id() == 0) p.lse[token * p.lse_token_stride + head * p.lse_head_stride] = -INFINITY;
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
    WarpState<Policy::kDim> state{};
    state.m[0] = state.m[1] = -INFINITY;
    attend_span<Policy, T>(p, s, shared, state);
    sync_threads();  // the records take the place of the pipelines
    write_record<Policy::kDim>(state, records + warp_id() * Policy::kRecordFloats);
    sync_threads();
    const Parts parts{records, records + Policy::kRecordFloats, Policy::kRecordFloats, Policy::kWarps};
    if (s.begin == s.item_begin && s.end == s.item_end) {
      write_output<Policy, T, false>(p, s, parts);
    } else {
      finish_piece<Policy, T>(params, s, parts, arrived);
    }
    sync_threads();  // the pipelines take the place of the records
    unit = s.end;
  }
}

template <int kDim, class T>
void run(const AttentionParams& p, const WorkPlan& plan, Stream stream) {
  using Policy = DecodePolicy<kDim>;
  prepare(decode_kernel<Policy, T>, Policy::kSharedBytes);
  launch(decode_kernel<Policy, T>, plan.grid, 1, 1, Policy::kThreads, Policy::kSharedBytes, stream,
         PlannedAttention{p, plan});
}

template <class T>
void run(const AttentionParams& p, const WorkPlan& plan, Stream stream) {
  switch (p.head_dim) {
    case 64:
      return run<64, T>(p, plan, stream);
    case 80:
      return run<80, T>(p, plan, stream);
    case 96:
      return run<96, T>(p, plan, stream);
    case 112:
      return run<112, T>(p, plan, stream);
    case 128:
      return run<128, T>(p, plan, stream);
    case 192:
      return run<192, T>(p, plan, stream);
    case 256:
      return run<256, T>(p, plan, stream);
    default:
      throw std::invalid_argument("head_dim " + std::to_string(p.head_dim) + ": see why_not_tiled");
  }
}

bool on_16_bytes(const void* data, int64_t token_stride, int64_t head_stride, int64_t block_stride = 0) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(token_stride * 2) |
          static_cast<uintptr_t>(head_stride * 2) | static_cast<uintptr_t>(block_stride * 2)) %
             kChunkBytes ==
         0;
}

}  // namespace

const char* why_not_tiled(const AttentionParams& p) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "the dtype is not float16 or bfloat16";
  if (p.softcap != 0.0f || p.alibi_slopes || p.sinks) return "it has a soft cap, ALiBi or sinks";
  if (p.head_dim != p.v_head_dim) return "K and V have different head sizes";
  const int dims[] = {64, 80, 96, 112, 128, 192, 256};
  bool known = false;
  for (const int dim : dims) known = known || p.head_dim == dim;
  if (!known) return "the head size is not 64, 80, 96, 112, 128, 192 or 256";
  if (!on_16_bytes(p.query, p.query_token_stride, p.query_head_stride)) return "rows of query do not start on 16 bytes";
  if (!on_16_bytes(p.k.data, p.k.token_stride, p.k.head_stride, p.k.block_stride)) {
    return "rows of k_cache do not start on 16 bytes";
  }
  if (!on_16_bytes(p.v.data, p.v.token_stride, p.v.head_stride, p.v.block_stride)) {
    return "rows of v_cache do not start on 16 bytes";
  }
  return nullptr;
}

void attention_decode(const AttentionParams& p, const WorkPlan& plan, Stream stream) {
  if (p.num_tokens == 0) return;
  if (p.dtype == DType::f16) return run<f16>(p, plan, stream);
  run<bf16>(p, plan, stream);
}

}  // namespace pagedcore::gpu
