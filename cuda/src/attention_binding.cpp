// Attention, its plan and its workspace: arguments in, checks, GIL released around the work.
#include <algorithm>
#include <cmath>
#include <optional>

#include "binding.h"
#include "cpu.h"
#include "target.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

// How many sequences there are: few enough for the places in a plan, one a sequence and one a tile, to be of 32 bits.
int32_t sequences32(int64_t num_seqs) {
  constexpr int64_t kMost = int64_t{1} << 30;
  if (num_seqs > kMost) refuse("seq_lens", "at most 2^30 sequences", std::to_string(num_seqs));
  return static_cast<int32_t>(num_seqs);
}

// Which keys a query sees, and how they may be cut.
void read_mask(AttentionParams& p, PyObject* causal, PyObject* window, PyObject* split_size) {
  p.causal = bool_or(true, "causal", causal);
  if (const auto tokens = optional_int("window", window)) {
    p.window = at_least(1, "window", *tokens);
    if (!p.causal) throw ArgumentError(Fault::unsupported, "window", "causal=True with a window", "causal=False");
  }
  p.split_size = split_size_of(split_size);
}

// Memory that a GPU op works in: any tensor without gaps, of at least so many bytes, on 16 bytes.
char* scratch(const Tensor& tensor, int64_t bytes) {
  require_dense(tensor);
  require_writable(tensor);
  const int64_t has = tensor.bytes();
  if (has < bytes) refuse(tensor.name, std::to_string(bytes) + " bytes or more", std::to_string(has));
  if (reinterpret_cast<uintptr_t>(tensor.data) % gpu::kMemoryAlignment != 0)
    refuse(tensor.name, "memory on " + std::to_string(gpu::kMemoryAlignment) + " bytes", "misaligned memory");
  return tensor.data;
}

// The plan lies behind the workspace where the caller gave no plan of their own.
void attend_on_gpu(AttentionParams p, const Tensor& query, PyObject* query_object, const Tensor* plan,
                   const Tensor* workspace) {
  if constexpr (kGpuBuilt) {
    int64_t plan_bytes = 0, workspace_bytes = 0;
    {
      const gpu::DeviceGuard guard(query.device.id);
      plan_bytes = gpu::plan_bytes(p);
      workspace_bytes = gpu::aligned(gpu::workspace_bytes(p));
    }
    const int64_t needed = workspace_bytes + (plan ? 0 : plan_bytes);
    py::object owner;  // what is allocated here lives until the launches are on their stream
    std::optional<Tensor> made;
    if (!workspace && needed > 0) {
      owner = py::module_::import("pagedcore.tensors").attr("new_bytes")(py::handle(query_object), needed);
      workspace = &made.emplace("workspace", owner);
    }
    char* const memory = workspace ? scratch(*workspace, needed) : nullptr;
    char* const plan_memory = plan ? scratch(*plan, plan_bytes) : memory + workspace_bytes;
    on_gpu(query, [&](device::Stream stream, uint32_t* faults) {
      p.faults = faults;
      if (!plan) gpu::plan_attention(p, plan_memory, stream);
      gpu::paged_attention(p, plan_memory, memory, stream);
    });
  }
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
    "k_scale",
    "v_scale",
    "max_query_len",
    "max_seq_len",
    "block_table_rows",
    "split_size",
    "plan",
    "workspace",
    "num_threads",
    "shared_tokens",
};

void paged_attention(const Arguments<kPagedAttention.count>& arguments) {
  const auto& [query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse, scale, causal, window,
               softcap, alibi_slopes, sinks, k_scale, v_scale, max_query_len, max_seq_len, block_table_rows, split_size,
               plan, workspace, num_threads, shared_tokens] = arguments;
  // Scalars first: their conversion may run Python code, and tensors are only borrowed.
  AttentionParams p{};
  const auto given_scale = optional_float("scale", scale);
  read_mask(p, causal, window, split_size);
  const double cap = optional_float("softcap", softcap).value_or(0.0);
  if (!(cap >= 0.0) || !std::isfinite(static_cast<float>(cap)) || (cap > 0.0 && static_cast<float>(cap) == 0.0f))
    refuse("softcap", "a finite float32, 0 (none) or more", std::to_string(cap));
  p.softcap = static_cast<float>(cap);
  p.max_query_len = at_least(0, "max_query_len", optional_int("max_query_len", max_query_len).value_or(INT64_MAX));
  p.max_seq_len = at_least(0, "max_seq_len", optional_int("max_seq_len", max_seq_len).value_or(INT64_MAX));
  p.shared_tokens = at_least(0, "shared_tokens", optional_int("shared_tokens", shared_tokens).value_or(0));
  const int threads = threads_of(num_threads);

  const Tensor q("query", query, kFloats), k("k_cache", k_cache, kCaches), v("v_cache", v_cache, kCaches),
      table("block_table", block_table, {DType::i32}), lens("seq_lens", seq_lens, {DType::i32}),
      loc("query_start_loc", query_start_loc, {DType::i32}), o("out", out);
  p.kv_dtype = require_caches(k, v, q);
  const ScalesArgument k_scales("k_scale", k_scale, p.kv_dtype), v_scales("v_scale", v_scale, p.kv_dtype);
  const Tensor *const ks = k_scales.get(), *const vs = v_scales.get();
  require_same_dtype(o, q);

  Sizes sizes;
  sizes.match(q, {Axis::num_tokens, Axis::num_heads, Axis::head_dim});
  sizes.match(k, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::head_dim});
  sizes.match(v, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::v_head_dim});
  sizes.match(lens, {Axis::num_seqs});
  sizes.match(table, {given(block_table_rows) ? Axis::table_rows : Axis::num_seqs, Axis::max_blocks});
  sizes.match(loc, {Axis::num_starts});
  sizes.match(o, {Axis::num_tokens, Axis::num_heads, Axis::v_head_dim});
  const auto checked = [&](const OptionalTensor& argument, Axis axis) {
    if (argument.get()) sizes.match(*argument.get(), {axis});
    return argument.get();
  };
  const OptionalTensor given_rows("block_table_rows", block_table_rows, {DType::i32});
  const Tensor* const rows = checked(given_rows, Axis::num_seqs);
  const OptionalTensor given_slopes("alibi_slopes", alibi_slopes, {DType::f32});
  const Tensor* const slopes = checked(given_slopes, Axis::num_heads);
  const OptionalTensor given_sinks("sinks", sinks, {DType::f32});
  const Tensor* const sink_logits = checked(given_sinks, Axis::num_heads);
  p.k_scale = k_scales.scales(sizes);
  p.v_scale = v_scales.scales(sizes);
  require_writable(o);
  const std::initializer_list<const Tensor*> inputs = {&q,   &k,     &v,          &table, &lens, &loc,
                                                       rows, slopes, sink_logits, ks,     vs};
  require_disjoint(o, inputs);

  p.dtype = q.dtype;
  p.num_tokens = sizes[Axis::num_tokens];
  p.num_blocks = sizes[Axis::num_blocks];
  p.max_blocks = sizes[Axis::max_blocks];
  read_heads(p, sizes, q, k, v);
  const int64_t num_seqs = sizes[Axis::num_seqs];
  p.num_seqs = sequences32(num_seqs);
  if (sizes[Axis::num_starts] != num_seqs + 1) {
    refuse("query_start_loc", std::to_string(num_seqs + 1) + " entries, one more than seq_lens has",
           std::to_string(sizes[Axis::num_starts]));
  }
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

  const OptionalTensor given_lse("lse", lse);
  if (given_lse.get()) {
    const Tensor& t = *given_lse.get();
    require_dtype(t, {DType::f32});
    if (t.ndim == 2 && t.shape[0] == p.num_tokens && t.shape[1] == p.num_heads) {
      p.lse_token_stride = t.strides[0];
      p.lse_head_stride = t.strides[1];
    } else {
      sizes.match(t, {Axis::num_tokens, Axis::num_heads});
    }
    require_writable(t);
    require_disjoint(t, inputs);
    require_disjoint(t, {&o});
    p.lse = t.as<float>();
  }

  const OptionalTensor given_plan("plan", plan), given_workspace("workspace", workspace);
  const Tensor *const own_plan = given_plan.get(), *const own_workspace = given_workspace.get();
  for (const Tensor* memory : {own_plan, own_workspace}) {
    if (!memory) continue;
    require_disjoint(*memory, inputs);
    require_disjoint(*memory, {&o, given_lse.get()});
  }
  if (own_plan && own_workspace) require_disjoint(*own_plan, {own_workspace});
  const Device device = require_one_device({&q, &k, &v, &table, &lens, &loc, &o, given_lse.get(), rows, slopes,
                                            sink_logits, ks, vs, own_plan, own_workspace});

  const double factor = given_scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim)));
  if (!std::isfinite(factor) || !std::isfinite(static_cast<float>(factor)))
    refuse("scale", "a finite float32", std::to_string(factor));
  p.scale = static_cast<float>(factor);
  if (device.cuda) {
    // What a captured graph is replayed with is not known: an absent length is as long as it can be.
    p.max_query_len = std::min(p.max_query_len, p.num_tokens);
    return attend_on_gpu(p, q, query, own_plan, own_workspace);
  }
  require_isa();
  without_gil([&] { cpu::paged_attention(p, threads); });
}

// Parameters of a plan: what is known of a step without its queries and its cache.
struct PlanShape {
  int64_t num_heads, num_kv_heads, head_dim, v_head_dim, num_tokens, num_seqs, max_query_len;
  DType dtype;

  void fill(AttentionParams& p) const {
    const auto size = [](const char* name, int64_t value, int64_t limit) {
      if (value < 1 || value > limit) refuse(name, "1 to " + std::to_string(limit), std::to_string(value));
      return static_cast<int32_t>(value);
    };
    p.num_heads = size("num_heads", num_heads, INT32_MAX);
    p.num_kv_heads = size("num_kv_heads", num_kv_heads, INT32_MAX);
    if (num_heads % num_kv_heads != 0) {
      refuse("num_heads", "a multiple of num_kv_heads = " + std::to_string(num_kv_heads), std::to_string(num_heads));
    }
    p.head_dim = size("head_dim", head_dim, kMaxHeadDim);
    p.v_head_dim = size("v_head_dim", v_head_dim, kMaxHeadDim);
    p.num_seqs = sequences32(num_seqs);
    // Kernels count the rows of a KV head in 32 bits.
    const int64_t most = INT32_MAX / (num_heads / num_kv_heads);
    p.num_tokens = at_least(0, "num_tokens", num_tokens);
    if (num_tokens > most) refuse("num_tokens", "at most " + std::to_string(most), std::to_string(num_tokens));
    p.max_query_len = std::min(at_least(0, "max_query_len", max_query_len), num_tokens);
    p.max_seq_len = INT64_MAX;  // a plan is told of none
    p.dtype = p.kv_dtype = dtype;
  }
};

DType dtype_of(const std::string& name) {
  for (const DType dtype : kFloats) {
    if (name == dtype_name(dtype)) return dtype;
  }
  refuse("dtype", "float32, float16 or bfloat16", name);
}

int64_t required_int(const char* name, PyObject* value) {
  const auto number = optional_int(name, value);
  if (!number) throw ArgumentError(Fault::type, name, "an int", "None");
  return *number;
}

constexpr Signature kPlanAttention{"plan_attention",
                                   3,
                                   10,
                                   "seq_lens",
                                   "query_start_loc",
                                   "out",
                                   "num_heads",
                                   "num_kv_heads",
                                   "head_dim",
                                   "v_head_dim",
                                   "num_tokens",
                                   "max_query_len",
                                   "dtype",
                                   "window",
                                   "causal",
                                   "split_size",
                                   "shared_tokens"};

void plan_attention(const Arguments<kPlanAttention.count>& arguments) {
  const auto& [seq_lens, query_start_loc, out, num_heads, num_kv_heads, head_dim, v_head_dim, num_tokens, max_query_len,
               dtype, window, causal, split_size, shared_tokens] = arguments;
  AttentionParams p{};
  read_mask(p, causal, window, split_size);
  p.shared_tokens = at_least(0, "shared_tokens", optional_int("shared_tokens", shared_tokens).value_or(0));
  if (!PyUnicode_Check(dtype)) throw ArgumentError(Fault::type, "dtype", "a str", Py_TYPE(dtype)->tp_name);
  PlanShape shape{required_int("num_heads", num_heads),         required_int("num_kv_heads", num_kv_heads),
                  required_int("head_dim", head_dim),           required_int("v_head_dim", v_head_dim),
                  required_int("num_tokens", num_tokens),       0,
                  required_int("max_query_len", max_query_len), dtype_of(py::cast<std::string>(py::handle(dtype)))};
  const Tensor lens("seq_lens", seq_lens, {DType::i32}), loc("query_start_loc", query_start_loc, {DType::i32}),
      plan("out", out);
  Sizes sizes;
  sizes.match(lens, {Axis::num_seqs});
  sizes.match(loc, {Axis::num_starts});
  shape.num_seqs = sizes[Axis::num_seqs];
  if (sizes[Axis::num_starts] != shape.num_seqs + 1) {
    refuse("query_start_loc", std::to_string(shape.num_seqs + 1) + " entries, one more than seq_lens has",
           std::to_string(sizes[Axis::num_starts]));
  }
  shape.fill(p);
  p.seq_lens = lens.as<const int32_t>();
  p.query_start_loc = loc.as<const int32_t>();
  require_disjoint(plan, {&lens, &loc});
  if (!require_one_device({&lens, &loc, &plan}).cuda) return;  // the CPU plans as it attends
  on_gpu(lens, [&](device::Stream stream, uint32_t* faults) {
    p.faults = faults;
    gpu::plan_attention(p, scratch(plan, gpu::plan_bytes(p)), stream);
  });
}

// (bytes of a plan, bytes of a workspace that has no plan in it) on a device, cuda:`device`, or the CPU for -1: enough
// for every call of at most these sizes.
py::tuple attention_memory(int device, int64_t num_tokens, int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads,
                           int64_t head_dim, int64_t v_head_dim, int64_t max_query_len, const std::string& dtype,
                           const py::object& split_size) {
  AttentionParams p{};
  p.causal = true;
  p.split_size = split_size_of(split_size.ptr());
  const PlanShape shape{num_heads,     num_kv_heads,   head_dim,
                        v_head_dim,    num_tokens,     at_least(0, "max_num_seqs", num_seqs),
                        max_query_len, dtype_of(dtype)};
  shape.fill(p);
  if constexpr (kGpuBuilt) {
    if (device >= 0) {
      const gpu::DeviceGuard guard(device);
      const gpu::AttentionMemory most = gpu::most_memory(p);
      return py::make_tuple(most.plan, gpu::aligned(most.workspace));
    }
  } else if (device >= 0) {
    refuse_device(device);
  }
  return py::make_tuple(0, 0);
}

}  // namespace

int64_t split_size_of(PyObject* value) {
  const auto split = optional_int("split_size", value);
  if (split && *split < 0) refuse("split_size", "None, 0 or a number of tokens", std::to_string(*split));
  return split.value_or(-1);
}

void read_heads(AttentionParams& p, const Sizes& sizes, const Tensor& q, const Tensor& k, const Tensor& v) {
  p.num_heads = size32(q, "num_heads", sizes[Axis::num_heads]);
  p.head_dim = size32(q, "head_dim", sizes[Axis::head_dim], kMaxHeadDim);
  p.num_kv_heads = size32(k, "num_kv_heads", sizes[Axis::num_kv_heads]);
  p.block_size = size32(k, "block_size", sizes[Axis::block_size]);
  p.v_head_dim = size32(v, "v_head_dim", sizes[Axis::v_head_dim], kMaxHeadDim);
  if (p.num_heads % p.num_kv_heads != 0) {
    ArgumentError error(Fault::invalid_argument, "query",
                        "num_heads that is a multiple of num_kv_heads = " + std::to_string(p.num_kv_heads),
                        std::to_string(p.num_heads));
    error.hint = "a cache of (block, token, head, dim) is passed as cache.transpose(1, 2)";
    throw error;
  }
}

void define_attention(py::module_& m) {
  m.def("attention_memory", &attention_memory, py::arg("device"), py::arg("num_tokens"), py::arg("num_seqs"),
        py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("v_head_dim"),
        py::arg("max_query_len"), py::arg("dtype"), py::arg("split_size"));
}

PyMethodDef attention_methods[] = {
    PAGEDCORE_METHOD(paged_attention, kPagedAttention,
                     "(query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse=None, *, scale=None, "
                     "causal=True, window=None, softcap=0.0, alibi_slopes=None, sinks=None, k_scale=None, "
                     "v_scale=None, max_query_len=None, max_seq_len=None, block_table_rows=None, split_size=None, "
                     "plan=None, workspace=None, num_threads=None, shared_tokens=None)"),
    PAGEDCORE_TRY_METHOD(paged_attention, kPagedAttention,
                         "(query, k_cache, v_cache, block_table, seq_lens, query_start_loc, out, lse, scale, causal, "
                         "window, softcap, alibi_slopes, sinks, k_scale, v_scale, max_query_len, max_seq_len, "
                         "block_table_rows, split_size, plan, workspace, num_threads, shared_tokens, /)"),
    PAGEDCORE_METHOD(plan_attention, kPlanAttention,
                     "(seq_lens, query_start_loc, out, *, num_heads, num_kv_heads, head_dim, v_head_dim, num_tokens, "
                     "max_query_len, dtype, window=None, causal=True, split_size=None, shared_tokens=None)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pagedcore
