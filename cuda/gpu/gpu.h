// The GPU backend: each op over plain parameters, on a stream. Arguments were checked by the caller as far as shapes
// and types go. The contents of index tensors are not read on the host: what is out of range is masked by the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pagedcore/device.h"
#include "pagedcore/params.h"

namespace pagedcore::gpu {

// One plain kernel for every dtype, head size, stride and block size (attention_generic.cu).
void attention_generic(const AttentionParams& params, device::Stream stream);

// Device memory that a planned attention works with. It belongs to one stream. Layers that agree in everything a plan
// depends on (lengths, window, heads) share one plan.
struct WorkPlan {
  int64_t* first_units;  // [num_seqs + 1] work units before each sequence, and in all
  int32_t* counters;     // [grid] pieces that arrived, of the item that begins in each block and does not end there
  float*
      partials;  // [grid, 2, partial_floats(v_head_dim)] what a block has of the item it begins, ends, in the middle of
  int grid;      // blocks of the attention kernel
};

// Fills first_units and zeroes the counters.
void plan_attention(const AttentionParams& params, const WorkPlan& plan, device::Stream stream);

// A partial state: kTileRows rows of m, the rounded and the exact sum, and the output (work.h, decode.cu).
constexpr int64_t partial_floats(int64_t head_dim) { return 16 * (head_dim + 3); }

// Whether the tensor-core kernel takes it; else why not, in words.
const char* why_not_tiled(const AttentionParams& params);
// Tiles of 16 rows: decode, and a few query tokens a sequence (decode.cu).
void attention_decode(const AttentionParams& params, const WorkPlan& plan, device::Stream stream);

}  // namespace pagedcore::gpu
