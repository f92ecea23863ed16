// What the files of tiled kernels offer to the one that chooses among them (paged_attention.cu).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "elements.h"
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
  int few_tile, many_tile;  // rows of a tile, for sequences of at most kFewRows rows and for others
  int64_t record_bytes;     // of a piece that a block leaves for others
  int grid;                 // as many blocks as run at one time

  void run(const PlannedAttention& params, device::Stream stream) const {
    device::launch(kernel, grid, 1, 1, threads, static_cast<size_t>(shared_bytes), stream, params);
  }
};

// Tiles of 16 rows: decode, and a few query tokens a sequence (decode.cu).
TiledKernel decode_kernel_for(const AttentionParams& params);
// Tiles of 16 rows for such sequences, of 64 for the others (mixed.h); above kMostDimOfBothTiles of 64 for all.
template <class T>
TiledKernel mixed_kernel_of(const AttentionParams& params);
constexpr int kMostDimOfBothTiles = 192;
// Tiles of 128 rows: prompts (prefill.cu). At other head sizes than these tiles of 64 serve them, to the same bits:
// above 128 two stages of keys beside 128 rows of Q would not fit shared memory, and between them few models are.
TiledKernel prefill_kernel_for(const AttentionParams& params);
constexpr bool takes_prefill(int head_dim) { return head_dim == 64 || head_dim == 128; }

// Head sizes that get instances. A build for the shim that checks every access names fewer, as each costs it seconds.
#ifndef PAGEDCORE_TILED_HEAD_DIMS
#define PAGEDCORE_TILED_HEAD_DIMS 64, 80, 96, 112, 128, 192, 256
#endif

// Of these, those that have instances for codes: each takes as long to compile as one for elements, and these two are
// what most models have.
constexpr bool takes_codes(int head_dim) { return head_dim == 64 || head_dim == 128; }

// Family::instance<kDim, T>() for these parameters, of the head sizes given.
template <class Family, class T, int kDim, int... kOthers>
TiledKernel instance_among(const AttentionParams& p) {
  if constexpr (!kOfCodes<T> || takes_codes(kDim)) {
    if (p.head_dim == kDim) return Family::template instance<kDim, T>();
  }
  if constexpr (sizeof...(kOthers) > 0) {
    return instance_among<Family, T, kOthers...>(p);
  } else {
    throw std::invalid_argument("head_dim " + std::to_string(p.head_dim) + ": this build has no tiled kernel for it");
  }
}

template <class Family, class T>
TiledKernel instance_for(const AttentionParams& p) {
  return instance_among<Family, T, PAGEDCORE_TILED_HEAD_DIMS>(p);
}

// Of the kinds of elements that a family has instances for, the one of these parameters.
using InstanceFor = TiledKernel(const AttentionParams&);
inline TiledKernel of_its_elements(const AttentionParams& p, InstanceFor for_f16, InstanceFor for_bf16,
                                   InstanceFor for_codes) {
  const TiledKernel of_elements = p.dtype == DType::f16 ? for_f16(p) : for_bf16(p);
  if (p.kv_dtype != DType::e4m3) return of_elements;
  // A plan is made without the cache: work over codes is cut as over elements, for the same grid. As many blocks of
  // theirs run at one time, or more: registers.toml sees to that, and shared memory holds half the bytes.
  TiledKernel of_codes = for_codes(p);
  of_codes.grid = of_elements.grid;
  return of_codes;
}

template <class Family>
TiledKernel instance_for(const AttentionParams& p) {
  return of_its_elements(p, instance_for<Family, f16>, instance_for<Family, bf16>, instance_for<Family, Codes>);
}

}  // namespace pagedcore::gpu
