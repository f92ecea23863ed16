// Rows of 16-bit or 8-bit elements in shared memory, swizzled so that neither the copies that fill a tile nor ldmatrix
// that reads it meet a bank twice.
#pragma once

#include <cstdint>

#include "pagedcore/device.h"

namespace pagedcore::gpu {

constexpr int kChunkBytes = 16;

constexpr int greatest_common_divisor(int a, int b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

// kBytes: of an element.
template <int kDim, int kBytes = 2>
struct Tile {
  static_assert(kDim % 16 == 0 && kDim >= 64 && kDim <= 256, "head sizes of the tiled kernels");
  static constexpr int kRowBytes = kDim * kBytes;
  static constexpr int kChunkElements = kChunkBytes / kBytes;
  static constexpr int kChunks = kDim / kChunkElements;  // of a row
  static constexpr int kFlips = greatest_common_divisor(kChunks, 8);

  // Eight rows read at one chunk must fall on eight different groups of four banks. Rows that start gcd(kChunks, 8)
  // groups apart repeat every 8 / gcd rows: from there on the chunk's number is flipped by one more.
  PAGEDCORE_FN constexpr int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row / (8 / kFlips)) % kFlips) * kChunkBytes;
  }

  // Where chunk 2 * step + c of a row is, from where its chunk c is (0 or 1), if the tile begins on 128 bytes: so that
  // one address a lane and product is kept, and not one a step.
  static PAGEDCORE_MEMBER device::SharedAddress at_step(device::SharedAddress row, int step) {
    const int flipped = 2 * step % kFlips;
    return device::flip_bits(row, flipped * kChunkBytes) + (2 * step - flipped) * kChunkBytes;
  }
};

// Whether eight accesses of 16 bytes, of eight lanes, fall on all 32 banks: eight rows at one chunk (ldmatrix), and
// eight chunks one after another, over the ends of rows (what fills a tile). `row` a multiple of 8.
template <class Rows>
constexpr bool meets_no_bank_twice() {
  for (int row = 0; row < 16; row += 8) {
    for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
      unsigned read = 0, filled = 0;
      for (int i = 0; i < 8; ++i) {
        const int copy = (row * Rows::kChunks / 8 + chunk) * 8 + i;
        read |= 1u << Rows::offset(row + i, chunk) / kChunkBytes % 8;
        filled |= 1u << Rows::offset(copy / Rows::kChunks, copy % Rows::kChunks) / kChunkBytes % 8;
      }
      if (read != 0xff || filled != 0xff) return false;
    }
  }
  return true;
}
static_assert(meets_no_bank_twice<Tile<64>>() && meets_no_bank_twice<Tile<80>>() && meets_no_bank_twice<Tile<96>>());
static_assert(meets_no_bank_twice<Tile<112>>() && meets_no_bank_twice<Tile<128>>() && meets_no_bank_twice<Tile<192>>());
static_assert(meets_no_bank_twice<Tile<256>>() && meets_no_bank_twice<Tile<64, 1>>() &&
              meets_no_bank_twice<Tile<128, 1>>());

}  // namespace pagedcore::gpu
