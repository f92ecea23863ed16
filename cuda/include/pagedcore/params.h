// What an op is asked to do: plain structs of pointers, shapes and strides, passed by value to every backend.
//
// Conventions for all of them:
//   * strides are in elements, may be negative, and every offset is computed in int64: a pool is often larger than 2^31
//   elements;
//   * the last axis of every tensor is contiguous, so it has no stride here;
//   * pointers are not owned and are never null unless the comment says so.
#pragma once

#include <cstdint>

namespace pagedcore {

enum class DType : uint8_t { f32, f16, bf16, i32, i64, u8, e4m3 };

// Columns of K and of V at most: what a lane of the generic GPU kernel has registers for.
constexpr int32_t kMaxHeadDim = 256;

// One side (K or V) of one layer's cache: [num_blocks, num_kv_heads, block_size, dim].
struct Pages {
  void* data;
  int64_t block_stride;
  int64_t head_stride;
  int64_t token_stride;
};

// What the codes of a quantised cache are multiplied by: one factor for the tensor, one a KV head, or one a token and
// KV head ([num_blocks, num_kv_heads, block_size]). A stride is 0 where one factor serves several.
struct Scales {
  float* data;  // null: 1
  int64_t block_stride;
  int64_t head_stride;
  int64_t token_stride;
};

struct AttentionParams {
  const void* query;  // [num_tokens, num_heads, head_dim]
  int64_t query_token_stride;
  int64_t query_head_stride;

  Pages k;                  // dim = head_dim
  Pages v;                  // dim = v_head_dim
  Scales k_scale, v_scale;  // of a quantised cache

  const int32_t* block_table;  // [table_rows, max_blocks], rows block_table_stride apart
  int64_t block_table_stride;
  const int32_t* block_table_rows;  // [num_seqs]: the table row of each sequence; null means row i for sequence i
  const int32_t* seq_lens;          // [num_seqs] tokens in the cache, this step's included
  const int32_t* query_start_loc;   // [num_seqs + 1] cumulative query lengths

  void* out;  // [num_tokens, num_heads, v_head_dim]
  int64_t out_token_stride;
  int64_t out_head_stride;
  float* lse;  // [num_tokens, num_heads], natural log; null: not wanted
  int64_t lse_token_stride;
  int64_t lse_head_stride;

  int64_t num_tokens;
  int64_t num_blocks;
  int64_t max_blocks;  // columns of the block table
  int32_t num_seqs;
  int32_t table_rows;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t v_head_dim;
  int32_t block_size;
  int64_t max_query_len;  // what the caller says of query_start_loc and seq_lens, INT64_MAX: nothing; checked, and not
  int64_t max_seq_len;    // used on the CPU
  int64_t window;         // 0: none; W: position i sees j if i - W < j <= i
  int64_t split_size;     // -1: the planner cuts a sequence's keys as it likes; 0: never; n: at multiples of n tokens
  int64_t shared_tokens;  // of a pass of cascade attention: what all sequences begin with; else 0. A GPU's plan is for
                          // one number of them, as the lengths are that lie in a cascade's plan
  float scale;            // multiplies the scores
  float softcap;          // c > 0: a scaled score s becomes c * tanh(s / c); 0: none
  const float* alibi_slopes;  // [num_heads]; a key at distance d from the query gets -slope * d; null: none
  const float* sinks;  // [num_heads] logits, each of a key without a value that all rows of its head see; null: none
  bool causal;
  DType dtype;       // of query and out
  DType kv_dtype;    // of k and v: dtype, or e4m3
  uint32_t* faults;  // [kDeviceFaults], see faults.h; null: nobody wants to know. Not used on the CPU
};

// Attention's output over some of the keys.
struct PartialOutput {
  void* out;  // [num_tokens, num_heads, v_head_dim]
  int64_t out_token_stride;
  int64_t out_head_stride;
  float* lse;  // [num_tokens, num_heads], natural log
  int64_t lse_token_stride;
  int64_t lse_head_stride;
};

struct MergeParams {
  PartialOutput a, b;   // read: over disjoint keys, without sinks
  PartialOutput total;  // written
  const float* sinks;   // as in AttentionParams
  int64_t num_tokens;
  int32_t num_heads;
  int32_t v_head_dim;
  DType dtype;  // of every out
};

struct CacheWriteParams {
  const void* key;    // [num_tokens, num_kv_heads, head_dim]
  const void* value;  // [num_tokens, num_kv_heads, v_head_dim]
  int64_t key_token_stride, key_head_stride;
  int64_t value_token_stride, value_head_stride;
  Pages k, v;
  Scales k_scale, v_scale;            // of a quantised cache
  bool makes_k_scale, makes_v_scale;  // a factor a token: made of the row, and written
  const int64_t* slot_mapping;        // [num_tokens] block * block_size + offset; negative: the token is not written
  int64_t num_tokens;
  int32_t num_kv_heads;
  int32_t block_size;
  int64_t key_bytes;    // head_dim * element size
  int64_t value_bytes;  // v_head_dim * element size
  int32_t element_size;
  DType dtype;       // of key and value
  DType kv_dtype;    // of k and v: dtype, or e4m3
  uint32_t* faults;  // as above
};

}  // namespace pagedcore
