#include "warp.h"

#include <vector>

#include "races.h"

namespace pagedcore::shim {
namespace {

struct ShuffleXor {
  float value;
  int mask;
  float result;
};
struct Shuffle {
  int value;
  int lane;
  int result;
};
struct Matrices {
  const char* row;
  bool transposed;
  uint32_t result[4];
};
struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  bool is_bf16;
};

template <class T>
T& at(void** operands, int lane) {
  return *static_cast<T*>(operands[lane]);
}

uint16_t half_of(uint32_t pair, int which) { return static_cast<uint16_t>(which == 0 ? pair : pair >> 16); }

void load_matrices(void** operands) {
  uint16_t elements[4][8][8];
  for (int i = 0; i < kWarpSize; ++i) std::memcpy(elements[i / 8][i % 8], at<Matrices>(operands, i).row, 16);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    Matrices& m = at<Matrices>(operands, lane);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint16_t low = m.transposed ? elements[i][column][row] : elements[i][row][column];
      const uint16_t high = m.transposed ? elements[i][column + 1][row] : elements[i][row][column + 1];
      m.result[i] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

// What every pattern of 16 bits means: read for each element of each product, where computing it takes as long as the
// product.
template <class T>
const float* values() {
  static const std::vector<float> all = [] {
    std::vector<float> found(size_t{1} << 16);
    for (size_t bits = 0; bits < found.size(); ++bits) found[bits] = to_float(T{static_cast<uint16_t>(bits)});
    return found;
  }();
  return all.data();
}

template <class T>
void gather(void** operands, float (&a)[16][16], float (&b)[16][8]) {
  const float* const value = values<T>();
  const auto element = [value](uint32_t pair, int which) { return value[half_of(pair, which)]; };
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Product& p = at<Product>(operands, lane);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 2; ++i) {
      a[group][pair + i] = element(p.a[0], i);
      a[group + 8][pair + i] = element(p.a[1], i);
      a[group][pair + 8 + i] = element(p.a[2], i);
      a[group + 8][pair + 8 + i] = element(p.a[3], i);
      b[pair + i][group] = element(p.b[0], i);
      b[pair + 8 + i][group] = element(p.b[1], i);
    }
  }
}

// The sums are made in f64 and rounded once: a GPU sums in an order of its own, with a few more roundings.
void multiply(void** operands) {
  float a[16][16], b[16][8];
  if (at<Product>(operands, 0).is_bf16) {
    gather<bf16>(operands, a, b);
  } else {
    gather<f16>(operands, a, b);
  }
  for (int row = 0; row < 16; ++row) {
    double sums[8];
    const int first = row % 8 * 4, half = row / 8 * 2;  // the lanes and registers that hold this row of d
    for (int column = 0; column < 8; ++column) {
      sums[column] = at<Product>(operands, first + column / 2).d[half + column % 2];
    }
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += static_cast<double>(a[row][k]) * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      at<Product>(operands, first + column / 2).d[half + column % 2] = static_cast<float>(sums[column]);
    }
  }
}

void require_aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0) {
    fault(std::string(what) + " of " + std::to_string(bytes) + " bytes at a misaligned address");
  }
}

}  // namespace

float shuffle_xor(float x, int lane_mask, int line) {
  ShuffleXor mine{x, lane_mask, 0.0f};
  collective("shuffle_xor", line, &mine, [](void** operands) {
    for (int i = 0; i < kWarpSize; ++i) {
      auto& lane = at<ShuffleXor>(operands, i);
      lane.result = at<ShuffleXor>(operands, (i ^ lane.mask) % kWarpSize).value;
    }
  });
  return mine.result;
}

int shuffle(int x, int lane, int line) {
  Shuffle mine{x, lane, 0};
  collective("shuffle", line, &mine, [](void** operands) {
    for (int i = 0; i < kWarpSize; ++i) {
      auto& asked = at<Shuffle>(operands, i);
      asked.result = at<Shuffle>(operands, (asked.lane % kWarpSize + kWarpSize) % kWarpSize).value;
    }
  });
  return mine.result;
}

uint32_t ballot(bool x, int line) {
  Shuffle mine{x, 0, 0};
  collective("ballot", line, &mine, [](void** operands) {
    uint32_t bits = 0;
    for (int i = 0; i < kWarpSize; ++i) bits |= static_cast<uint32_t>(at<Shuffle>(operands, i).value) << i;
    for (int i = 0; i < kWarpSize; ++i) at<Shuffle>(operands, i).result = static_cast<int>(bits);
  });
  return static_cast<uint32_t>(mine.result);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row, bool transposed, int line) {
  require_aligned(row, 16, "ldmatrix");
  races::read(index().thread, row, 16);
  Matrices mine{static_cast<const char*>(row), transposed, {}};
  collective("ldmatrix", line, &mine, load_matrices);
  std::memcpy(r, mine.result, sizeof r);
}

void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool is_bf16, int line) {
  Product mine{d, a, {b0, b1}, is_bf16};
  collective("mma", line, &mine, multiply);
}

void vector_read(const void* p, int bytes) {
  require_aligned(p, bytes, "vector load");
  races::read(index().thread, p, static_cast<size_t>(bytes));
}

void vector_write(const void* p, int bytes) {
  require_aligned(p, bytes, "vector store");
  races::write(index().thread, p, static_cast<size_t>(bytes));
}

int plain_add(int* p, int value) {
  const int earlier = *p;
  *p = earlier + value;
  return earlier;
}

void plain_set(uint32_t* p) { *p = 1; }

}  // namespace pagedcore::shim
