// paged_attention: which kernel a call takes, and the memory that its plan and its pieces need. Everything here is
// decided from shapes, strides, alignment and max_query_len: no host knows the lengths.
#include <algorithm>
#include <initializer_list>

#include "gpu.h"
#include "plan.h"
#include "tile.h"
#include "tiled.h"

namespace pagedcore::gpu {
namespace {

constexpr int kTiledDims[] = {PAGEDCORE_TILED_HEAD_DIMS};

// Strides in elements of so many bytes.
bool on_16_bytes(int bytes, const void* data, int64_t token_stride, int64_t head_stride, int64_t block_stride = 0) {
  return (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(token_stride * bytes) |
          static_cast<uintptr_t>(head_stride * bytes) | static_cast<uintptr_t>(block_stride * bytes)) %
             kChunkBytes ==
         0;
}

}  // namespace

const char* why_not_tiled(const AttentionParams& p) {
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "the dtype is not float16 or bfloat16";
  const bool codes = p.kv_dtype == DType::e4m3;
  if (p.head_dim != p.v_head_dim) return "K and V have different head sizes";
  bool known = false;
  for (const int dim : kTiledDims) known = known || p.head_dim == dim;
  if (!known) return "the head size is not 64, 80, 96, 112, 128, 192 or 256";
  if (codes && !takes_codes(p.head_dim)) return "the cache holds codes and the head size is not 64 or 128";
  if (!on_16_bytes(2, p.query, p.query_token_stride, p.query_head_stride))
    return "rows of query do not start on 16 bytes";
  const int bytes = codes ? 1 : 2;
  if (!on_16_bytes(bytes, p.k.data, p.k.token_stride, p.k.head_stride, p.k.block_stride)) {
    return "rows of k_cache do not start on 16 bytes";
  }
  if (!on_16_bytes(bytes, p.v.data, p.v.token_stride, p.v.head_stride, p.v.block_stride)) {
    return "rows of v_cache do not start on 16 bytes";
  }
  for (const Pages* pages : {&p.k, &p.v}) {
    const int64_t stride = pages->token_stride < 0 ? -pages->token_stride : pages->token_stride;
    if (stride * p.block_size + p.head_dim >= int64_t{1} << 31) return "a block of one head spans 2^31 elements";
  }
  return nullptr;
}

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// From how many rows a sequence on, on the average, tiles of 128 are taken although some sequences may decode. Where
// all are known to be alike, from one full tile on.
constexpr int64_t kPrefillRows = 512;
constexpr int64_t kPrefillTile = 128;

enum class Tiles { decode, mixed, prefill };

// Query tokens of a sequence at most. Where a caller said that there are none, what there is is flagged.
int64_t longest_query(const AttentionParams& p) {
  return std::max<int64_t>(1, std::min(p.max_query_len, p.num_tokens));
}

// With a split_size a sequence has the same bits in any company. Tiles of 64 and of 128 rows give a row the same, tiles
// of 16 do not: a sequence of few rows has these in every launch that it may be in, or in none.
bool same_in_any_company(const AttentionParams& p) {
  return p.split_size >= 0 && p.num_heads / p.num_kv_heads <= kFewRows;
}

// The tiles that calls may have which are like this one, but for the number of tokens and sequences and, where it makes
// queries shorter, max_query_len.
struct PossibleTiles {
  bool decode, mixed, prefill;
};

PossibleTiles possible_tiles(const AttentionParams& p) {
  const bool same = same_in_any_company(p);
  const bool decode = !(same && p.head_dim > kMostDimOfBothTiles);
  const int64_t rows = longest_query(p) * (p.num_heads / p.num_kv_heads);
  return {decode, !decode || rows > kFewRows, rows >= kPrefillTile && !same && takes_prefill(p.head_dim)};
}

Tiles tiles_for(const AttentionParams& p) {
  const PossibleTiles possible = possible_tiles(p);
  if (!possible.mixed) return Tiles::decode;
  if (!possible.prefill) return Tiles::mixed;
  const bool alike = p.num_tokens == p.num_seqs * longest_query(p);
  const int64_t group = p.num_heads / p.num_kv_heads;
  return alike || p.num_tokens * group >= p.num_seqs * kPrefillRows ? Tiles::prefill : Tiles::mixed;
}

TiledKernel mixed_kernel_for(const AttentionParams& p) {
  return of_its_elements(p, mixed_kernel_of<f16>, mixed_kernel_of<bf16>, mixed_kernel_of<Codes>);
}

TiledKernel kernel_for(const AttentionParams& p) {
  switch (tiles_for(p)) {
    case Tiles::decode:
      return decode_kernel_for(p);
    case Tiles::prefill:
      return prefill_kernel_for(p);
    default:
      return mixed_kernel_for(p);
  }
}

// What a unit costs in a launch that has both sizes: reading 64 keys at the bandwidth of an SM's share, and multiplying
// them with 64 rows at what mma.sync reaches, both about a microsecond on an H100. To be measured.
constexpr int kFewWeight = 4;
constexpr int kManyWeight = 3;
// Pieces of fixed size that may wait to be merged, per block. Of what has no room, each item is one block's.
constexpr int64_t kWaitingPieces = 4;

// How the call is cut, and its arrays one after the other in the caller's plan.
struct Layout {
  WorkPlan plan;
  int64_t plan_bytes, workspace_bytes;
};

// One number of many (FNV-1a over their bytes).
uint64_t digest(std::initializer_list<int64_t> numbers) {
  uint64_t result = 0xcbf29ce484222325u;
  for (const int64_t number : numbers) {
    for (int shift = 0; shift < 64; shift += 8) {
      result = (result ^ (static_cast<uint64_t>(number) >> shift & 0xff)) * 0x100000001b3u;
    }
  }
  return result;
}

Layout lay_out(const AttentionParams& p, const TiledKernel& kernel, void* plan_memory, void* workspace) {
  WorkPlan plan{};
  const int64_t group = p.num_heads / p.num_kv_heads;
  // Of rows r and tiles of R there are ceil(r / R) <= r / R + 1.
  plan.most_items = static_cast<int32_t>(p.num_tokens * group / kernel.many_tile + p.num_seqs);
  plan.grid = kernel.grid;
  plan.few_tile = kernel.few_tile;
  plan.many_tile = kernel.many_tile;
  const bool mixed = kernel.few_tile != kernel.many_tile && p.split_size <= 0;
  plan.few_weight = mixed ? kFewWeight : 1;
  plan.many_weight = mixed ? kManyWeight : 1;
  plan.rule = score_rule(p);
  plan.by_block_size = Divisor::of(p.block_size > 0 ? p.block_size : 1);  // a plan is made without the cache
  plan.by_group = Divisor::of(static_cast<int32_t>(group));
  plan.unit_keys = kUnitKeys;
  if (p.split_size < 0) plan.grain = kSmallestPiece / kUnitKeys;
  if (p.split_size > 0) {
    const int64_t piece = ceil_div(p.split_size, kUnitKeys) * kUnitKeys;
    plan.fixed = true;
    plan.grain = 1;
    plan.unit_keys = static_cast<int32_t>(piece < kLargestPiece ? piece : kLargestPiece);
    plan.most_pieces = static_cast<int32_t>(kWaitingPieces * plan.grid);
  }

  plan.made_for = digest({p.num_tokens, p.num_seqs, p.num_heads, p.num_kv_heads, p.causal, p.window, p.shared_tokens,
                          plan.grid, plan.few_tile, plan.many_tile, plan.few_weight, plan.many_weight, plan.unit_keys,
                          plan.grain, plan.fixed});

  char* at = static_cast<char*>(plan_memory);
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* const place = at == nullptr ? nullptr : at + offset;
    offset += aligned(bytes);
    return place;
  };
  plan.header = reinterpret_cast<PlanHeader*>(take(sizeof(PlanHeader)));
  plan.items =
      reinterpret_cast<TileItem*>(take((int64_t{plan.most_items} + 1) * static_cast<int64_t>(sizeof(TileItem))));
  plan.first_items = reinterpret_cast<int32_t*>(take((int64_t{p.num_seqs} + 1) * 4));
  plan.block_items = reinterpret_cast<int32_t*>(take(int64_t{plan.grid} * 4));
  plan.counters = reinterpret_cast<int32_t*>(take(int64_t{plan.grid} * 4));
  plan.records = static_cast<float*>(workspace);
  return {plan, offset, (2 * int64_t{plan.grid} + plan.most_pieces) * kernel.record_bytes};
}

}  // namespace

void load_tiled() {
  load_plan();
  for (const DType dtype : {DType::f16, DType::bf16}) {
    for (const int dim : kTiledDims) {
      AttentionParams p{};
      for (const DType kv_dtype : {dtype, DType::e4m3}) {
        if (kv_dtype == DType::e4m3 && !takes_codes(dim)) continue;
        p.dtype = dtype;
        p.kv_dtype = kv_dtype;
        p.head_dim = p.v_head_dim = dim;
        decode_kernel_for(p);
        mixed_kernel_for(p);
        if (takes_prefill(dim)) prefill_kernel_for(p);
      }
    }
  }
}

AttentionMemory most_memory(const AttentionParams& p) {
  if (why_not_tiled(p) != nullptr) return {0, 0};
  AttentionMemory most{0, 0};
  const auto add = [&](const TiledKernel& kernel) {
    const Layout layout = lay_out(p, kernel, nullptr, nullptr);
    most.plan = layout.plan_bytes > most.plan ? layout.plan_bytes : most.plan;
    most.workspace = layout.workspace_bytes > most.workspace ? layout.workspace_bytes : most.workspace;
  };
  const PossibleTiles possible = possible_tiles(p);
  if (possible.decode) add(decode_kernel_for(p));
  if (possible.mixed) add(mixed_kernel_for(p));
  if (possible.prefill) add(prefill_kernel_for(p));
  return most;
}

const char* kernel_name(const AttentionParams& p) {
  if (why_not_tiled(p) != nullptr) return "generic";
  switch (tiles_for(p)) {
    case Tiles::decode:
      return "decode";
    case Tiles::prefill:
      return "prefill";
    default:
      return "mixed";
  }
}

int64_t plan_bytes(const AttentionParams& p) {
  return why_not_tiled(p) != nullptr ? 0 : lay_out(p, kernel_for(p), nullptr, nullptr).plan_bytes;
}

int64_t workspace_bytes(const AttentionParams& p) {
  return why_not_tiled(p) != nullptr ? 0 : lay_out(p, kernel_for(p), nullptr, nullptr).workspace_bytes;
}

void plan_attention(const AttentionParams& p, void* plan, device::Stream stream) {
  if (why_not_tiled(p) != nullptr) return;
  run_plan({p, lay_out(p, kernel_for(p), plan, nullptr).plan}, stream);
}

void paged_attention(const AttentionParams& p, void* plan, void* workspace, device::Stream stream) {
  if (p.num_tokens == 0) return;
  if (why_not_tiled(p) != nullptr) return attention_generic(p, stream);
  const TiledKernel kernel = kernel_for(p);
  kernel.run({p, lay_out(p, kernel, plan, workspace).plan}, stream);
}

}  // namespace pagedcore::gpu
