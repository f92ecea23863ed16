// paged_attention: which kernel a call takes, and the memory that its plan and its pieces need. Everything here is
// decided from shapes, strides, alignment and max_query_len: no host knows the lengths.
#include "gpu.h"
#include "plan.h"
#include "tile.h"
#include "tiled.h"

namespace pagedcore::gpu {
namespace {

constexpr int kTiledDims[] = {64, 80, 96, 112, 128, 192, 256};

bool on_16_bytes(const void* data, int64_t token_stride, int64_t head_stride, int64_t block_stride = 0) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(token_stride * 2) |
          static_cast<uintptr_t>(head_stride * 2) | static_cast<uintptr_t>(block_stride * 2)) %
             kChunkBytes ==
         0;
}

}  // namespace

const char* why_not_tiled(const AttentionParams& p) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "the dtype is not float16 or bfloat16";
  if (p.kv_dtype != p.dtype) return "the cache is quantised";
  if (p.head_dim != p.v_head_dim) return "K and V have different head sizes";
  bool known = false;
  for (const int dim : kTiledDims) known = known || p.head_dim == dim;
  if (!known) return "the head size is not 64, 80, 96, 112, 128, 192 or 256";
  if (!on_16_bytes(p.query, p.query_token_stride, p.query_head_stride)) return "rows of query do not start on 16 bytes";
  if (!on_16_bytes(p.k.data, p.k.token_stride, p.k.head_stride, p.k.block_stride)) {
    return "rows of k_cache do not start on 16 bytes";
  }
  if (!on_16_bytes(p.v.data, p.v.token_stride, p.v.head_stride, p.v.block_stride)) {
    return "rows of v_cache do not start on 16 bytes";
  }
  return nullptr;
}

namespace {

constexpr int64_t kAlignment = 16;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The plan's arrays, one after the other in the caller's memory.
WorkPlan work_plan(const AttentionParams& p, const TiledKernel& kernel, void* plan, void* workspace) {
  char* memory = static_cast<char*>(plan);
  auto* first_units = reinterpret_cast<int64_t*>(memory);
  auto* counters = reinterpret_cast<int32_t*>(memory + aligned((int64_t{p.num_seqs} + 1) * 8));
  return {first_units, counters, static_cast<float*>(workspace), kernel.grid};
}

}  // namespace

void load_tiled() {
  load_plan();
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int dim : kTiledDims) {
      AttentionParams p{};
      p.dtype = dtype;
      p.head_dim = p.v_head_dim = dim;
      decode_kernel_for(p);
    }
  }
}

int64_t plan_bytes(const AttentionParams& p) {
  if (why_not_tiled(p) != nullptr) return 0;
  return aligned((int64_t{p.num_seqs} + 1) * 8) + aligned(int64_t{decode_kernel_for(p).grid} * 4);
}

int64_t workspace_bytes(const AttentionParams& p) {
  if (why_not_tiled(p) != nullptr) return 0;
  const TiledKernel kernel = decode_kernel_for(p);
  return 2 * kernel.grid * kernel.record_bytes;
}

void plan_attention(const AttentionParams& p, void* plan, device::Stream stream) {
  if (why_not_tiled(p) != nullptr) return;
  run_plan({p, work_plan(p, decode_kernel_for(p), plan, nullptr)}, stream);
}

void paged_attention(const AttentionParams& p, void* plan, void* workspace, device::Stream stream) {
  if (p.num_tokens == 0) return;
  if (why_not_tiled(p) != nullptr) return attention_generic(p, stream);
  const TiledKernel kernel = decode_kernel_for(p);
  kernel.run({p, work_plan(p, kernel, plan, workspace)}, stream);
}

}  // namespace pagedcore::gpu
