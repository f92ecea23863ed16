// pagedcore._kernels: arguments in, checks, GIL released around the work. The only file that knows the Python names.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <optional>

#include "call.h"
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

int64_t at_least(int64_t least, const char* argument, int64_t value) {
  if (value < least) refuse(argument, std::to_string(least) + " or more", std::to_string(value));
  return value;
}

// Many more threads than processors gain nothing, and a runtime that the system refuses one ends the process.
constexpr int kMostThreads = 64;

int threads_of(PyObject* num_threads) {
  const std::optional<int64_t> wanted = optional_int("num_threads", num_threads);
  const int most = cpu::max_threads();
  if (!wanted) return most;
  return static_cast<int>(std::min<int64_t>(at_least(1, "num_threads", *wanted), std::max(most, kMostThreads)));
}

// The environment variable is read by pagedcore.environment alone, once, at the first call that needs an answer.
void require_isa() {
  if (cpu::isa_selected()) return;
  const py::object variable = py::module_::import("pagedcore.environment").attr("CPU_ISA");
  const py::object name = variable.attr("read")();
  if (name.is_none()) {
    cpu::select_best_isa();
  } else {
    const auto source = py::cast<std::string>(variable.attr("name"));
    cpu::select_isa(source.c_str(), py::cast<std::string>(name).c_str());
  }
}

// A size that must be at least 1 and fit the 32 bits that kernels keep it in.
int32_t size32(const Tensor& tensor, const char* symbol, int64_t size, int64_t limit = INT32_MAX) {
  if (size < 1 || size > limit) {
    throw ArgumentError(Fault::invalid_argument, tensor.name,
                        std::string(symbol) + " in [1, " + std::to_string(limit) + "]", std::to_string(size));
  }
  return static_cast<int32_t>(size);
}

constexpr Signature kPagedAttention{
    "paged_attention",
    8,
    7,
    "query",
    "k_cache",
    "v_cache",
    "block_table",
    "seq_lens",
    "query_start_loc",
    "out",
    "lse",
    "scale",
    "causal",
    "window",
    "softcap",
    "alibi_slopes",
    "sinks",
    "max_query_len",
    "max_seq_len",
    "block_table_rows",
    "split_size",
    "num_threads",
};

bool given(PyObject* value) { return value && value != Py_None; }

void paged_attention(const Arguments<kPagedAttention.count>& arguments) {
  const auto& [query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse, scale, causal, window,
               softcap, alibi_slopes, sinks, max_query_len, max_seq_len, block_table_rows, split_size, num_threads] =
      arguments;
  // Scalars first: their conversion may run Python code, and tensors are only borrowed.
  AttentionParams p{};
  const auto given_scale = optional_float("scale", scale);
  p.causal = bool_or(true, "causal", causal);
  if (const auto tokens = optional_int("window", window)) {
    p.window = at_least(1, "window", *tokens);
    if (!p.causal) throw ArgumentError(Fault::unsupported, "window", "causal=True with a window", "causal=False");
  }
  const double cap = optional_float("softcap", softcap).value_or(0.0);
  if (!(cap >= 0.0) || !std::isfinite(static_cast<float>(cap)) || (cap > 0.0 && static_cast<float>(cap) == 0.0f))
    refuse("softcap", "a finite float32, 0 (none) or more", std::to_string(cap));
  p.softcap = static_cast<float>(cap);
  p.max_query_len = at_least(0, "max_query_len", optional_int("max_query_len", max_query_len).value_or(INT64_MAX));
  p.max_seq_len = at_least(0, "max_seq_len", optional_int("max_seq_len", max_seq_len).value_or(INT64_MAX));
  const auto split = optional_int("split_size", split_size);
  if (split && *split < 0) refuse("split_size", "None, 0 or a number of tokens", std::to_string(*split));
  p.split_size = split.value_or(-1);
  const int threads = threads_of(num_threads);

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
  sizes.match(q, {Axis::num_tokens, Axis::num_heads, Axis::head_dim});
  sizes.match(k, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::head_dim});
  sizes.match(v, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::v_head_dim});
  sizes.match(lens, {Axis::num_seqs});
  sizes.match(table, {given(block_table_rows) ? Axis::table_rows : Axis::num_seqs, Axis::max_blocks});
  sizes.match(loc, {Axis::num_starts});
  sizes.match(o, {Axis::num_tokens, Axis::num_heads, Axis::v_head_dim});
  std::optional<Tensor> lse_tensor, rows_tensor, slopes_tensor, sinks_tensor;
  const auto optional_tensor = [&](std::optional<Tensor>& place, const char* name, PyObject* value, DType dtype,
                                   Axis axis) -> const Tensor* {
    if (!given(value)) return nullptr;
    const Tensor& tensor = place.emplace(name, value);
    require_dtype(tensor, {dtype});
    sizes.match(tensor, {axis});
    return &tensor;
  };
  const Tensor* const rows =
      optional_tensor(rows_tensor, "block_table_rows", block_table_rows, DType::i32, Axis::num_seqs);
  const Tensor* const slopes =
      optional_tensor(slopes_tensor, "alibi_slopes", alibi_slopes, DType::f32, Axis::num_heads);
  const Tensor* const sink_logits = optional_tensor(sinks_tensor, "sinks", sinks, DType::f32, Axis::num_heads);
  require_writable(o);
  require_disjoint(o, {&q, &k, &v, &table, &lens, &loc, rows, slopes, sink_logits});

  p.dtype = q.dtype;
  p.num_tokens = sizes[Axis::num_tokens];
  p.num_blocks = sizes[Axis::num_blocks];
  p.max_blocks = sizes[Axis::max_blocks];
  p.num_heads = size32(q, "num_heads", sizes[Axis::num_heads]);
  p.head_dim = size32(q, "head_dim", sizes[Axis::head_dim], 256);
  p.num_kv_heads = size32(k, "num_kv_heads", sizes[Axis::num_kv_heads]);
  p.block_size = size32(k, "block_size", sizes[Axis::block_size]);
  p.v_head_dim = size32(v, "v_head_dim", sizes[Axis::v_head_dim], 256);
  if (p.num_heads % p.num_kv_heads != 0) {
    refuse("query", "num_heads that is a multiple of num_kv_heads = " + std::to_string(p.num_kv_heads),
           std::to_string(p.num_heads));
  }
  const int64_t num_seqs = sizes[Axis::num_seqs];
  if (num_seqs > INT32_MAX - 1) refuse("seq_lens", "fewer than 2^31 sequences", std::to_string(num_seqs));
  if (sizes[Axis::num_starts] != num_seqs + 1) {
    refuse("query_start_loc", std::to_string(num_seqs + 1) + " entries, one more than seq_lens has",
           std::to_string(sizes[Axis::num_starts]));
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
  p.block_table_rows = rows ? rows->as<const int32_t>() : nullptr;
  p.alibi_slopes = slopes ? slopes->as<const float>() : nullptr;
  p.sinks = sink_logits ? sink_logits->as<const float>() : nullptr;
  p.seq_lens = lens.as<const int32_t>();
  p.query_start_loc = loc.as<const int32_t>();
  p.out = o.data;
  p.out_token_stride = o.strides[0];
  p.out_head_stride = o.strides[1];

  if (given(lse)) {
    const Tensor& t = lse_tensor.emplace("lse", lse);
    require_dtype(t, {DType::f32});
    if (t.ndim == 2 && t.shape[0] == p.num_tokens && t.shape[1] == p.num_heads) {
      p.lse_token_stride = t.strides[0];
      p.lse_head_stride = t.strides[1];
    } else {
      sizes.match(t, {Axis::num_tokens, Axis::num_heads});
    }
    require_writable(t);
    require_disjoint(t, {&q, &k, &v, &o, &table, &lens, &loc, rows, slopes, sink_logits});
    p.lse = t.as<float>();
  }

  const double factor = given_scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  if (!std::isfinite(factor) || !std::isfinite(static_cast<float>(factor)))
    refuse("scale", "a finite float32", std::to_string(factor));
  p.scale = static_cast<float>(factor);
  require_isa();
  without_gil([&] { cpu::paged_attention(p, threads); });
}

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

constexpr Signature kReadRange{"read_range", 1, 1, "tensor", "num_threads"};

void read_range(const Arguments<kReadRange.count>& arguments) {
  const auto& [tensor, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const Tensor t("tensor", tensor);
  Sizes sizes;
  sizes.match(t, {Axis::elements});
  require_isa();
  without_gil([&] { cpu::read_range(t.data, t.shape[0] * t.element_size, threads); });
}

constexpr Signature kReadBlocks{"read_blocks", 2, 2, "tensor", "blocks", "num_threads"};

void read_blocks(const Arguments<kReadBlocks.count>& arguments) {
  const auto& [tensor, blocks, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const Tensor t("tensor", tensor), ids("blocks", blocks);
  require_dtype(ids, {DType::i32});
  Sizes sizes;
  sizes.match(t, {Axis::num_blocks, Axis::elements});
  sizes.match(ids, {Axis::count});
  for (int64_t i = 0; i < ids.shape[0]; ++i) {
    const int32_t id = ids.as<const int32_t>()[i];
    if (id < 0 || id >= t.shape[0])
      refuse("blocks", "ids in [0, " + std::to_string(t.shape[0]) + ")", std::to_string(id));
  }
  const cpu::BlockRegion region{t.data, t.shape[0], t.strides[0] * t.element_size, {}, {}, t.shape[1] * t.element_size};
  require_isa();
  without_gil([&] { cpu::read_blocks(region, ids.as<const int32_t>(), ids.shape[0], threads); });
}

// torch's tensor types, once pagedcore.torch has told them.
PyTypeObject* torch_tensor = nullptr;
PyTypeObject* torch_parameter = nullptr;

void set_torch_types(const py::type& tensor, const py::type& parameter) {
  torch_tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch_parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
}

PyObject* any_torch_subclass(PyObject*, PyObject* const* objects, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count && torch_tensor; ++i) {
    PyTypeObject* const type = Py_TYPE(objects[i]);
    if (type == torch_tensor || type == torch_parameter || !PyType_IsSubtype(type, torch_tensor)) continue;
    Py_RETURN_TRUE;
  }
  Py_RETURN_FALSE;
}

#define PAGEDCORE_METHOD(function, signature, text)                                                     \
  {#function, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<signature, function>)), \
   METH_FASTCALL | METH_KEYWORDS, #function text "\n--\n\n"}

// The text is the signature as inspect and stubtest see it.
PyMethodDef methods[] = {
    PAGEDCORE_METHOD(paged_attention, kPagedAttention,
                     "(query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse=None, *, scale=None, "
                     "causal=True, window=None, softcap=0.0, alibi_slopes=None, sinks=None, max_query_len=None, "
                     "max_seq_len=None, block_table_rows=None, "
                     "split_size=None, num_threads=None)"),
    PAGEDCORE_METHOD(reshape_and_cache, kReshapeAndCache,
                     "(key, value, k_cache, v_cache, slot_mapping, *, num_threads=None)"),
    PAGEDCORE_METHOD(copy_blocks, kCopyBlocks, "(caches, pairs, *, num_threads=None)"),
    PAGEDCORE_METHOD(zero_blocks, kZeroBlocks, "(caches, blocks, *, num_threads=None)"),
    PAGEDCORE_METHOD(read_range, kReadRange, "(tensor, *, num_threads=None)"),
    PAGEDCORE_METHOD(read_blocks, kReadBlocks, "(tensor, blocks, *, num_threads=None)"),
    {"any_torch_subclass", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&any_torch_subclass)),
     METH_FASTCALL, "any_torch_subclass(*objects)\n--\n\n"},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_kernels, m) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const ArgumentError&) {
      set_python_error();
    }
  });
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
  m.def("set_torch_types", &set_torch_types, py::arg("tensor"), py::arg("parameter"));
  m.def("cpu_isa", [] {
    require_isa();
    return cpu::selected_isa().name;
  });
  m.def("cpu_isas", &cpu::runnable_isas);
  m.def("select_cpu_isa", [](const char* name) { cpu::select_isa("name", name); }, py::arg("name"));
  m.def("thread_runtime", &cpu::thread_runtime);
  m.def("max_threads", &cpu::max_threads);
}

}  // namespace pagedcore
