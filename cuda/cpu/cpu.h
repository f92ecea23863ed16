// The CPU backend: each op over plain parameters. Arguments were checked by the caller as far as shapes go; what
// depends on the contents of index tensors (lengths, table entries, slots) is checked here, before anything is written.
#pragma once

#include <cstdint>
#include <vector>

#include "pagedcore/params.h"

namespace pagedcore::cpu {

void paged_attention(const AttentionParams& params, int num_threads);

void merge_states(const MergeParams& params, int num_threads);

void reshape_and_cache(const CacheWriteParams& params, int64_t num_blocks, int num_threads);

// One tensor whose first axis is the block: its inner axes merged into as few as possible, innermost contiguous.
struct BlockRegion {
  char* data;
  int64_t num_blocks;
  int64_t block_stride;          // bytes
  std::vector<int64_t> shape;    // inner axes but the contiguous one, outermost first
  std::vector<int64_t> strides;  // bytes
  int64_t contiguous_bytes;
};

// For each (src, dst) pair and each region: region[dst] = region[src], pairs in order.
void copy_blocks(const std::vector<BlockRegion>& regions, const int32_t* pairs, int64_t num_pairs, int num_threads);
void zero_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, int num_threads);

// Between blocks and a dense staging buffer: region after region, each [count, bytes of its block].
void gather_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, char* staging,
                   int num_threads);
void scatter_blocks(const std::vector<BlockRegion>& regions, const int32_t* blocks, int64_t count, const char* staging,
                    int num_threads);

// table[row, index] = block for each of the (row, index, block) in updates [count, 3], in order.
void update_block_table(int32_t* table, int64_t row_stride, int64_t rows, int64_t columns, const int32_t* updates,
                        int64_t count);

// For benchmarks: read memory on all threads and drop it. A range, or whole blocks of a dense region in the order
// given.
void read_range(const char* data, int64_t bytes, int num_threads);
void read_blocks(const BlockRegion& region, const int32_t* blocks, int64_t count, int num_threads);

}  // namespace pagedcore::cpu
