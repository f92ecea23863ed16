// Plain reads of memory, which benchmarks compare the ops with.
#include "binding.h"
#include "cpu.h"
#include "target.h"

namespace pagedcore {
namespace {

constexpr Signature kReadRange{"read_range", 1, 1, "tensor", "num_threads"};

void read_range(const Arguments<kReadRange.count>& arguments) {
  const auto& [tensor, num_threads] = arguments;
  const int threads = threads_of(num_threads);
  const Tensor t("tensor", tensor);
  require_cpu(t);
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
  require_cpu(t);
  require_cpu(ids);
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

}  // namespace

PyMethodDef probe_methods[] = {
    PAGEDCORE_METHOD(read_range, kReadRange, "(tensor, *, num_threads=None)"),
    PAGEDCORE_METHOD(read_blocks, kReadBlocks, "(tensor, blocks, *, num_threads=None)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace pagedcore
