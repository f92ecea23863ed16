// Attention of one work item, compiled once per instruction set: include a simd_*.h wrapper first, and this header
// last.
//
// Everything here has internal linkage (static, or inside the instruction set's namespace), so that no code compiled
// for one instruction set can stand in for another's.
#pragma once

#include <math.h>
#include <stdint.h>

#include "isa.h"
#include "pagedcore/formats.h"
#include "pagedcore/mask.h"
#include "pagedcore/pages.h"
#include "pagedcore/score.h"
#include "pagedcore/softmax.h"
#include "simd.h"
#include "state.h"

#ifdef PAGEDCORE_DPBF16
// What has no pairs of bfloat16 in it is AVX-512's, states and chunks included.
namespace pagedcore::cpu::avx512 {
extern const Isa table;
}
#endif

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kStreamRows = 16;  // from this many query rows a KV head, the packed kernel takes over

template <int N>
struct Count {
  static constexpr int value = N;
};

// 0, 1, ..., N - 1 as a pack (std::integer_sequence would do, but the standard library stays out of these translation
// units).
template <int... I>
struct Counts {};
template <int N, int... I>
struct MakeCounts : MakeCounts<N - 1, N - 1, I...> {};
template <int... I>
struct MakeCounts<0, I...> {
  using type = Counts<I...>;
};

// The first min(n, kChunk) elements of a row.
template <class T>
PAGEDCORE_FN void load_upto_chunk(const T* p, int n, Vec& a, Vec& b) {
  if (n >= kChunk) {
    load_chunk(p, a, b);
  } else {
    load_partial_chunk(p, n, a, b);
  }
}

// A cache of codes: its elements have another type than the query's, and their chunks are in order.
template <class T>
constexpr bool kQuantised = false;
template <>
constexpr bool kQuantised<e4m3> = true;

template <class T>
PAGEDCORE_FN const T* query_row(const AttentionParams& p, int64_t token, int64_t head) {
  return static_cast<const T*>(p.query) + token * p.query_token_stride + head * p.query_head_stride;
}

template <class T>
PAGEDCORE_FN void copy_in_order(const T* row, int dim, float* to) {
  for (int d = 0; d < dim; ++d) to[d] = to_float(row[d]);
  for (int d = dim; d < round_up_chunk(dim); ++d) to[d] = 0.0f;
}

// A query row of any type as floats in order, zero-padded to whole chunks.
PAGEDCORE_FN void stage_in_order(const AttentionParams& p, int64_t token, int64_t head, float* staged) {
  if (p.dtype == DType::f32) return copy_in_order(query_row<float>(p, token, head), p.head_dim, staged);
  if (p.dtype == DType::f16) return copy_in_order(query_row<f16>(p, token, head), p.head_dim, staged);
  copy_in_order(query_row<bf16>(p, token, head), p.head_dim, staged);
}

// A query row as floats in the chunk order of T, zero-padded to whole chunks.
template <class T>
PAGEDCORE_FN void stage_row(const AttentionParams& p, int64_t token, int64_t head, float* staged) {
  if constexpr (kQuantised<T>) {
    stage_in_order(p, token, head, staged);
  } else {
    const T* row = query_row<T>(p, token, head);
    for (int d = 0; d < p.head_dim; d += kChunk) {
      Vec a, b;
      load_upto_chunk(row + d, p.head_dim - d, a, b);
      store(staged + d, a);
      store(staged + d + kLanes, b);
    }
  }
}

// How one call's dot products become scores. Where the scale is all there is, softmax_step multiplies by it on its way.
struct Scoring {
  ScoreRule rule;
  bool plain;
  float left;  // for softmax_step to multiply by: the scale, or 1 where shape_scores goes before
};

PAGEDCORE_FN Scoring scoring_of(const AttentionParams& p) {
  const ScoreRule rule = score_rule(p);
  const bool plain = rule.cap == 0.0f && p.alibi_slopes == nullptr;
  return {rule, plain, plain ? rule.factor : 1.0f};
}

// Dot products of one query row become scores in place, but for the mask. `distance` is from the first of their keys to
// the query. Whole vectors: up to the next multiple of kLanes past `count`.
static void shape_scores(const ScoreRule& rule, float slope, int64_t distance, float* scores, int count) {
  static constexpr float kLane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(kLanes <= 16, "numbers of the lanes");
  const Vec factor = set1(rule.factor), cap = set1(rule.cap), minus_slope = set1(-slope);
  for (int t = 0; t < count; t += kLanes) {
    Vec s = mul(factor, load(scores + t));
    if (rule.cap != 0.0f) s = mul(cap, tanh(s));
    if (slope != 0.0f) {
      const Vec ahead = sub(load(kLane), set1(static_cast<float>(distance - t)));
      s = fma(minus_slope, max(ahead, sub(zero(), ahead)), s);
    }
    store(scores + t, s);
  }
}

// One step of a row's online softmax: `count` scores become weights in place, m and l move on, and the factor by which
// the row's o must shrink comes back. Scores are multiplied by `scale` (base 2); those outside [first, last) are
// masked. Memory up to the next multiple of kLanes is readable, and gets weight 0.
PAGEDCORE_FN float softmax_step(float* scores, int count, int64_t first, int64_t last, float scale, float& m,
                                float& l) {
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  const Vec factor = set1(scale);
  Vec top = set1(-INFINITY);
  if (first <= 0 && last >= padded && count == padded) {
    for (int t = 0; t < padded; t += kLanes) {
      const Vec score = mul(factor, load(scores + t));
      store(scores + t, score);
      top = max(top, score);
    }
  } else {
    for (int t = 0; t < padded; t += kLanes) store(scores + t, mul(factor, load(scores + t)));
    const int begin = first < 0 ? 0 : first < padded ? static_cast<int>(first) : padded;
    const int end = last < 0 ? 0 : last < count ? static_cast<int>(last) : count;
    for (int t = 0; t < begin; ++t) scores[t] = -INFINITY;
    for (int t = end; t < padded; ++t) scores[t] = -INFINITY;
    for (int t = 0; t < padded; t += kLanes) top = max(top, load(scores + t));
  }
  const float tile_max = reduce_max(top);
  float m_new = m, alpha = 1.0f;
  if (tile_max > m) {
    m_new = tile_max;
    alpha = __builtin_exp2f(m - m_new);
  }
  const Vec reference = set1(finite_max(m_new));
  Vec sum = zero();
  for (int t = 0; t < padded; t += kLanes) {
    const Vec weight = exp2_nonpositive(sub(load(scores + t), reference));
    store(scores + t, weight);
    sum = add(sum, weight);
  }
  m = m_new;
  l = l * alpha + reduce_add(sum);
  return alpha;
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA

#include "tile.h"

#include "packed.h"
#include "probe.h"
#include "stream.h"

namespace pagedcore::cpu::PAGEDCORE_ISA {

static int64_t scratch_floats(const AttentionParams& p, int64_t stream_rows, int64_t packed_rows) {
  const int64_t stream = stream_rows > 0 ? stream_scratch_floats(stream_rows, p.head_dim) : 0;
  const int64_t packed = packed_rows > 0 ? packed_scratch_floats(packed_rows, p.head_dim, p.v_head_dim) : 0;
  return stream > packed ? stream : packed;
}

template <class T>
PAGEDCORE_FN void attend_as(const AttentionParams& p, const WorkItem& item, int64_t key_begin, int64_t key_end,
                            State state, float* scratch) {
  if (item.packed) {
    attend_packed<T>(p, item, key_begin, key_end, state, scratch);
  } else {
    attend_stream<T>(p, item, key_begin, key_end, state, scratch);
  }
}

static void attend(const AttentionParams& p, const WorkItem& item, int64_t key_begin, int64_t key_end, State state,
                   float* scratch) {
  const int64_t rows = item.rows(p.num_heads / p.num_kv_heads);
  for (int64_t row = 0; row < rows; ++row) {
    state.m[row] = -INFINITY;
    state.l[row] = 0.0f;
    state.w[row] = 0.0f;
  }
  __builtin_memset(state.o, 0, static_cast<unsigned long>(rows * state.stride) * sizeof(float));
#ifdef PAGEDCORE_DPBF16
  if (p.kv_dtype != DType::bf16) return avx512::table.attend(p, item, key_begin, key_end, state, scratch);
#else
  if (p.kv_dtype == DType::e4m3) return attend_as<e4m3>(p, item, key_begin, key_end, state, scratch);
  if (p.dtype == DType::f32) return attend_as<float>(p, item, key_begin, key_end, state, scratch);
  if (p.dtype == DType::f16) return attend_as<f16>(p, item, key_begin, key_end, state, scratch);
#endif
  attend_as<bf16>(p, item, key_begin, key_end, state, scratch);
}

static void fold(State into, State other, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const MergeFactors factors = merge_factors(into.m[row], other.m[row]);
    into.m[row] = factors.m;
    into.l[row] = into.l[row] * factors.a + other.l[row] * factors.b;
    into.w[row] = into.w[row] * factors.a + other.w[row] * factors.b;
    float* a = into.o + row * into.stride;
    const float* b = other.o + row * other.stride;
    const Vec fa = set1(factors.a), fb = set1(factors.b);
    for (int64_t d = 0; d < into.stride; d += kLanes) store(a + d, fma(fb, load(b + d), mul(fa, load(a + d))));
  }
}

// A chunk that is in order, or its first n elements.
template <class T>
PAGEDCORE_FN void store_in_order(T* p, int n, Vec a, Vec b) {
  float whole[kChunk];
  store(whole, a);
  store(whole + kLanes, b);
  for (int i = 0; i < n && i < kChunk; ++i) from_float(whole[i], p[i]);
}

// kInOrder: o is, as a quantised cache leaves it, and not in the chunk order of T.
template <class T, bool kInOrder>
static void finish_rows(const AttentionParams& p, const WorkItem& item, State state) {
  const int group = p.num_heads / p.num_kv_heads;
  int64_t row = 0;
  for (int head = item.head_begin; head < item.head_end; ++head) {
    for (int query = item.query_begin; query < item.query_end; ++query) {
      for (int g = 0; g < group; ++g, ++row) {
        const int64_t token = p.query_start_loc[item.seq] + query;
        const int64_t query_head = static_cast<int64_t>(head) * group + g;
        WithSink total{state.m[row], state.l[row], state.w[row], 1.0f};
        if (p.sinks) total = add_sink(total.m, total.l, total.w, p.sinks[query_head]);
        // A row that saw no key has w = 0 and o = 0.
        const Vec inverse = set1(total.w == 0.0f ? 0.0f : total.a / total.w);
        const float* o = state.o + row * state.stride;
        T* out = static_cast<T*>(p.out) + token * p.out_token_stride + query_head * p.out_head_stride;
        for (int d = 0; d < p.v_head_dim; d += kChunk) {
          const Vec a = mul(inverse, load(o + d)), b = mul(inverse, load(o + d + kLanes));
          if constexpr (kInOrder) {
            store_in_order(out + d, p.v_head_dim - d, a, b);
          } else if (p.v_head_dim - d >= kChunk) {
            store_chunk(out + d, a, b);
          } else {
            store_partial_chunk(out + d, p.v_head_dim - d, a, b);
          }
        }
        if (p.lse) p.lse[token * p.lse_token_stride + query_head * p.lse_head_stride] = log_sum_exp(total.m, total.l);
      }
    }
  }
}

template <bool kInOrder>
static void finish_as(const AttentionParams& p, const WorkItem& item, State state) {
  if (p.dtype == DType::f32) return finish_rows<float, kInOrder>(p, item, state);
  if (p.dtype == DType::f16) return finish_rows<f16, kInOrder>(p, item, state);
  finish_rows<bf16, kInOrder>(p, item, state);
}

static void finish(const AttentionParams& p, const WorkItem& item, State state) {
#ifdef PAGEDCORE_DPBF16
  if (p.kv_dtype != DType::bf16) return avx512::table.finish(p, item, state);
  finish_rows<bf16, false>(p, item, state);
#else
  if (p.kv_dtype == DType::e4m3) return finish_as<true>(p, item, state);
  finish_as<false>(p, item, state);
#endif
}

#define PAGEDCORE_STRING_(x) #x
#define PAGEDCORE_STRING(x) PAGEDCORE_STRING_(x)

extern const Isa table;
const Isa table = {PAGEDCORE_STRING(PAGEDCORE_ISA),
                   kChunk,
                   kStreamRows,
                   kPackedRows,
                   scratch_floats,
                   attend,
                   fold,
                   finish,
                   read_range};

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
