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
  int count;
};

PAGEDCORE_FN void fill_offsets(const AttentionParams& p, const int32_t* table, int64_t begin, int64_t end,
                               TileOffsets& tile) {
  tile.count = static_cast<int>(end - begin < kTile ? end - begin : kTile);
  if (tile.count <= 0) return;
  token_offsets(p, table, begin, tile.count, tile.k, tile.v);
  for (int t = tile.count; t < kTile; ++t) {
    tile.k[t] = tile.k[tile.count - 1];
    tile.v[t] = tile.v[tile.count - 1];
  }
}

}  // namespace pagedcore::cpu::PAGEDCORE_ISA
