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
#include "pagedcore/softmax.h"
#include "simd.h"
#include "state.h"

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kStreamRows = 16;  // most query rows a KV head that the streaming kernel takes

template <int N>
struct Count {
    static constexpr int value = N;
};

// A query row as floats in chunk order, zero-padded to whole chunks.
template <class T>
PAGEDCORE_FN void stage_row(const T* row, int dim, float* staged) {
    for (int d = 0; d < dim; d += kChunk) {
        Vec a, b;
        if (dim - d >= kChunk) {
            load_chunk(row + d, a, b);
        } else {
            load_partial_chunk(row + d, dim - d, a, b);
        }
        store(staged + d, a);
        store(staged + d + kLanes, b);
    }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA

#include "probe.h"
#include "stream.h"

namespace pagedcore::cpu::PAGEDCORE_ISA {

static int64_t scratch_floats(const AttentionParams& p, int64_t max_rows) {
    return max_rows * round_up_chunk(p.head_dim);
}

static void attend(const AttentionParams& p, const WorkItem& item, int64_t key_begin, int64_t key_end, State state,
                   float* scratch) {
    const int64_t rows = item.rows(p.num_heads / p.num_kv_heads);
    for (int64_t row = 0; row < rows; ++row) {
        state.m[row] = -INFINITY;
        state.l[row] = 0.0f;
    }
    __builtin_memset(state.o, 0, static_cast<unsigned long>(rows * state.stride) * sizeof(float));
    switch (p.dtype) {
        case DType::f32:
            return attend_stream<float>(p, item, key_begin, key_end, state, scratch);
        case DType::f16:
            return attend_stream<f16>(p, item, key_begin, key_end, state, scratch);
        default:
            return attend_stream<bf16>(p, item, key_begin, key_end, state, scratch);
    }
}

static void fold(State into, State other, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
        const MergeFactors factors = merge_factors(into.m[row], other.m[row]);
        into.m[row] = factors.m;
        into.l[row] = into.l[row] * factors.a + other.l[row] * factors.b;
        float* a = into.o + row * into.stride;
        const float* b = other.o + row * other.stride;
        const Vec fa = set1(factors.a), fb = set1(factors.b);
        for (int64_t d = 0; d < into.stride; d += kLanes)
            store(a + d, fma(fb, load(b + d), mul(fa, load(a + d))));
    }
}

template <class T>
static void finish_rows(const AttentionParams& p, const WorkItem& item, State state) {
    const int group = p.num_heads / p.num_kv_heads;
    int64_t row = 0;
    for (int head = item.head_begin; head < item.head_end; ++head) {
        for (int query = item.query_begin; query < item.query_end; ++query) {
            for (int g = 0; g < group; ++g, ++row) {
                const int64_t token = p.query_start_loc[item.seq] + query;
                const int64_t query_head = static_cast<int64_t>(head) * group + g;
                const float l = state.l[row];
                // A row that saw no key has l = 0 and o = 0.
                const Vec inverse = set1(l == 0.0f ? 0.0f : 1.0f / l);
                const float* o = state.o + row * state.stride;
                T* out = static_cast<T*>(p.out) + token * p.out_token_stride + query_head * p.out_head_stride;
                for (int d = 0; d < p.v_head_dim; d += kChunk) {
                    const Vec a = mul(inverse, load(o + d)), b = mul(inverse, load(o + d + kLanes));
                    if (p.v_head_dim - d >= kChunk) {
                        store_chunk(out + d, a, b);
                    } else {
                        store_partial_chunk(out + d, p.v_head_dim - d, a, b);
                    }
                }
                if (p.lse)
                    p.lse[token * p.lse_token_stride + query_head * p.lse_head_stride] = log_sum_exp(state.m[row], l);
            }
        }
    }
}

static void finish(const AttentionParams& p, const WorkItem& item, State state) {
    switch (p.dtype) {
        case DType::f32:
            return finish_rows<float>(p, item, state);
        case DType::f16:
            return finish_rows<f16>(p, item, state);
        default:
            return finish_rows<bf16>(p, item, state);
    }
}

#define PAGEDCORE_STRING_(x) #x
#define PAGEDCORE_STRING(x) PAGEDCORE_STRING_(x)

extern const Isa table;
const Isa table = {
    PAGEDCORE_STRING(PAGEDCORE_ISA), kChunk, kStreamRows, scratch_floats, attend, fold, finish, read_range};

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
