// What the files of tiled kernels offer to the one that chooses among them (paged_attention.cu).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu.h"
#include "pagedcore/device.h"
#include "work.h"

namespace pagedcore::gpu {

// Shared memory that every GPU from sm_80 on gives one block.
constexpr int kMostSharedBytes = 99 * 1024;

// One instance, ready on the current device.
struct TiledKernel {
  void (*kernel)(PlannedAttention);
  int threads;
  int shared_bytes;
  int64_t record_bytes;  // of a piece that a block leaves for others
  int grid;              // as many blocks as run at one time

  void run(const PlannedAttention& params, device::Stream stream) const {
    device::launch(kernel, grid, 1, 1, threads, static_cast<size_t>(shared_bytes), stream, params);
  }
};

// Tiles of 16 rows: decode, and a few query tokens a sequence (decode.cu).
TiledKernel decode_kernel_for(const AttentionParams& params);

template <class Policy, void (*kKernel)(PlannedAttention)>
TiledKernel tiled_kernel() {
  static const device::Residency<PlannedAttention> residency(kKernel, Policy::kThreads, Policy::kSharedBytes);
  return {kKernel, Policy::kThreads, Policy::kSharedBytes, int64_t{Policy::Record::kFloats} * 4, residency.blocks()};
}

// Family::instance<kDim, T>() for these parameters.
template <class Family, class T>
TiledKernel instance_for(const AttentionParams& p) {
  switch (p.head_dim) {
    case 64:
      return Family::template instance<64, T>();
    case 80:
      return Family::template instance<80, T>();
    case 96:
      return Family::template instance<96, T>();
    case 112:
      return Family::template instance<112, T>();
    case 128:
      return Family::template instance<128, T>();
    case 192:
      return Family::template instance<192, T>();
    case 256:
      return Family::template instance<256, T>();
    default:
      throw std::invalid_argument("head_dim " + std::to_string(p.head_dim) + ": see why_not_tiled");
  }
}

template <class Family>
TiledKernel instance_for(const AttentionParams& p) {
  return p.dtype == DType::f16 ? instance_for<Family, f16>(p) : instance_for<Family, bf16>(p);
}

}  // namespace pagedcore::gpu
