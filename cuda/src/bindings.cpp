// pagedcore._kernels: arguments in, checks, GIL released around the work. The only file that knows the Python names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>

#include "cpu.h"
#include "errors.h"
#include "isa.h"
#include "tensor.h"
#include "threads.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

[[noreturn]] void refuse(const char* argument, std::string expected, std::string got) {
  throw ArgumentError(Fault::invalid_argument, argument, std::move(expected), std::move(got));
}

constexpr auto kFloats = {DType::f32, DType::f16, DType::bf16};

Pages pages_of(const Tensor& t) { return {t.data, t.strides[0], t.strides[1], t.strides[2]}; }

int64_t positive(const char* argument, int64_t value) {
  if (value < 1) refuse(argument, "1 or more", std::to_string(value));
  return value;
}

int threads_of(std::optional<int64_t> num_threads) {
  if (!num_threads) return cpu::max_threads();
  return static_cast<int>(std::min<int64_t>(positive("num_threads", *num_threads), 1024));
}

// A size that must be at least 1 and fit the 32 bits that kernels keep it in.
int32_t size32(const Tensor& tensor, const char* symbol, int64_t size, int64_t limit = INT32_MAX) {
  if (size < 1 || size > limit) {
    throw ArgumentError(Fault::invalid_argument, tensor.name,
                        std::string(symbol) + " in [1, " + std::to_string(limit) + "]", std::to_string(size));
  }
  return static_cast<int32_t>(size);
}

void paged_attention(py::handle query, py::handle k_cache, py::handle v_cache, py::handle block_table,
                     py::handle seq_lens, py::handle query_start_loc, py::handle out, py::object lse,
                     std::optional<double> scale, bool causal, std::optional<int64_t> window,
                     std::optional<int64_t> max_query_len, std::optional<int64_t> max_seq_len,
                     py::object block_table_rows, std::optional<int64_t> split_size,
                     std::optional<int64_t> num_threads) {
  const Tensor q("query", query), k("k_cache", k_cache), v("v_cache", v_cache), table("block_table", block_table),
      lens("seq_lens", seq_lens), loc("query_start_loc", query_start_loc), o("out", out);
  require_dtype(q, kFloats);
  require_same_dtype(k, q);
  require_same_dtype(v, q);
  require_same_dtype(o, q);
  require_dtype(table, {DType::i32});
  require_dtype(lens, {DType::i32});
  require_dtype(loc, {DType::i32});

  Sizes sizes;
  sizes.match(q, {"num_tokens", "num_heads", "head_dim"});
  sizes.match(k, {"num_blocks", "num_kv_heads", "block_size", "head_dim"});
  sizes.match(v, {"num_blocks", "num_kv_heads", "block_size", "v_head_dim"});
  sizes.match(lens, {"num_seqs"});
  sizes.match(table, {block_table_rows.is_none() ? "num_seqs" : "table_rows", "max_blocks"});
  sizes.match(loc, {"num_seqs + 1"});
  sizes.match(o, {"num_tokens", "num_heads", "v_head_dim"});
  require_writable(o);
  for (const Tensor* read : {&q, &k, &v, &table, &lens, &loc}) require_disjoint(o, *read);

  AttentionParams p{};
  p.dtype = q.dtype;
  p.num_tokens = sizes["num_tokens"];
  p.num_blocks = sizes["num_blocks"];
  p.max_blocks = sizes["max_blocks"];
  p.num_heads = size32(q, "num_heads", sizes["num_heads"]);
  p.head_dim = size32(q, "head_dim", sizes["head_dim"], 256);
  p.num_kv_heads = size32(k, "num_kv_heads", sizes["num_kv_heads"]);
  p.block_size = size32(k, "block_size", sizes["block_size"]);
  p.v_head_dim = size32(v, "v_head_dim", sizes["v_head_dim"], 256);
  if (p.num_heads % p.num_kv_heads != 0) {
    refuse("query", "num_heads that is a multiple of num_kv_heads = " + std::to_string(p.num_kv_heads),
           std::to_string(p.num_heads));
  }
  const int64_t num_seqs = sizes["num_seqs"];
  if (num_seqs > INT32_MAX - 1) refuse("seq_lens", "fewer than 2^31 sequences", std::to_string(num_seqs));
  if (sizes["num_seqs + 1"] != num_seqs + 1) {
    refuse("query_start_loc", std::to_string(num_seqs + 1) + " entries, one more than seq_lens has",
           std::to_string(sizes["num_seqs + 1"]));
  }
  p.num_seqs = static_cast<int32_t>(num_seqs);
  p.query = q.data;
  p.query_token_stride = q.strides[0];
  p.query_head_stride = q.strides[1];
  p.k = pages_of(k);
  p.v = pages_of(v);
  p.block_table = table.as<const int32_t>();
  p.block_table_stride = table.strides[0];
  p.table_rows = static_cast<int32_t>(std::min<int64_t>(table.shape[0], INT32_MAX));
  p.seq_lens = lens.as<const int32_t>();
  p.query_start_loc = loc.as<const int32_t>();
  p.out = o.data;
  p.out_token_stride = o.strides[0];
  p.out_head_stride = o.strides[1];

  std::optional<Tensor> lse_tensor, rows_tensor;
  if (!lse.is_none()) {
    const Tensor& t = lse_tensor.emplace("lse", lse);
    require_dtype(t, {DType::f32});
    if (t.ndim == 2 && t.shape[0] == p.num_tokens && t.shape[1] == p.num_heads) {
      p.lse_token_stride = t.strides[0];
      p.lse_head_stride = t.strides[1];
    } else {
      sizes.match(t, {"num_tokens", "num_heads"});
    }
    require_writable(t);
    for (const Tensor* other : {&q, &k, &v, &o, &table, &lens, &loc}) require_disjoint(t, *other);
    p.lse = t.as<float>();
  }
  if (!block_table_rows.is_none()) {
    const Tensor& t = rows_tensor.emplace("block_table_rows", block_table_rows);
    require_dtype(t, {DType::i32});
    sizes.match(t, {"num_seqs"});
    p.block_table_rows = t.as<const int32_t>();
  }

  const double factor = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  if (!std::isfinite(factor) || !std::isfinite(static_cast<float>(factor)))
    refuse("scale", "a finite float32", std::to_string(factor));
  p.scale = static_cast<float>(factor);
  p.causal = causal;
  if (window) p.window = positive("window", *window);
  if (window && !causal) throw ArgumentError(Fault::unsupported, "window", "causal=True with a window", "causal=False");
  if (split_size && *split_size < 0) refuse("split_size", "None, 0 or a number of tokens", std::to_string(*split_size));
  if (max_query_len && *max_query_len < 0) refuse("max_query_len", "0 or more", std::to_string(*max_query_len));
  if (max_seq_len && *max_seq_len < 0) refuse("max_seq_len", "0 or more", std::to_string(*max_seq_len));
  if (p.num_seqs > 0) {
    for (int32_t i = 0; i < p.num_seqs && (max_query_len || max_seq_len); ++i) {
      const int64_t query_len = static_cast<int64_t>(p.query_start_loc[i + 1]) - p.query_start_loc[i];
      if (max_query_len && query_len > *max_query_len) {
        refuse("max_query_len",
               "at least the query length of sequence " + std::to_string(i) + ", " + std::to_string(query_len),
               std::to_string(*max_query_len));
      }
      if (max_seq_len && p.seq_lens[i] > *max_seq_len) {
        refuse("max_seq_len",
               "at least the length of sequence " + std::to_string(i) + ", " + std::to_string(p.seq_lens[i]),
               std::to_string(*max_seq_len));
      }
    }
  }
  const int threads = threads_of(num_threads);
  const py::gil_scoped_release release;
  cpu::paged_attention(p, split_size ? *split_size : -1, threads);
}

void reshape_and_cache(py::handle key, py::handle value, py::handle k_cache, py::handle v_cache,
                       py::handle slot_mapping, std::optional<int64_t> num_threads) {
  const Tensor key_t("key", key), value_t("value", value), k("k_cache", k_cache), v("v_cache", v_cache),
      slots("slot_mapping", slot_mapping);
  require_dtype(key_t, kFloats);
  for (const Tensor* t : {&value_t, &k, &v}) require_same_dtype(*t, key_t);
  require_dtype(slots, {DType::i64});
  Sizes sizes;
  sizes.match(key_t, {"num_tokens", "num_kv_heads", "head_dim"});
  sizes.match(value_t, {"num_tokens", "num_kv_heads", "v_head_dim"});
  sizes.match(k, {"num_blocks", "num_kv_heads", "block_size", "head_dim"});
  sizes.match(v, {"num_blocks", "num_kv_heads", "block_size", "v_head_dim"});
  sizes.match(slots, {"num_tokens"});
  for (const Tensor* cache : {&k, &v}) {
    require_writable(*cache);
    for (const Tensor* read : {&key_t, &value_t, &slots}) require_disjoint(*cache, *read);
  }
  CacheWriteParams p{};
  p.key = key_t.data;
  p.value = value_t.data;
  p.key_token_stride = key_t.strides[0];
  p.key_head_stride = key_t.strides[1];
  p.value_token_stride = value_t.strides[0];
  p.value_head_stride = value_t.strides[1];
  p.k = pages_of(k);
  p.v = pages_of(v);
  p.slot_mapping = slots.as<const int64_t>();
  p.num_tokens = sizes["num_tokens"];
  p.num_kv_heads = size32(k, "num_kv_heads", sizes["num_kv_heads"]);
  p.block_size = size32(k, "block_size", sizes["block_size"]);
  p.element_size = key_t.element_size;
  p.key_bytes = sizes["head_dim"] * p.element_size;
  p.value_bytes = sizes["v_head_dim"] * p.element_size;
  const int threads = threads_of(num_threads);
  const py::gil_scoped_release release;
  cpu::reshape_and_cache(p, sizes["num_blocks"], threads);
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

struct BlockArgs {
  std::deque<Tensor> tensors;  // keep buffer views alive; a deque does not move its elements
  std::vector<cpu::BlockRegion> regions;

  explicit BlockArgs(const py::sequence& caches) {
    for (const py::handle cache : caches) regions.push_back(region_of(tensors.emplace_back("kv", cache)));
  }
};

void copy_blocks(const py::sequence& caches, py::handle pairs, std::optional<int64_t> num_threads) {
  const BlockArgs blocks(caches);
  const Tensor t("pairs", pairs);
  require_dtype(t, {DType::i32});
  Sizes sizes;
  sizes.match(t, {"num_pairs", "2"});
  if (t.shape[1] != 2 || (t.shape[0] > 1 && t.strides[0] != 2))
    refuse("pairs", "contiguous int32 [num_pairs, 2]", "another shape or stride");
  const int threads = threads_of(num_threads);
  const py::gil_scoped_release release;
  cpu::copy_blocks(blocks.regions, t.as<const int32_t>(), t.shape[0], threads);
}

void zero_blocks(const py::sequence& caches, py::handle ids, std::optional<int64_t> num_threads) {
  const BlockArgs blocks(caches);
  const Tensor t("blocks", ids);
  require_dtype(t, {DType::i32});
  Sizes sizes;
  sizes.match(t, {"count"});
  const int threads = threads_of(num_threads);
  const py::gil_scoped_release release;
  cpu::zero_blocks(blocks.regions, t.as<const int32_t>(), t.shape[0], threads);
}

void read_range(py::handle tensor, std::optional<int64_t> num_threads) {
  const Tensor t("tensor", tensor);
  Sizes sizes;
  sizes.match(t, {"bytes"});
  const int threads = threads_of(num_threads);
  const py::gil_scoped_release release;
  cpu::read_range(t.data, t.shape[0] * t.element_size, threads);
}

void read_blocks(py::handle tensor, py::handle blocks, std::optional<int64_t> num_threads) {
  const Tensor t("tensor", tensor), ids("blocks", blocks);
  require_dtype(ids, {DType::i32});
  Sizes sizes;
  sizes.match(t, {"num_blocks", "bytes"});
  sizes.match(ids, {"count"});
  for (int64_t i = 0; i < ids.shape[0]; ++i) {
    const int32_t id = ids.as<const int32_t>()[i];
    if (id < 0 || id >= t.shape[0])
      refuse("blocks", "ids in [0, " + std::to_string(t.shape[0]) + ")", std::to_string(id));
  }
  const cpu::BlockRegion region{t.data, t.shape[0], t.strides[0] * t.element_size, {}, {}, t.shape[1] * t.element_size};
  const int threads = threads_of(num_threads);
  const py::gil_scoped_release release;
  cpu::read_blocks(region, ids.as<const int32_t>(), ids.shape[0], threads);
}

void raise(const ArgumentError& error) {
  if (error.fault == Fault::type) {
    PyErr_SetString(PyExc_TypeError, error.what());
    return;
  }
  try {
    const char* name = error.fault == Fault::unsupported ? "UnsupportedError"
                       : error.fault == Fault::block     ? "BlockError"
                                                         : "InvalidArgumentError";
    const py::object type = py::module_::import("pagedcore.errors").attr(name);
    const py::object instance =
        error.fault == Fault::block
            ? type(error.what(), py::arg("block") = error.block, py::arg("num_blocks") = error.num_blocks)
            : type(error.what(), py::arg("argument") = error.argument, py::arg("expected") = error.expected,
                   py::arg("got") = error.got);
    PyErr_SetObject(type.ptr(), instance.ptr());
  } catch (py::error_already_set& other) {
    other.restore();
  }
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ArgumentError& error) {
      raise(error);
    }
  });
  using py::arg;
  m.def("paged_attention", &paged_attention, arg("query"), arg("k_cache"), arg("v_cache"), arg("block_table"),
        arg("seq_lens"), arg("query_start_loc"), arg("out"), arg("lse"), arg("scale"), arg("causal"), arg("window"),
        arg("max_query_len"), arg("max_seq_len"), arg("block_table_rows"), arg("split_size"), arg("num_threads"));
  m.def("reshape_and_cache", &reshape_and_cache, arg("key"), arg("value"), arg("k_cache"), arg("v_cache"),
        arg("slot_mapping"), arg("num_threads"));
  m.def("copy_blocks", &copy_blocks, arg("caches"), arg("pairs"), arg("num_threads"));
  m.def("zero_blocks", &zero_blocks, arg("caches"), arg("blocks"), arg("num_threads"));
  m.def("read_range", &read_range, arg("tensor"), arg("num_threads"));
  m.def("read_blocks", &read_blocks, arg("tensor"), arg("blocks"), arg("num_threads"));
  m.def("cpu_isa", [] { return cpu::selected_isa().name; });
  m.def("cpu_isas", &cpu::runnable_isas);
  m.def("select_cpu_isa", &cpu::select_isa, arg("name"));
  m.def("thread_runtime", &cpu::thread_runtime);
  m.def("max_threads", &cpu::max_threads);
}

}  // namespace pagedcore
