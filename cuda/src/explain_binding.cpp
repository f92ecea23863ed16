// Which kernel attention takes for given tensors, without running it.
#include <cstring>

#include "binding.h"
#include "cpu.h"
#include "isa.h"
#include "target.h"

namespace py = pybind11;

namespace pagedcore {
namespace {

// Whether attention would take another kernel than this if it were told that no query is longer than it must be. Where
// the mean of the lengths takes the same kernel, so does all between it and num_tokens: tiles grow with the longest
// query, but for sequences that are all alike, and these are as long as the mean.
[[maybe_unused]] bool a_shorter_query_changes(AttentionParams p, const char* kernel) {
  if (p.num_seqs == 0 || p.num_tokens == 0) return false;
  p.max_query_len = (p.num_tokens + p.num_seqs - 1) / p.num_seqs;
  if constexpr (kGpuBuilt) return std::strcmp(gpu::kernel_name(p), kernel) != 0;
  return false;
}

// (kernel, why it is not a faster one, or None). What `paged_attention` decides by: shapes, strides, alignment, and the
// longest query; lengths play no part.
py::tuple explain_attention(const py::object& query, const py::object& k_cache, const py::object& v_cache,
                            const py::object& num_seqs, const py::object& max_query_len, const py::object& split_size) {
  const auto seqs = optional_int("num_seqs", num_seqs.ptr());
  if (!seqs) throw ArgumentError(Fault::type, "num_seqs", "an int", "None");
  const auto longest = optional_int("max_query_len", max_query_len.ptr());
  const Tensor q("query", query.ptr(), kFloats), k("k_cache", k_cache.ptr(), kCaches),
      v("v_cache", v_cache.ptr(), kCaches);
  AttentionParams p{};
  p.kv_dtype = require_caches(k, v, q);
  p.dtype = q.dtype;
  Sizes sizes;
  sizes.match(q, {Axis::num_tokens, Axis::num_heads, Axis::head_dim});
  sizes.match(k, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::head_dim});
  sizes.match(v, {Axis::num_blocks, Axis::num_kv_heads, Axis::block_size, Axis::v_head_dim});
  read_heads(p, sizes, q, k, v);
  p.num_tokens = sizes[Axis::num_tokens];
  p.num_seqs = static_cast<int32_t>(std::min<int64_t>(at_least(0, "num_seqs", *seqs), INT32_MAX));
  p.max_query_len = std::min(at_least(0, "max_query_len", longest.value_or(INT64_MAX)), p.num_tokens);
  p.split_size = split_size_of(split_size.ptr());
  p.query = q.data;
  p.query_token_stride = q.strides[0];
  p.query_head_stride = q.strides[1];
  p.k = pages_of(k);
  p.v = pages_of(v);
  if (require_one_device({&q, &k, &v}).cuda) {
    if constexpr (kGpuBuilt) {
      const char* const kernel = gpu::kernel_name(p);
      py::object reason = py::cast(gpu::why_not_tiled(p));
      if (reason.is_none() && !longest && a_shorter_query_changes(p, kernel))
        reason = py::str("max_query_len was not given, so that one query may have all " + std::to_string(p.num_tokens) +
                         " tokens");
      return py::make_tuple(kernel, reason);
    }
  }
  require_isa();
  const cpu::Isa& isa = cpu::selected_isa();
  const bool packed = p.max_query_len * (p.num_heads / p.num_kv_heads) >= isa.stream_rows;
  const char* const path = !packed ? "streaming " : longest ? "packed " : "streaming or packed ";
  return py::make_tuple(path + std::string(isa.name), py::none());
}

}  // namespace

void define_explain(py::module_& m) {
  m.def("explain_attention", &explain_attention, py::arg("query"), py::arg("k_cache"), py::arg("v_cache"),
        py::arg("num_seqs"), py::arg("max_query_len"), py::arg("split_size"));
}

}  // namespace pagedcore
