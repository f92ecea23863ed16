// pagedcore._kernels: attention, and what the module tells of itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "binding.h"
#include "cpu.h"
#include "isa.h"
#include "threads.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

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

PyMethodDef methods[] = {
    PAGEDCORE_METHOD(paged_attention, kPagedAttention,
                     "(query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse=None, *, scale=None, "
                     "causal=True, window=None, softcap=0.0, alibi_slopes=None, sinks=None, max_query_len=None, "
                     "max_seq_len=None, block_table_rows=None, "
                     "split_size=None, num_threads=None)"),
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
  for (PyMethodDef* functions : {methods, cache_methods, probe_methods}) {
    if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();
  }
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
