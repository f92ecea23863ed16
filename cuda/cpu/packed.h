// The packed kernel: many query rows per KV head (prompts, long chunks, MQA), so arithmetic decides.
//
// One KV head, up to kPackedRows query rows (queries x heads of the group), tiles of kPackedTile tokens. Each tile's K
// is transposed and V converted to f32 once, and both products are then one register-blocked loop: rows of the left
// operand broadcast against vectors of the right one. Row blocks that see nothing of a tile are skipped; the rest of
// the mask is -inf in the scores.
//
// Scratch, in floats, with D and E the padded head dims: Q rows x D, K' D x 64, V 64 x E, scores rows x 64. At D = E =
// 128 and 128 rows that is 160 KiB: it stays in L2.
#pragma once

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kPackedRows = 128;
constexpr int kPackedTile = 64;  // tokens; a multiple of kMicroRows' partner, kMicroVecs * kLanes
constexpr int kMicroColumns = kMicroVecs * kLanes;
static_assert(kPackedTile % kMicroColumns == 0, "a tile is cut into whole register tiles");
static_assert(kChunk % kMicroColumns == 0, "padded head dims are cut into whole register tiles");

PAGEDCORE_FN int64_t packed_scratch_floats(int64_t rows, int dim, int v_dim) {
  const int64_t d = round_up_chunk(dim), e = round_up_chunk(v_dim);
  return rows * d + kPackedTile * (d + e) + rows * kPackedTile;
}

// c[r][0 .. kMicroColumns) = init + sum over i < depth of a[r][i] * b[i][...], for R rows; init is alpha[r] * c[r], or
// 0 without alpha.
template <int R>
static inline void multiply_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int depth,
                                 const float* alpha, float* c, int64_t c_stride) {
  Vec sums[R][kMicroVecs];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < kMicroVecs; ++n) {
      sums[r][n] = alpha ? mul(set1(alpha[r]), load(c + r * c_stride + n * kLanes)) : zero();
    }
  }
  for (int i = 0; i < depth; ++i) {
    Vec row[kMicroVecs];
    for (int n = 0; n < kMicroVecs; ++n) row[n] = load(b + i * b_stride + n * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec factor = set1(a[r * a_stride + i]);
      for (int n = 0; n < kMicroVecs; ++n) sums[r][n] = fma(factor, row[n], sums[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < kMicroVecs; ++n) store(c + r * c_stride + n * kLanes, sums[r][n]);
  }
}

using MultiplyTile = void (*)(const float*, int64_t, const float*, int64_t, int, const float*, float*, int64_t);

// Row counts up to kMicroRows, so that the last rows of an item need no padding.
template <int... R>
PAGEDCORE_FN MultiplyTile pick_multiply_tile(int rows, Counts<R...>) {
  static constexpr MultiplyTile kTiles[] = {multiply_tile<R + 1>...};
  return kTiles[rows - 1];
}

PAGEDCORE_FN MultiplyTile multiply_tile_for(int rows) {
  return pick_multiply_tile(rows, typename MakeCounts<kMicroRows>::type{});
}

// K of one head's tile as columns: to[d * kPackedTile + t], in chunk order along d; columns past `count` repeat a real
// one and are masked later.
// With `scales`, one a token, what is packed are the codes' values.
template <class T>
static void pack_keys(const T* k, const int64_t* offsets, const float* scales, int count, int dim, float* to) {
  for (int t = 0; t < count; t += kLanes) {
    const T* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = k + offsets[t + i < count ? t + i : count - 1];
    for (int d = 0; d < dim; d += kChunk) {
      Vec a[kLanes], b[kLanes];
      for (int i = 0; i < kLanes; ++i) load_upto_chunk(rows[i] + d, dim - d, a[i], b[i]);
      if constexpr (kQuantised<T>) {
        for (int i = 0; i < kLanes; ++i) {
          const Vec scale = set1(scales[t + i < count ? t + i : count - 1]);
          a[i] = mul(scale, a[i]);
          b[i] = mul(scale, b[i]);
        }
      }
      transpose(a);
      transpose(b);
      for (int i = 0; i < kLanes; ++i) {
        store(to + (d + i) * kPackedTile + t, a[i]);
        store(to + (d + kLanes + i) * kPackedTile + t, b[i]);
      }
    }
  }
}

template <class T>
static void pack_values(const T* v, const int64_t* offsets, const float* scales, int count, int dim, int stride,
                        float* to) {
  for (int t = 0; t < count; ++t) {
    const T* row = v + offsets[t];
    for (int d = 0; d < dim; d += kChunk) {
      Vec a, b;
      load_upto_chunk(row + d, dim - d, a, b);
      if constexpr (kQuantised<T>) {
        a = mul(set1(scales[t]), a);
        b = mul(set1(scales[t]), b);
      }
      store(to + t * stride + d, a);
      store(to + t * stride + d + kLanes, b);
    }
  }
}

template <class T>
static void attend_packed(const AttentionParams& p, const WorkItem& item, int64_t key_begin, int64_t key_end,
                          State state, float* scratch) {
  const int group = p.num_heads / p.num_kv_heads;
  const int rows = (item.query_end - item.query_begin) * group;
  const int q_stride = round_up_chunk(p.head_dim), v_stride = round_up_chunk(p.v_head_dim);
  const int64_t seq_len = p.seq_lens[item.seq];
  const int64_t query_start = p.query_start_loc[item.seq];
  const int64_t query_len = p.query_start_loc[item.seq + 1] - query_start;
  const Scoring scoring = scoring_of(p);
  const int32_t* table = table_row(p, item.seq);
  const T* k_head = static_cast<const T*>(p.k.data) + item.head_begin * p.k.head_stride;
  const T* v_head = static_cast<const T*>(p.v.data) + item.head_begin * p.v.head_stride;

  float* const q = scratch;
  float* const keys = q + static_cast<int64_t>(rows) * q_stride;
  float* const values = keys + static_cast<int64_t>(kPackedTile) * q_stride;
  float* const scores = values + static_cast<int64_t>(kPackedTile) * v_stride;
  for (int row = 0; row < rows; ++row) {
    const int64_t token = query_start + item.query_begin + row / group;
    const int64_t head = static_cast<int64_t>(item.head_begin) * group + row % group;
    stage_row<T>(p, token, head, q + static_cast<int64_t>(row) * q_stride);
  }

  int64_t k_offsets[kPackedTile], v_offsets[kPackedTile];
  TileScales scales;
  static_assert(kPackedTile == kTile, "both kernels have scales of as many tokens");
  for (int64_t begin = key_begin; begin < key_end; begin += kPackedTile) {
    const int count = static_cast<int>(key_end - begin < kPackedTile ? key_end - begin : kPackedTile);
    if constexpr (kQuantised<T>) {
      scale_offsets(p, table, begin, count, k_offsets, v_offsets);
      gather_scales(p.k_scale, item.head_begin, k_offsets, count, scales.k);
      gather_scales(p.v_scale, item.head_begin, v_offsets, count, scales.v);
    }
    token_offsets(p, table, begin, count, k_offsets, v_offsets);
    pack_keys(k_head, k_offsets, scales.k, count, p.head_dim, keys);
    pack_values(v_head, v_offsets, scales.v, count, p.v_head_dim, v_stride, values);
    for (int row = 0; row < rows; row += kMicroRows) {
      const int block_rows = rows - row < kMicroRows ? rows - row : kMicroRows;
      KeyRange seen = visible_keys(p, seq_len, query_len, item.query_begin + row / group,
                                   item.query_begin + (row + block_rows - 1) / group + 1);
      if (seen.begin >= begin + count || seen.end <= begin) continue;
      const int depth = static_cast<int>(seen.end - begin < count ? seen.end - begin : count);
      const MultiplyTile multiply = multiply_tile_for(block_rows);
      float* s = scores + static_cast<int64_t>(row) * kPackedTile;
      for (int t = 0; t < depth; t += kMicroColumns) {
        multiply(q + static_cast<int64_t>(row) * q_stride, q_stride, keys + t, kPackedTile, q_stride, nullptr, s + t,
                 kPackedTile);
      }
      float alpha[kMicroRows];
      for (int r = 0; r < block_rows; ++r) {
        const int64_t query = item.query_begin + (row + r) / group;
        const KeyRange visible = visible_keys(p, seq_len, query_len, query);
        if (!scoring.plain) {
          const int64_t head = static_cast<int64_t>(item.head_begin) * group + (row + r) % group;
          const float slope = p.alibi_slopes ? alibi_slope(p, head) : 0.0f;
          shape_scores(scoring.rule, slope, query_position(seq_len, query_len, query) - begin, s + r * kPackedTile,
                       depth);
        }
        alpha[r] = softmax_step(s + r * kPackedTile, depth, visible.begin - begin, visible.end - begin, scoring.left,
                                state.m[row + r], state.l[row + r]);
        state.w[row + r] = state.l[row + r];
      }
      float* o = state.o + row * state.stride;
      for (int d = 0; d < v_stride; d += kMicroColumns) {
        multiply(s, kPackedTile, values + d, v_stride, depth, alpha, o + d, state.stride);
      }
    }
  }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
