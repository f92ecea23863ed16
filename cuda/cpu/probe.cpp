// Read bandwidth on the threads that the kernels use: of one range, and of pages in the order in which a decode step
// meets them.
#include <algorithm>
#include <atomic>

#include "cpu.h"
#include "isa.h"
#include "threads.h"

namespace pagedcore::cpu {
namespace {

constexpr int64_t kPiece = 1 << 20;

// Keeps the sums alive; the value means nothing.
volatile float sink;

}  // namespace

void read_range(const char* data, int64_t bytes, int num_threads) {
  const Isa& isa = selected_isa();
  std::atomic<int64_t> cursor{0};
  parallel(num_threads, [&](int) {
    float sum = 0.0f;
    for (int64_t begin; (begin = cursor.fetch_add(kPiece, std::memory_order_relaxed)) < bytes;) {
      sum += isa.read(data + begin, std::min(kPiece, (bytes - begin) / 64 * 64));
    }
    sink = sum;
  });
}

void read_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, int num_threads) {
  const Isa& isa = selected_isa();
  constexpr int64_t kBatch = 16;
  std::atomic<int64_t> cursor{0};
  parallel(num_threads, [&](int) {
    float sum = 0.0f;
    for (int64_t first; (first = cursor.fetch_add(kBatch, std::memory_order_relaxed)) < count;) {
      for (int64_t i = first; i < std::min(count, first + kBatch); ++i) {
        sum += isa.read(region.data + blocks[i] * region.block_stride, region.contiguous_bytes / 64 * 64);
      }
    }
    sink = sum;
  });
}

}  // namespace pagedcore::cpu
