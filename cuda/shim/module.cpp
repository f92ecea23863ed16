// The shim as a Python module, for the tests: device memory by address, and each GPU op by the fields of its
// parameters.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include <tuple>

#include "decode.h"
#include "faulty.h"
#include "gpu.h"
#include "shim.h"

#if defined(PAGEDCORE_SHIM_BINDING)
#include "device_tensor.h"
#include "src/module.h"
#endif

namespace py = pybind11;

namespace pagedcore::shim {
namespace {

template <class T>
T* pointer(const py::dict& fields, const char* name) {
  return fields.contains(name) ? reinterpret_cast<T*>(py::cast<uintptr_t>(fields[name])) : nullptr;
}

template <class T>
void set(T& field, const py::dict& fields, const char* name) {
  if (fields.contains(name)) field = py::cast<T>(fields[name]);
}

Pages pages(const py::dict& fields, const char* name) {
  const auto given = py::cast<std::array<uintptr_t, 4>>(fields[name]);
  return {reinterpret_cast<void*>(given[0]), static_cast<int64_t>(given[1]), static_cast<int64_t>(given[2]),
          static_cast<int64_t>(given[3])};
}

// Address and strides, as Scales has them; null where there are none.
Scales scales(const py::dict& fields, const char* name) {
  if (!fields.contains(name)) return {};
  const auto given = py::cast<std::array<uintptr_t, 4>>(fields[name]);
  return {reinterpret_cast<float*>(given[0]), static_cast<int64_t>(given[1]), static_cast<int64_t>(given[2]),
          static_cast<int64_t>(given[3])};
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float8_e4m3fn") return DType::e4m3;
  throw py::value_error("dtype " + name);
}

// dtype, and kv_dtype where it is another; and the scales of codes.
template <class Params>
void set_dtypes(Params& p, const py::dict& fields) {
  p.dtype = dtype_of(py::cast<std::string>(fields["dtype"]));
  p.kv_dtype = fields.contains("kv_dtype") ? dtype_of(py::cast<std::string>(fields["kv_dtype"])) : p.dtype;
  p.k_scale = scales(fields, "k_scale");
  p.v_scale = scales(fields, "v_scale");
}

AttentionParams attention_params(const py::dict& fields) {
  AttentionParams p{};
  p.query = pointer<const void>(fields, "query");
  p.k = pages(fields, "k");
  p.v = pages(fields, "v");
  p.block_table = pointer<const int32_t>(fields, "block_table");
  p.block_table_rows = pointer<const int32_t>(fields, "block_table_rows");
  p.seq_lens = pointer<const int32_t>(fields, "seq_lens");
  p.query_start_loc = pointer<const int32_t>(fields, "query_start_loc");
  p.out = pointer<void>(fields, "out");
  p.lse = pointer<float>(fields, "lse");
  p.alibi_slopes = pointer<const float>(fields, "alibi_slopes");
  p.sinks = pointer<const float>(fields, "sinks");
  p.faults = pointer<uint32_t>(fields, "faults");
  p.split_size = -1;
  p.max_query_len = p.max_seq_len = INT64_MAX;
#define PAGEDCORE_FIELD(name) set(p.name, fields, #name)
  PAGEDCORE_FIELD(query_token_stride);
  PAGEDCORE_FIELD(query_head_stride);
  PAGEDCORE_FIELD(block_table_stride);
  PAGEDCORE_FIELD(out_token_stride);
  PAGEDCORE_FIELD(out_head_stride);
  PAGEDCORE_FIELD(lse_token_stride);
  PAGEDCORE_FIELD(lse_head_stride);
  PAGEDCORE_FIELD(num_tokens);
  PAGEDCORE_FIELD(num_blocks);
  PAGEDCORE_FIELD(max_blocks);
  PAGEDCORE_FIELD(num_seqs);
  PAGEDCORE_FIELD(table_rows);
  PAGEDCORE_FIELD(num_heads);
  PAGEDCORE_FIELD(num_kv_heads);
  PAGEDCORE_FIELD(head_dim);
  PAGEDCORE_FIELD(v_head_dim);
  PAGEDCORE_FIELD(block_size);
  PAGEDCORE_FIELD(max_query_len);
  PAGEDCORE_FIELD(max_seq_len);
  PAGEDCORE_FIELD(window);
  PAGEDCORE_FIELD(split_size);
  PAGEDCORE_FIELD(scale);
  PAGEDCORE_FIELD(softcap);
  PAGEDCORE_FIELD(causal);
#undef PAGEDCORE_FIELD
  set_dtypes(p, fields);
  return p;
}

// `planned`: by a call before this one, of a layer that agrees with this one.
void paged_attention(const py::dict& fields, uintptr_t plan, uintptr_t workspace, bool planned) {
  const AttentionParams p = attention_params(fields);
  if (!planned) gpu::plan_attention(p, reinterpret_cast<void*>(plan), nullptr);
  gpu::paged_attention(p, reinterpret_cast<void*>(plan), reinterpret_cast<void*>(workspace), nullptr);
}

// Addresses and strides of one output, as PartialOutput has them.
PartialOutput partial_output(const py::dict& fields, const char* name) {
  const auto given = py::cast<std::array<uintptr_t, 6>>(fields[name]);
  return {reinterpret_cast<void*>(given[0]),  static_cast<int64_t>(given[1]), static_cast<int64_t>(given[2]),
          reinterpret_cast<float*>(given[3]), static_cast<int64_t>(given[4]), static_cast<int64_t>(given[5])};
}

void merge_states(const py::dict& fields) {
  MergeParams p{};
  p.a = partial_output(fields, "a");
  p.b = partial_output(fields, "b");
  p.total = partial_output(fields, "total");
  p.sinks = pointer<const float>(fields, "sinks");
  set(p.num_tokens, fields, "num_tokens");
  set(p.num_heads, fields, "num_heads");
  set(p.v_head_dim, fields, "v_head_dim");
  p.dtype = dtype_of(py::cast<std::string>(fields["dtype"]));
  gpu::merge_states(p, nullptr);
}

void reshape_and_cache(const py::dict& fields) {
  CacheWriteParams p{};
  p.key = pointer<const void>(fields, "key");
  p.value = pointer<const void>(fields, "value");
  p.k = pages(fields, "k");
  p.v = pages(fields, "v");
  p.slot_mapping = pointer<const int64_t>(fields, "slot_mapping");
#define PAGEDCORE_FIELD(name) set(p.name, fields, #name)
  PAGEDCORE_FIELD(key_token_stride);
  PAGEDCORE_FIELD(key_head_stride);
  PAGEDCORE_FIELD(value_token_stride);
  PAGEDCORE_FIELD(value_head_stride);
  PAGEDCORE_FIELD(num_tokens);
  PAGEDCORE_FIELD(num_kv_heads);
  PAGEDCORE_FIELD(block_size);
  PAGEDCORE_FIELD(key_bytes);
  PAGEDCORE_FIELD(value_bytes);
  PAGEDCORE_FIELD(element_size);
  PAGEDCORE_FIELD(makes_k_scale);
  PAGEDCORE_FIELD(makes_v_scale);
#undef PAGEDCORE_FIELD
  if (fields.contains("dtype")) set_dtypes(p, fields);
  gpu::reshape_and_cache(p, py::cast<int64_t>(fields["num_blocks"]), nullptr);
}

// `op` on a region given as (address, num_blocks, block_stride, shape, strides, contiguous_bytes), strides in bytes.
using Region = std::tuple<uintptr_t, int64_t, int64_t, std::array<int64_t, 2>, std::array<int64_t, 2>, int64_t>;

void move_blocks(const std::string& op, const Region& given, uintptr_t ids, int64_t count, uintptr_t staging) {
  const auto& [data, num_blocks, block_stride, shape, strides, contiguous_bytes] = given;
  const gpu::BlockRegion region{reinterpret_cast<char*>(data), num_blocks,       block_stride, {shape[0], shape[1]},
                                {strides[0], strides[1]},      contiguous_bytes, nullptr};
  const auto* blocks = reinterpret_cast<const int32_t*>(ids);
  auto* const buffer = reinterpret_cast<void*>(staging);
  if (op == "copy") return gpu::copy_blocks(region, blocks, count, nullptr);
  if (op == "zero") return gpu::zero_blocks(region, blocks, count, nullptr);
  if (op == "gather") return gpu::gather_blocks(region, blocks, count, buffer, nullptr);
  if (op == "scatter") return gpu::scatter_blocks(region, blocks, count, buffer, nullptr);
  throw py::value_error("op " + op);
}

}  // namespace
}  // namespace pagedcore::shim

PYBIND11_MODULE(PAGEDCORE_SHIM_MODULE, m) {
  namespace shim = pagedcore::shim;
  namespace gpu = pagedcore::gpu;
  py::register_local_exception<shim::KernelFault>(m, "KernelFault", PyExc_RuntimeError);
  m.def("set_seed", &shim::set_seed);
  m.def("set_multiprocessors", &shim::set_multiprocessors);
  m.def("set_compute_capability", &shim::set_compute_capability);
  m.def("decode_codes", &shim::decode_codes);
  m.def("allocate", [](size_t bytes) { return reinterpret_cast<uintptr_t>(shim::allocate(bytes)); });
  m.def("reserve", [](size_t bytes) { return reinterpret_cast<uintptr_t>(shim::allocate(bytes, false)); });
  m.def("release", [](uintptr_t memory) { shim::release(reinterpret_cast<void*>(memory)); });
  m.def("copy_to_device", [](uintptr_t device, uintptr_t host, size_t bytes) {
    shim::copy_to_device(reinterpret_cast<void*>(device), reinterpret_cast<const void*>(host), bytes);
  });
  m.def("copy_to_host", [](uintptr_t host, uintptr_t device, size_t bytes) {
    shim::copy_to_host(reinterpret_cast<void*>(host), reinterpret_cast<const void*>(device), bytes);
  });
  m.def("attention_generic",
        [](const py::dict& fields) { gpu::attention_generic(shim::attention_params(fields), nullptr); });
  m.def("why_not_tiled", [](const py::dict& fields) { return gpu::why_not_tiled(shim::attention_params(fields)); });
  m.def("plan_bytes", [](const py::dict& fields) { return gpu::plan_bytes(shim::attention_params(fields)); });
  m.def("workspace_bytes", [](const py::dict& fields) { return gpu::workspace_bytes(shim::attention_params(fields)); });
  m.def("most_memory", [](const py::dict& fields) {
    const gpu::AttentionMemory most = gpu::most_memory(shim::attention_params(fields));
    return std::make_pair(most.plan, most.workspace);
  });
  m.def("kernel_name", [](const py::dict& fields) { return gpu::kernel_name(shim::attention_params(fields)); });
  m.def("paged_attention", &shim::paged_attention, py::arg("fields"), py::arg("plan"), py::arg("workspace"),
        py::arg("planned") = false);
  py::class_<shim::Recording>(m, "Recording", py::module_local(),
                              "Launches from now until stop() are put aside; replay() runs them.")
      .def(py::init<>())
      .def("stop", &shim::Recording::stop)
      .def("replay", &shim::Recording::replay);
  m.def("merge_states", &shim::merge_states);
  m.def("reshape_and_cache", &shim::reshape_and_cache);
  m.def("move_blocks", &shim::move_blocks, py::arg("op"), py::arg("region"), py::arg("ids"), py::arg("count"),
        py::arg("staging") = 0);
  m.def("update_block_table",
        [](uintptr_t table, int64_t row_stride, int64_t rows, int64_t columns, uintptr_t updates, int64_t count) {
          gpu::update_block_table(reinterpret_cast<int32_t*>(table), row_stride, rows, columns,
                                  reinterpret_cast<const int32_t*>(updates), count, nullptr, nullptr);
        });
  m.def("faulty_kernels", &shim::faulty_kernels, "names of kernels with one fault each, and of one without");
  m.def("run_faulty", &shim::run_faulty);
  m.def("last_stream", &shim::last_stream, "that a launch was put on, or recorded for");
#if defined(PAGEDCORE_SHIM_BINDING)
  m.def("current_device", &shim::current_device);
  m.def("last_device", &shim::last_device, "that was made current");
  shim::define_device_tensor(m);
  auto kernels = m.def_submodule("kernels");
  pagedcore::define_kernels(kernels);
#endif
}
