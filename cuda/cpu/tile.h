// A tile of the streaming kernel: some tokens of a sequence, and where their rows are.
#pragma once

namespace pagedcore::cpu::PAGEDCORE_ISA {

constexpr int kTile = 64;     // tokens; a multiple of kLanes
constexpr int kRowGroup = 4;  // query rows that share a loaded K or V row

// Addresses of a tile's tokens relative to head 0 of block 0, in elements. Entries past `count` repeat the last token,
// so that kernels may compute whole register tiles.
struct TileOffsets {
  int64_t k[kTile];
  int64_t v[kTile];
  int64_t k_scale[kTile];  // of a quantised cache
  int64_t v_scale[kTile];
  int count;
};

// The scales of one head's tile. Nothing but 1 where the cache is not quantised, and not read then.
struct TileScales {
  float k[kTile];
  float v[kTile];
};

// `offsets` of `count` tokens, then 1 up to kTile.
PAGEDCORE_FN void gather_scales(const Scales& scales, int head, const int64_t* offsets, int count, float* to) {
  const float* from = scales.data ? scales.data + head * scales.head_stride : nullptr;
  for (int t = 0; t < count; ++t) to[t] = from ? from[offsets[t]] : 1.0f;
  for (int t = count; t < kTile; ++t) to[t] = 1.0f;
}

// Scores or weights of a row times the scales of their tokens.
PAGEDCORE_FN void multiply_scales(float* values, const float* scales, int count) {
  for (int t = 0; t < count; t += kLanes) store(values + t, mul(load(values + t), load(scales + t)));
}

PAGEDCORE_FN void fill_offsets(const AttentionParams& p, const int32_t* table, int64_t begin, int64_t end,
                               TileOffsets& tile) {
  tile.count = static_cast<int>(end - begin < kTile ? end - begin : kTile);
  if (tile.count <= 0) return;
  token_offsets(p, table, begin, tile.count, tile.k, tile.v);
  if (p.kv_dtype == DType::e4m3) scale_offsets(p, table, begin, tile.count, tile.k_scale, tile.v_scale);
  for (int t = tile.count; t < kTile; ++t) {
    tile.k[t] = tile.k[tile.count - 1];
    tile.v[t] = tile.v[tile.count - 1];
  }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
