// The GPU backend: each op over plain parameters, on a stream. Arguments were checked by the caller as far as shapes
// and types go. The contents of index tensors are not read on the host: what is out of range is masked by the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pagedcore/params.h"
#include "pagedcore/stream.h"

namespace pagedcore::gpu {

// Of a plan and of a workspace, and of what lies in them.
constexpr int64_t kMemoryAlignment = 16;
constexpr int64_t aligned(int64_t bytes) {
  return (bytes + kMemoryAlignment - 1) / kMemoryAlignment * kMemoryAlignment;
}

// paged_attention (paged_attention.cu): attention of this step's queries over paged KV. Which kernel runs is decided
// from what the host knows, that is shapes, strides, alignment and max_query_len, never from lengths.
//
// A plan says how a step's work is cut, and is made on the device. Layers that agree in num_tokens, num_seqs, heads,
// head sizes, dtype, window, causal, split_size, max_query_len, and in lengths and query starts, share one. To the
// caller it is plan_bytes() bytes of device memory on 16 bytes. It and the workspace, workspace_bytes() bytes on 16,
// belong to one stream: attention changes both, and leaves the plan as it found it.
int64_t plan_bytes(const AttentionParams& params);
int64_t workspace_bytes(const AttentionParams& params);
// Enough for every call of at most these num_tokens, num_seqs and max_query_len, and otherwise like this one.
struct AttentionMemory {
  int64_t plan, workspace;
};
AttentionMemory most_memory(const AttentionParams& params);
void plan_attention(const AttentionParams& params, void* plan, device::Stream stream);
void paged_attention(const AttentionParams& params, void* plan, void* workspace, device::Stream stream);

// Null if the tensor-core kernels take it; else why not, in words.
const char* why_not_tiled(const AttentionParams& params);
// The kernel that a call takes: generic, decode, mixed or prefill.
const char* kernel_name(const AttentionParams& params);

// One plain kernel for every dtype, head size, stride and block size, which needs no plan (attention_generic.cu): what
// the tiled kernels do not take, and their oracle.
void attention_generic(const AttentionParams& params, device::Stream stream);

// Load the kernels of a file onto the current device (warm_up).
void load_attention_generic();
void load_tiled();
void load_cache_ops();
void load_merge();
void load_quantise();

// Outputs over disjoint keys as one (merge.cu).
void merge_states(const MergeParams& params, device::Stream stream);

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
  uint32_t* faults;  // [kDeviceFaults] or null, as in the parameters of the other ops
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
                        int64_t count, uint32_t* faults, device::Stream stream);

}  // namespace pagedcore::gpu
