// The ops that move bytes of the cache: arguments in, checks, GIL released around the work.
#include <algorithm>
#include <deque>
#include <vector>

#include "binding.h"
#include "cpu.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

constexpr Signature kReshapeAndCache{"reshape_and_cache", 5, 5, "key", "value", "k_cache", "v_cache", "slot_mapping",
                                     "num_threads"};

void reshape_and_cache(const Arguments<kReshapeAndCache.count>& arguments) {
  const auto& [new_key, new_value, k_cache, v_cache, slot_mapping, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const Tensor key("key", new_key), value("value", new_value), k("k_cache", k_cache), v("v_cache", v_cache),
      slots("slot_mapping", slot_mapping);
  require_dtype(key, kFloats);
  for (const Tensor* t : {&value, &k, &v}) require_same_dtype(*t, key);
  require_dtype(slots, {DType::i64});
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
  CacheWriteParams p{};
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
  without_gil([&] { cpu::reshape_and_cache(p, sizes[Axis::num_blocks], threads); });
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
};

constexpr Signature kCopyBlocks{"copy_blocks", 2, 2, "caches", "pairs", "num_threads"};

void copy_blocks(const Arguments<kCopyBlocks.count>& arguments) {
  const auto& [caches, src_dst, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const BlockArgs blocks(caches);
  const Tensor pairs("pairs", src_dst);
  require_dtype(pairs, {DType::i32});
  Sizes sizes;
  sizes.match(pairs, {Axis::num_pairs, Axis::pair});
  if (pairs.shape[1] != 2 || (pairs.shape[0] > 1 && pairs.strides[0] != 2))
    refuse("pairs", "contiguous int32 [num_pairs, 2]", "another shape or stride");
  for (const Tensor& cache : blocks.tensors) require_disjoint(cache, {&pairs});
  without_gil([&] { cpu::copy_blocks(blocks.regions, pairs.as<const int32_t>(), pairs.shape[0], threads); });
}

constexpr Signature kZeroBlocks{"zero_blocks", 2, 2, "caches", "blocks", "num_threads"};

void zero_blocks(const Arguments<kZeroBlocks.count>& arguments) {
  const auto& [caches, blocks, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const BlockArgs targets(caches);
  const Tensor ids("blocks", blocks);
  require_dtype(ids, {DType::i32});
  Sizes sizes;
  sizes.match(ids, {Axis::count});
  for (const Tensor& cache : targets.tensors) require_disjoint(cache, {&ids});
  without_gil([&] { cpu::zero_blocks(targets.regions, ids.as<const int32_t>(), ids.shape[0], threads); });
}

}  // namespace

PyMethodDef cache_methods[] = {
    PAGEDCORE_METHOD(reshape_and_cache, kReshapeAndCache,
                     "(key, value, k_cache, v_cache, slot_mapping, *, num_threads=None)"),
    PAGEDCORE_METHOD(copy_blocks, kCopyBlocks, "(caches, pairs, *, num_threads=None)"),
    PAGEDCORE_METHOD(zero_blocks, kZeroBlocks, "(caches, blocks, *, num_threads=None)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pagedcore
