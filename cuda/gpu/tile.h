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
  static PAGEDCORE_MEMBER int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row / (8 / kFlips)) % kFlips) * kChunkBytes;
  }

  // Where chunk 2 * step + c of a row is, from where its chunk c is (0 or 1), if the tile begins on 128 bytes: so that
  // one address a lane and product is kept, and not one a step.
  static PAGEDCORE_MEMBER device::SharedAddress at_step(device::SharedAddress row, int step) {
    const int flipped = 2 * step % kFlips;
    return device::flip_bits(row, flipped * kChunkBytes) + (2 * step - flipped) * kChunkBytes;
  }
};

}  // namespace pagedcore::gpu
