// The GPU backend: each op over plain parameters, on a stream. Arguments were checked by the caller as far as shapes
// and types go. The contents of index tensors are not read on the host: what is out of range is masked by the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pagedcore/params.h"
#include "pagedcore/stream.h"

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

struct PlannedAttention {
  AttentionParams attention;
  WorkPlan plan;
};

// Fills first_units and zeroes the counters.
void plan_attention(const AttentionParams& params, const WorkPlan& plan, device::Stream stream);

// Floats of a partial state of 16 rows (record.h).
constexpr int64_t partial_floats(int64_t head_dim) { return 16 * (head_dim + 3); }

// Whether the tensor-core kernel takes it; else why not, in words.
const char* why_not_tiled(const AttentionParams& params);
// Tiles of 16 rows: decode, and a few query tokens a sequence (decode.cu).
void attention_decode(const AttentionParams& params, const WorkPlan& plan, device::Stream stream);

// This step's K and V to their slots; a slot that is negative or past the cache is skipped. Which of two tokens with
// one slot is kept is not defined here.
void reshape_and_cache(const CacheWriteParams& params, int64_t num_blocks, device::Stream stream);

// One tensor whose first axis is the block: its inner axes merged into two and a contiguous run.
struct BlockRegion {
  char* data;
  int64_t num_blocks;
  int64_t block_stride;  // bytes
  int64_t shape[2];      // runs of a block: outer, inner
  int64_t strides[2];    // bytes
  int64_t contiguous_bytes;
};

// region[dst] = region[src] for each pair. Pairs go in any order: no dst may be another pair's src or dst.
void copy_blocks(const BlockRegion& region, const int32_t* pairs, int64_t num_pairs, device::Stream stream);
void zero_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, device::Stream stream);
// Between blocks and a dense staging buffer [count, shape[0], shape[1], contiguous_bytes].
void gather_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, void* staging,
                   device::Stream stream);
void scatter_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, const void* staging,
                    device::Stream stream);

// table[row, index] = block for each of the (row, index, block) in updates [count, 3].
void update_block_table(int32_t* table, int64_t row_stride, int64_t rows, int64_t columns, const int32_t* updates,
                        int64_t count, device::Stream stream);

}  // namespace pagedcore::gpu
