// Weights meeting value rows. The general way is f32; an instruction set may overload it for a type.
#pragma once

#include "tile.h"

namespace pagedcore::cpu::PAGEDCORE_ISA {

// Chunks of o that are held in registers at a time: 2 * R * kStep vectors.
constexpr int kStep = kLanes >= 16 ? 2 : 1;

// Rows that will be read after these, asked for on the way, each at the turn of the row in its place; null `offsets`:
// none. Asked for all at once they would wait for each other, and the memory would idle afterwards.
template <class T>
struct Ahead {
  const T* base;
  const int64_t* offsets;
};

template <class T>
PAGEDCORE_FN void prefetch_row(const Ahead<T>& ahead, int t, int begin, int end) {
  if (!ahead.offsets) return;
  const char* row = reinterpret_cast<const char*>(ahead.base + ahead.offsets[t]);
  for (int b = begin * static_cast<int>(sizeof(T)); b < end * static_cast<int>(sizeof(T)); b += 64) prefetch(row + b);
}

// Holds N chunks at `o` of R rows in registers, scaled by alpha[r], while `body` adds to them.
template <int R, int N, class Body>
PAGEDCORE_FN void update_rows(const float* alpha, float* o, int64_t o_stride, const Body& body) {
  Vec a[R][N], b[R][N];
  for (int r = 0; r < R; ++r) {
    const Vec factor = set1(alpha[r]);
    for (int n = 0; n < N; ++n) {
      a[r][n] = mul(factor, load(o + r * o_stride + n * kChunk));
      b[r][n] = mul(factor, load(o + r * o_stride + n * kChunk + kLanes));
    }
  }
  body(a, b);
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      store(o + r * o_stride + n * kChunk, a[r][n]);
      store(o + r * o_stride + n * kChunk + kLanes, b[r][n]);
    }
  }
}

// o[r] = alpha[r] * o[r] + sum over tokens of weights[r * kTile + t] * V[t], for N chunks from element `d` on.
template <class T, int R, int N>
PAGEDCORE_FN void stream_values(const float* weights, const float* alpha, const T* v, const TileOffsets& tile, int d,
                                int width, float* o, int64_t o_stride, const Ahead<T>& ahead) {
  update_rows<R, N>(alpha, o + d, o_stride, [&](Vec(&a)[R][N], Vec(&b)[R][N]) PAGEDCORE_INLINE {
    for (int t = 0; t < tile.count; ++t) {
      const T* row = v + tile.v[t] + d;
      prefetch_row(ahead, t, d, d + N * width);
      for (int n = 0; n < N; ++n) {
        Vec va, vb;
        if (width < kChunk) {
          load_partial_chunk(row + n * kChunk, width, va, vb);
        } else {
          load_chunk(row + n * kChunk, va, vb);
        }
        for (int r = 0; r < R; ++r) {
          const Vec weight = set1(weights[r * kTile + t]);
          a[r][n] = fma(weight, va, a[r][n]);
          b[r][n] = fma(weight, vb, b[r][n]);
        }
      }
    }
  });
}

// o[r] = alpha[r] * o[r] + weights . V for R rows of one head's tile; w[r], the sum of the weights as they were used,
// is their exact sum here.
template <int R, class T>
PAGEDCORE_FN void add_values(const float* weights, const float* alpha, const T* v, const TileOffsets& tile, int v_dim,
                             const float* l, float* w, float* o, int64_t o_stride, const Ahead<T>& ahead) {
  for (int r = 0; r < R; ++r) w[r] = l[r];
  int d = 0;
  for (; d + kStep * kChunk <= v_dim; d += kStep * kChunk) {
    stream_values<T, R, kStep>(weights, alpha, v, tile, d, kChunk, o, o_stride, ahead);
  }
  for (; d < v_dim; d += kChunk) {
    stream_values<T, R, 1>(weights, alpha, v, tile, d, v_dim - d, o, o_stride, ahead);
  }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
