// merge_states: arguments in, checks, GIL released around the work.
#include "binding.h"
#include "cpu.h"
#include "target.h"

namespace pagedcore {
namespace {

constexpr Signature kMergeStates{"merge_states", 7,     6,     "o_a",   "lse_a",      "o_b",
                                 "lse_b",        "out", "lse", "sinks", "num_threads"};

// An output and its log-sum-exp, whose strides may be any.
PartialOutput partial_output(Sizes& sizes, const Tensor& out, const Tensor& lse) {
  sizes.match(out, {Axis::num_tokens, Axis::num_heads, Axis::v_head_dim});
  require_dtype(lse, {DType::f32});
  if (lse.ndim != 2 || lse.shape[0] != sizes[Axis::num_tokens] || lse.shape[1] != sizes[Axis::num_heads])
    sizes.match(lse, {Axis::num_tokens, Axis::num_heads});
  return {out.data, out.strides[0], out.strides[1], lse.as<float>(), lse.strides[0], lse.strides[1]};
}

void merge_states(const Arguments<kMergeStates.count>& arguments) {
  const auto& [o_a, lse_a, o_b, lse_b, out, lse, sinks, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const Tensor a("o_a", o_a, kFloats), a_lse("lse_a", lse_a), b("o_b", o_b), b_lse("lse_b", lse_b), total("out", out),
      total_lse("lse", lse);
  for (const Tensor* t : {&b, &total}) require_same_dtype(*t, a);
  Sizes sizes;
  MergeParams p{};
  p.a = partial_output(sizes, a, a_lse);
  p.b = partial_output(sizes, b, b_lse);
  p.total = partial_output(sizes, total, total_lse);
  const OptionalTensor sink_logits("sinks", sinks, {DType::f32});
  const Tensor* const logits = sink_logits.get();
  if (logits) {
    sizes.match(*logits, {Axis::num_heads});
    p.sinks = logits->as<const float>();
  }
  for (const Tensor* written : {&total, &total_lse}) {
    require_writable(*written);
    require_disjoint(*written, {&a, &a_lse, &b, &b_lse, logits});
  }
  require_disjoint(total_lse, {&total});
  p.num_tokens = sizes[Axis::num_tokens];
  p.num_heads = size32(a, "num_heads", sizes[Axis::num_heads]);
  p.v_head_dim = size32(a, "v_head_dim", sizes[Axis::v_head_dim]);
  p.dtype = a.dtype;
  if (require_one_device({&a, &a_lse, &b, &b_lse, &total, &total_lse, logits}).cuda)
    return on_gpu(a, [&](device::Stream stream, uint32_t*) { gpu::merge_states(p, stream); });
  without_gil([&] { cpu::merge_states(p, threads); });
}

}  // namespace

PyMethodDef merge_methods[] = {
    PAGEDCORE_METHOD(merge_states, kMergeStates, "(o_a, lse_a, o_b, lse_b, out, lse, sinks=None, *, num_threads=None)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pagedcore
