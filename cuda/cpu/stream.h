// The streaming kernel: few query rows per KV head (decode, short speculative chunks), so the bytes of the cache
// decide.
//
// One sweep over the tokens; per tile of kTile tokens all KV heads of the item, so that a page in block order is read
// from end to end; per head all query rows at once, so that each byte of K and V is loaded once. Nothing is packed: K
// rows meet the query rows as dot products (R rows x C tokens in registers, then reduce_each), V rows are added under
// broadcast weights.
//
// Bytes moved per tile and head: kTile * (head_dim + v_head_dim) * element size, prefetched one (tile, head) ahead, K
// while K is read and V while V is.
#pragma once

#include "dot.h"
#include "tile.h"
#include "values.h"

#ifdef PAGEDCORE_DPBF16
#include "bf16_pairs.h"
#endif

namespace pagedcore::cpu::PAGEDCORE_ISA {

// The first n < kChunk elements; the rest are zero.
template <class T>
PAGEDCORE_FN void load_partial_operand(const T* p, int n, DotOperand<T>& x) {
  T whole[kChunk] = {};
  __builtin_memcpy(whole, p, static_cast<unsigned long>(n) * sizeof(T));
  load_operand(whole, x);
}

// One query row as the product with keys of type T takes it.
template <class T>
PAGEDCORE_FN void stage_query(const AttentionParams& p, int64_t token, int64_t head, float* staged) {
  if constexpr (kQuantised<T>) {
    stage_in_order(p, token, head, staged);
  } else {
    const T* row = query_row<T>(p, token, head);
    for (int d = 0; d < p.head_dim; d += kChunk) {
      DotOperand<T> x;
      if (p.head_dim - d >= kChunk) {
        load_operand(row + d, x);
      } else {
        load_partial_operand(row + d, p.head_dim - d, x);
      }
      stage_operand(staged + d, x);
    }
  }
}

// scores[r * kTile + t] = q[r] . K[t] for R rows, and all tokens up to a register tile past `count`.
template <class T, int R>
PAGEDCORE_FN void stream_scores(const float* q, int64_t q_stride, const T* k, const TileOffsets& tile, int dim,
                                float* scores, const Ahead<T>& ahead) {
  constexpr int kPacked = R == 3 ? 4 : R;
  constexpr int kCols = kLanes > kPacked ? kLanes / kPacked : 1;
  const int whole = dim / kChunk * kChunk;
  for (int t = 0; t < tile.count; t += kCols) {
    const T* row[kCols];
    for (int c = 0; c < kCols; ++c) {
      row[c] = k + tile.k[t + c];
      prefetch_row(ahead, t + c, 0, dim);
    }
    Vec sums[kLanes];
    for (int i = 0; i < kLanes; ++i) sums[i] = zero();
    for (int d = 0; d < whole; d += kChunk) {
      DotOperand<T> keys[kCols];
      for (int c = 0; c < kCols; ++c) load_operand(row[c] + d, keys[c]);
      for (int r = 0; r < R; ++r) {
        DotOperand<T> query;
        load_staged(q + r * q_stride + d, query);
        for (int c = 0; c < kCols; ++c) sums[r * kCols + c] = multiply_add(query, keys[c], sums[r * kCols + c]);
      }
    }
    if (whole < dim) {
      DotOperand<T> keys[kCols];
      for (int c = 0; c < kCols; ++c) load_partial_operand(row[c] + whole, dim - whole, keys[c]);
      for (int r = 0; r < R; ++r) {
        DotOperand<T> query;
        load_staged(q + r * q_stride + whole, query);
        for (int c = 0; c < kCols; ++c) sums[r * kCols + c] = multiply_add(query, keys[c], sums[r * kCols + c]);
      }
    }
    float dots[kLanes];
    store(dots, reduce_each(sums));
    for (int r = 0; r < R; ++r) __builtin_memcpy(scores + r * kTile + t, dots + r * kCols, kCols * sizeof(float));
  }
}

// What the mask and ALiBi ask of a query row.
struct RowPlace {
  KeyRange visible;
  int64_t position;
};

// One group of R rows against one head's tile: scores, softmax step, values. D is head_dim and v_head_dim where they
// are equal and common, so that loops over a row are unrolled; 0: as the arguments say.
template <class T, int R, int D>
static void stream_group(const float* q, int64_t q_stride, const T* k, const T* v, const TileOffsets& tile,
                         const TileScales& scales, int64_t tile_begin, const RowPlace* rows, int any_dim, int any_v_dim,
                         const Scoring& scoring, const float* slopes, float* m, float* l, float* w, float* o,
                         int64_t o_stride, const Ahead<T>& k_ahead, const Ahead<T>& v_ahead) {
  const int dim = D ? D : any_dim, v_dim = D ? D : any_v_dim;
  alignas(64) float scores[kRowGroup * kTile];
  float alpha[R];
  stream_scores<T, R>(q, q_stride, k, tile, dim, scores, k_ahead);
  if constexpr (kQuantised<T>) {
    for (int r = 0; r < R; ++r) multiply_scales(scores + r * kTile, scales.k, tile.count);
  }
  if (!scoring.plain) {
    for (int r = 0; r < R; ++r) {
      shape_scores(scoring.rule, slopes[r], rows[r].position - tile_begin, scores + r * kTile, tile.count);
    }
  }
  for (int r = 0; r < R; ++r) {
    alpha[r] = softmax_step(scores + r * kTile, tile.count, rows[r].visible.begin - tile_begin,
                            rows[r].visible.end - tile_begin, scoring.left, m[r], l[r]);
  }
  if constexpr (kQuantised<T>) {
    for (int r = 0; r < R; ++r) multiply_scales(scores + r * kTile, scales.v, tile.count);
  }
  add_values<R>(scores, alpha, v, tile, v_dim, l, w, o, o_stride, v_ahead);
}

template <class T>
using StreamGroup = void (*)(const float*, int64_t, const T*, const T*, const TileOffsets&, const TileScales&, int64_t,
                             const RowPlace*, int, int, const Scoring&, const float*, float*, float*, float*, float*,
                             int64_t, const Ahead<T>&, const Ahead<T>&);

template <class T, int D>
PAGEDCORE_FN StreamGroup<T> stream_group_of(int rows) {
  constexpr StreamGroup<T> kGroups[kRowGroup] = {stream_group<T, 1, D>, stream_group<T, 2, D>, stream_group<T, 3, D>,
                                                 stream_group<T, 4, D>};
  return kGroups[(rows < kRowGroup ? rows : kRowGroup) - 1];
}

template <class T>
PAGEDCORE_FN StreamGroup<T> stream_group_for(int rows, int dim, int v_dim) {
  if constexpr (kLanes >= 8) {  // the scalar path gains nothing by unrolling
    if (dim == 64 && v_dim == 64) return stream_group_of<T, 64>(rows);
    if (dim == 128 && v_dim == 128) return stream_group_of<T, 128>(rows);
  }
  return stream_group_of<T, 0>(rows);
}

// Query rows and their heads' slopes.
PAGEDCORE_FN int64_t stream_scratch_floats(int64_t rows, int dim) { return rows * (round_up_chunk(dim) + 1); }

template <class T>
static void attend_stream(const AttentionParams& p, const WorkItem& item, int64_t key_begin, int64_t key_end,
                          State state, float* q_staged) {
  const int group = p.num_heads / p.num_kv_heads;
  const int queries = item.query_end - item.query_begin;
  const int rows = queries * group;  // per KV head
  const int heads = item.head_end - item.head_begin;
  const int q_stride = round_up_chunk(p.head_dim);
  const int64_t seq_len = p.seq_lens[item.seq];
  const int64_t query_start = p.query_start_loc[item.seq];
  const int64_t query_len = p.query_start_loc[item.seq + 1] - query_start;
  const Scoring scoring = scoring_of(p);
  const int32_t* table = table_row(p, item.seq);

  float* const slopes = q_staged + static_cast<int64_t>(heads) * rows * q_stride;
  RowPlace places[kStreamRows];
  StreamGroup<T> groups[kStreamRows / kRowGroup];
  for (int row = 0; row < rows; ++row) {
    const int64_t query = item.query_begin + row / group;
    places[row] = {visible_keys(p, seq_len, query_len, query), query_position(seq_len, query_len, query)};
  }
  for (int row = 0; row < rows; row += kRowGroup) {
    groups[row / kRowGroup] = stream_group_for<T>(rows - row, p.head_dim, p.v_head_dim);
  }
  for (int head = 0; head < heads; ++head) {
    for (int row = 0; row < rows; ++row) {
      const int64_t token = query_start + item.query_begin + row / group;
      const int64_t query_head = static_cast<int64_t>(item.head_begin + head) * group + row % group;
      const int64_t at = static_cast<int64_t>(head) * rows + row;
      stage_query<T>(p, token, query_head, q_staged + at * q_stride);
      slopes[at] = p.alibi_slopes ? alibi_slope(p, query_head) : 0.0f;
    }
  }

  const T* k_base = static_cast<const T*>(p.k.data);
  const T* v_base = static_cast<const T*>(p.v.data);
  TileOffsets tiles[2];
  TileScales scales;
  fill_offsets(p, table, key_begin, key_end, tiles[0]);
  int current = 0;
  for (int64_t begin = key_begin; begin < key_end; begin += kTile, current ^= 1) {
    const TileOffsets& tile = tiles[current];
    TileOffsets& next = tiles[current ^ 1];
    fill_offsets(p, table, begin + kTile, key_end, next);
    for (int head = 0; head < heads; ++head) {
      const int64_t kv_head = item.head_begin + head;
      // The next head of this tile, or the first one of the next tile.
      const bool same_tile = head + 1 < heads;
      const int64_t next_head = same_tile ? kv_head + 1 : item.head_begin;
      const TileOffsets* next_tile = same_tile ? &tile : next.count > 0 ? &next : nullptr;
      Ahead<T> k_ahead{k_base + next_head * p.k.head_stride, next_tile ? next_tile->k : nullptr};
      Ahead<T> v_ahead{v_base + next_head * p.v.head_stride, next_tile ? next_tile->v : nullptr};
      const T* k = k_base + kv_head * p.k.head_stride;
      const T* v = v_base + kv_head * p.v.head_stride;
      if constexpr (kQuantised<T>) {
        gather_scales(p.k_scale, item.head_begin + head, tile.k_scale, tile.count, scales.k);
        gather_scales(p.v_scale, item.head_begin + head, tile.v_scale, tile.count, scales.v);
      }
      for (int row = 0; row < rows; row += kRowGroup) {
        const int64_t at = static_cast<int64_t>(head) * rows + row;
        groups[row / kRowGroup](q_staged + at * q_stride, q_stride, k, v, tile, scales, begin, places + row, p.head_dim,
                                p.v_head_dim, scoring, slopes + at, state.m + at, state.l + at, state.w + at,
                                state.o + at * state.stride, state.stride, k_ahead, v_ahead);
        k_ahead.offsets = v_ahead.offsets = nullptr;  // asked for once
      }
    }
  }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
