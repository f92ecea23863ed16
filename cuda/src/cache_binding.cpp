// The ops that move bytes of the cache: arguments in, checks, GIL released around the work.
#include <algorithm>
#include <deque>
#include <vector>

#include "binding.h"
#include "cpu.h"
#include "target.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

constexpr Signature kReshapeAndCache{
    "reshape_and_cache", 5,         5,         "key",        "value", "k_cache", "v_cache",
    "slot_mapping",      "k_scale", "v_scale", "num_threads"};

void reshape_and_cache(const Arguments<kReshapeAndCache.count>& arguments) {
  const auto& [new_key, new_value, k_cache, v_cache, slot_mapping, k_scale, v_scale, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const Tensor key("key", new_key, kFloats), value("value", new_value, kFloats), k("k_cache", k_cache, kCaches),
      v("v_cache", v_cache, kCaches), slots("slot_mapping", slot_mapping, {DType::i64});
  require_same_dtype(value, key);
  CacheWriteParams p{};
  p.dtype = key.dtype;
  p.kv_dtype = require_caches(k, v, key);
  const ScalesArgument k_scales("k_scale", k_scale, p.kv_dtype), v_scales("v_scale", v_scale, p.kv_dtype);
  Sizes sizes;
  sizes.match(key, {Axis::num_tokens, Axis::num_kv_heads, Axis::head_dim});
  sizes.match(value, {Axis::num_tokens, Axis::num_kv_heads, Axis::v_head_dim});
  sizes.match(k, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::head_dim});
  sizes.match(v, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::v_head_dim});
  sizes.match(slots, {Axis::num_tokens});
  for (const Tensor* cache : {&k, &v}) {
    require_writable(*cache);
    require_disjoint(*cache, {&key, &value, &slots});
  }
  // Scales of tokens are written. They may lie between the codes, in the blocks' records.
  p.k_scale = k_scales.scales(sizes);
  p.v_scale = v_scales.scales(sizes);
  p.makes_k_scale = k_scales.per_token();
  p.makes_v_scale = v_scales.per_token();
  for (const ScalesArgument* scales : {&k_scales, &v_scales}) {
    if (!scales->per_token()) continue;
    require_writable(*scales->get());
    require_disjoint(*scales->get(), {&key, &value, &slots});
  }
  p.key = key.data;
  p.value = value.data;
  p.key_token_stride = key.strides[0];
  p.key_head_stride = key.strides[1];
  p.value_token_stride = value.strides[0];
  p.value_head_stride = value.strides[1];
  p.k = pages_of(k);
  p.v = pages_of(v);
  p.slot_mapping = slots.as<const int64_t>();
  p.num_tokens = sizes[Axis::num_tokens];
  p.num_kv_heads = size32(k, "num_kv_heads", sizes[Axis::num_kv_heads]);
  p.block_size = size32(k, "block_size", sizes[Axis::block_size]);
  p.element_size = key.element_size;
  p.key_bytes = sizes[Axis::head_dim] * p.element_size;
  p.value_bytes = sizes[Axis::v_head_dim] * p.element_size;
  const int64_t num_blocks = sizes[Axis::num_blocks];
  if (require_one_device({&key, &value, &k, &v, &slots, k_scales.get(), v_scales.get()}).cuda) {
    return on_gpu(key, [&](device::Stream stream, uint32_t* faults) {
      p.faults = faults;
      gpu::reshape_and_cache(p, num_blocks, stream);
    });
  }
  without_gil([&] { cpu::reshape_and_cache(p, num_blocks, threads); });
}

// A tensor's blocks with their inner axes in memory order and merged, so that a transposed view of a dense block is
// still one run.
cpu::BlockRegion region_of(const Tensor& t) {
  if (t.ndim < 2) refuse(t.name, "[num_blocks, ...]", std::to_string(t.ndim) + " dimension(s)");
  require_writable(t);
  struct Axis {
    int64_t size, stride;
  };
  std::vector<Axis> axes;
  bool empty = false;
  for (int i = 1; i < t.ndim; ++i) {
    const auto axis = static_cast<size_t>(i);
    if (t.shape[axis] == 0) empty = true;
    if (t.shape[axis] > 1) axes.push_back({t.shape[axis], t.strides[axis] * t.element_size});
  }
  std::stable_sort(axes.begin(), axes.end(),
                   [](const Axis& a, const Axis& b) { return std::abs(a.stride) > std::abs(b.stride); });
  cpu::BlockRegion region{t.data, t.shape[0], t.strides[0] * t.element_size, {}, {}, t.element_size};
  if (empty) {
    region.contiguous_bytes = 0;
    return region;
  }
  while (!axes.empty() && axes.back().stride == region.contiguous_bytes) {
    region.contiguous_bytes *= axes.back().size;
    axes.pop_back();
  }
  for (const Axis& axis : axes) {
    region.shape.push_back(axis.size);
    region.strides.push_back(axis.stride);
  }
  return region;
}

// The caches of a block op: a list or tuple of tensors.
struct BlockArgs {
  py::object owner;            // keeps the tensors
  std::deque<Tensor> tensors;  // keep buffer views; a deque does not move its elements
  std::vector<cpu::BlockRegion> regions;

  explicit BlockArgs(PyObject* caches) : owner(py::reinterpret_steal<py::object>(PySequence_Tuple(caches))) {
    if (!owner) throw py::error_already_set();
    for (const py::handle cache : py::reinterpret_borrow<py::tuple>(owner))
      regions.push_back(region_of(tensors.emplace_back("kv", cache)));
  }

  void require_apart(const Tensor& other) const {
    for (const Tensor& cache : tensors) require_disjoint(cache, {&other});
  }
  // The device of all caches and of `others`.
  Device device(const Tensor& first, const Tensor* second = nullptr) const {
    for (const Tensor& cache : tensors) require_one_device({&cache, &first, second});
    return require_one_device({&first, second});
  }
  // Bytes of one block in all caches.
  int64_t block_bytes() const {
    int64_t bytes = 0;
    for (const cpu::BlockRegion& region : regions) bytes += bytes_of(region);
    return bytes;
  }

  static int64_t bytes_of(const cpu::BlockRegion& region) {
    int64_t bytes = region.contiguous_bytes;
    for (const int64_t extent : region.shape) bytes *= extent;
    return bytes;
  }
};

// The GPU kernels take a block of at most two axes of contiguous runs.
gpu::BlockRegion gpu_region(const cpu::BlockRegion& region, uint32_t* faults) {
  if (region.shape.size() > 2) {
    refuse("kv", "blocks whose memory is at most two axes of contiguous runs",
           std::to_string(region.shape.size()) + " axes");
  }
  gpu::BlockRegion r{region.data, region.num_blocks, region.block_stride, {1, 1}, {0, 0}, region.contiguous_bytes,
                     faults};
  for (size_t i = 0, at = 2 - region.shape.size(); i < region.shape.size(); ++i, ++at) {
    r.shape[at] = region.shape[i];
    r.strides[at] = region.strides[i];
  }
  return r;
}

template <class Op>
void for_each_gpu_region(const Tensor& ids, const BlockArgs& blocks, const Op& op) {
  on_gpu(ids, [&](device::Stream stream, uint32_t* faults) {
    std::vector<gpu::BlockRegion> regions;  // all are checked before the first is launched
    for (const cpu::BlockRegion& region : blocks.regions) regions.push_back(gpu_region(region, faults));
    for (const gpu::BlockRegion& region : regions) op(region, stream);
  });
}

// [count, columns], or [count] for one column: int32 without gaps.
void require_rows(const Tensor& ids, std::initializer_list<Axis> axes, int64_t columns) {
  Sizes sizes;
  sizes.match(ids, axes);
  if (columns > 1 && (ids.shape[1] != columns || (ids.shape[0] > 1 && ids.strides[0] != columns))) {
    refuse(ids.name, "contiguous int32 [" + std::to_string(ids.shape[0]) + ", " + std::to_string(columns) + "]",
           "another shape or stride");
  }
}

constexpr Signature kCopyBlocks{"copy_blocks", 2, 2, "caches", "pairs", "num_threads"};

void copy_blocks(const Arguments<kCopyBlocks.count>& arguments) {
  const auto& [caches, src_dst, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const BlockArgs blocks(caches);
  const Tensor pairs("pairs", src_dst, {DType::i32});
  require_rows(pairs, {Axis::num_pairs, Axis::pair}, 2);
  blocks.require_apart(pairs);
  const auto* const ids = pairs.as<const int32_t>();
  const int64_t count = pairs.shape[0];
  if (blocks.device(pairs).cuda) {
    return for_each_gpu_region(pairs, blocks, [&](const gpu::BlockRegion& region, device::Stream stream) {
      gpu::copy_blocks(region, ids, count, stream);
    });
  }
  without_gil([&] { cpu::copy_blocks(blocks.regions, ids, count, threads); });
}

constexpr Signature kZeroBlocks{"zero_blocks", 2, 2, "caches", "blocks", "num_threads"};

void zero_blocks(const Arguments<kZeroBlocks.count>& arguments) {
  const auto& [caches, block_ids, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const BlockArgs blocks(caches);
  const Tensor ids("blocks", block_ids, {DType::i32});
  require_rows(ids, {Axis::count}, 1);
  blocks.require_apart(ids);
  const auto* const list = ids.as<const int32_t>();
  const int64_t count = ids.shape[0];
  if (blocks.device(ids).cuda) {
    return for_each_gpu_region(ids, blocks, [&](const gpu::BlockRegion& region, device::Stream stream) {
      gpu::zero_blocks(region, list, count, stream);
    });
  }
  without_gil([&] { cpu::zero_blocks(blocks.regions, list, count, threads); });
}

// What gather and scatter share: `staging` holds, cache after cache, [count, bytes of its block].
struct StagedArgs {
  BlockArgs blocks;
  Tensor ids, staging;
  const int32_t* list;
  int64_t count;
  bool cuda;

  StagedArgs(PyObject* caches, PyObject* block_ids, const char* name, PyObject* buffer)
      : blocks(caches), ids("blocks", block_ids, {DType::i32}), staging(name, buffer) {
    require_rows(ids, {Axis::count}, 1);
    list = ids.as<const int32_t>();
    count = ids.shape[0];
    require_dense(staging);
    const int64_t bytes = staging.bytes();
    const int64_t needed = count * blocks.block_bytes();
    if (bytes != needed) {
      refuse(name,
             std::to_string(needed) + " bytes: " + std::to_string(count) + " blocks of " +
                 std::to_string(blocks.block_bytes()),
             std::to_string(bytes));
    }
    blocks.require_apart(staging);
    cuda = blocks.device(ids, &staging).cuda;
  }

  // op(region, where it begins in the staging buffer, stream)
  template <class Op>
  void run_on_gpu(const Op& op) const {
    char* at = staging.data;
    for_each_gpu_region(ids, blocks, [&](const gpu::BlockRegion& region, device::Stream stream) {
      op(region, at, stream);
      at += count * region.shape[0] * region.shape[1] * region.contiguous_bytes;
    });
  }
};

constexpr Signature kGatherBlocks{"gather_blocks", 3, 3, "caches", "blocks", "out", "num_threads"};

void gather_blocks(const Arguments<kGatherBlocks.count>& arguments) {
  const auto& [caches, block_ids, out, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const StagedArgs a(caches, block_ids, "out", out);
  require_writable(a.staging);
  require_disjoint(a.staging, {&a.ids});
  if (a.cuda) {
    return a.run_on_gpu([&](const gpu::BlockRegion& region, char* to, device::Stream stream) {
      gpu::gather_blocks(region, a.list, a.count, to, stream);
    });
  }
  without_gil([&] { cpu::gather_blocks(a.blocks.regions, a.list, a.count, a.staging.data, threads); });
}

constexpr Signature kScatterBlocks{"scatter_blocks", 3, 3, "caches", "blocks", "src", "num_threads"};

void scatter_blocks(const Arguments<kScatterBlocks.count>& arguments) {
  const auto& [caches, block_ids, src, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const StagedArgs a(caches, block_ids, "src", src);
  a.blocks.require_apart(a.ids);
  if (a.cuda) {
    return a.run_on_gpu([&](const gpu::BlockRegion& region, const char* from, device::Stream stream) {
      gpu::scatter_blocks(region, a.list, a.count, from, stream);
    });
  }
  without_gil([&] { cpu::scatter_blocks(a.blocks.regions, a.list, a.count, a.staging.data, threads); });
}

constexpr Signature kUpdateBlockTable{"update_block_table", 2, 2, "table", "updates"};

void update_block_table(const Arguments<kUpdateBlockTable.count>& arguments) {
  const auto& [block_table, row_index_block] = arguments;
  const Tensor table("table", block_table, {DType::i32}), updates("updates", row_index_block, {DType::i32});
  Sizes sizes;
  sizes.match(table, {Axis::table_rows, Axis::max_blocks});
  require_rows(updates, {Axis::num_updates, Axis::update}, 3);
  require_writable(table);
  require_disjoint(table, {&updates});
  auto* const entries = table.as<int32_t>();
  const auto* const list = updates.as<const int32_t>();
  const int64_t rows = table.shape[0], columns = table.shape[1], count = updates.shape[0];
  if (require_one_device({&table, &updates}).cuda) {
    return on_gpu(table, [&](device::Stream stream, uint32_t* faults) {
      gpu::update_block_table(entries, table.strides[0], rows, columns, list, count, faults, stream);
    });
  }
  without_gil([&] { cpu::update_block_table(entries, table.strides[0], rows, columns, list, count); });
}

}  // namespace

PyMethodDef cache_methods[] = {
    PAGEDCORE_METHOD(reshape_and_cache, kReshapeAndCache,
                     "(key, value, k_cache, v_cache, slot_mapping, *, k_scale=None, v_scale=None, num_threads=None)"),
    PAGEDCORE_TRY_METHOD(reshape_and_cache, kReshapeAndCache,
                         "(key, value, k_cache, v_cache, slot_mapping, k_scale, v_scale, num_threads, /)"),
    PAGEDCORE_METHOD(copy_blocks, kCopyBlocks, "(caches, pairs, *, num_threads=None)"),
    PAGEDCORE_METHOD(zero_blocks, kZeroBlocks, "(caches, blocks, *, num_threads=None)"),
    PAGEDCORE_METHOD(gather_blocks, kGatherBlocks, "(caches, blocks, out, *, num_threads=None)"),
    PAGEDCORE_METHOD(scatter_blocks, kScatterBlocks, "(caches, blocks, src, *, num_threads=None)"),
    PAGEDCORE_METHOD(update_block_table, kUpdateBlockTable, "(table, updates)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pagedcore
