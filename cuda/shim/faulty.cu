#include "faulty.h"

#include <cmath>
#include <stdexcept>

#include "pagedcore/device.h"

namespace pagedcore {
namespace {

using namespace device;

constexpr int kThreads = 64;
constexpr int kSharedFloats = kThreads + 4;  // the last four for copies that land elsewhere

enum class Flaw {
  none,
  missing_barrier,
  missing_warp_barrier,
  missing_wait,
  overwritten_copy,
  divergent_barrier,
  early_return,
  divergent_collective,
  misaligned_copy,
  out_of_bounds,
  missing_fence,
  missing_acquire,
  unfinished_copy,
  past_the_end,
  before_the_start,
  past_shared_memory,
  overflow,
};

struct Params {
  const float* in;  // [2 * kThreads]
  float* out;       // [2 * kThreads]
  float* exchange;  // [2], between the blocks
  int* counter;     // of blocks that arrived
  Flaw flaw;
};

// Copies in to out with detours: through shared memory by cp.async, to another thread, to another lane and, for the
// sum, to the last block.
PAGEDCORE_KERNEL(kThreads, 1) detours(const Params p) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const int t = thread_id();
  const float* in = p.in + block_x() * kThreads;

  if (t < kThreads / 4) {  // 16 bytes a thread
    cp_async_16(shared_address(shared + t * 4 + (p.flaw == Flaw::misaligned_copy ? 1 : 0)), in + t * 4, true);
  }
  cp_async_commit();
  if (p.flaw != Flaw::missing_wait && p.flaw != Flaw::unfinished_copy) cp_async_wait<0>();
  if (p.flaw != Flaw::missing_barrier) sync_threads();
  if (p.flaw == Flaw::early_return && t == 3) return;
  float x = shared[kThreads - 1 - t];  // another warp's
  if (p.flaw == Flaw::missing_wait) cp_async_wait<0>();
  if (p.flaw == Flaw::divergent_barrier) {
    if (t < 7) {
      sync_threads();
    } else {
      sync_threads();
    }
  } else {
    sync_threads();
  }
  if (p.flaw == Flaw::overwritten_copy) {  // into what other threads still read
    if (t == 0) cp_async_16(shared_address(shared + 60), in, true);
    cp_async_commit();
    x += 0.0f * shared[t];
    cp_async_wait<0>();
    sync_threads();
  }

  if (p.flaw == Flaw::past_shared_memory && t == 5) shared[kSharedFloats] = x;
  if (p.flaw == Flaw::overflow) x += 0.0f * static_cast<float>((t + 1) * 0x40000000);

  shared[t] = x;
  if (p.flaw != Flaw::missing_warp_barrier) sync_warp();
  x = shared[t ^ 1];
  if (p.flaw == Flaw::divergent_collective) {
    if (lane_id() < 5) {
      x = shuffle_xor(x, 0);
    } else {
      x = shuffle_xor(x, 0);
    }
  }
  float& own = p.out[block_x() * kThreads + (kThreads - 1 - (t ^ 1)) + (p.flaw == Flaw::out_of_bounds ? 4096 : 0)];
  own = x;

  if (t == 0) {
    p.exchange[block_x()] = static_cast<float>(block_x() + 1);
    if (p.flaw == Flaw::past_the_end && block_x() == 1) p.exchange[2] = x;
    if (p.flaw == Flaw::before_the_start && block_x() == 1) p.exchange[-1] = x;
    if (p.flaw != Flaw::missing_fence) fence();
    const int arrived = atomic_add(p.counter, 1);
    if (p.flaw != Flaw::missing_acquire) fence();
    if (arrived == 1) own += load_coherent(p.exchange) + load_coherent(p.exchange + 1) - 3.0f;
  }
}

struct Named {
  const char* name;
  Flaw flaw;
};

constexpr Named kNamed[] = {
    {"none", Flaw::none},
    {"missing barrier", Flaw::missing_barrier},
    {"missing warp barrier", Flaw::missing_warp_barrier},
    {"missing wait", Flaw::missing_wait},
    {"overwritten copy", Flaw::overwritten_copy},
    {"divergent barrier", Flaw::divergent_barrier},
    {"early return", Flaw::early_return},
    {"divergent collective", Flaw::divergent_collective},
    {"misaligned copy", Flaw::misaligned_copy},
    {"out of bounds", Flaw::out_of_bounds},
    {"missing fence", Flaw::missing_fence},
    {"missing acquire", Flaw::missing_acquire},
    {"unfinished copy", Flaw::unfinished_copy},
    {"past the end", Flaw::past_the_end},
    {"before the start", Flaw::before_the_start},
    {"past shared memory", Flaw::past_shared_memory},
    {"overflow", Flaw::overflow},
};

struct DeviceArray {
  explicit DeviceArray(size_t bytes) : data(shim::allocate(bytes)) {}
  ~DeviceArray() { shim::release(data); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  void* data;
};

}  // namespace

std::vector<std::string> shim::faulty_kernels() {
  std::vector<std::string> names;
  for (const Named& named : kNamed) names.emplace_back(named.name);
  return names;
}

float shim::run_faulty(const std::string& name) {
  for (const Named& named : kNamed) {
    if (name != named.name) continue;
    constexpr size_t kCount = 2 * kThreads;
    std::vector<float> in(kCount), out(kCount);
    for (size_t i = 0; i < kCount; ++i) in[i] = static_cast<float>(i + 1);
    const int zero = 0;
    const DeviceArray in_d(kCount * 4), out_d(kCount * 4), exchange(2 * 4), counter(4);
    shim::copy_to_device(in_d.data, in.data(), kCount * 4);
    shim::copy_to_device(counter.data, &zero, 4);
    device::launch(detours, 2, 1, 1, kThreads, kSharedFloats * 4, nullptr,
                   Params{static_cast<float*>(in_d.data), static_cast<float*>(out_d.data),
                          static_cast<float*>(exchange.data), static_cast<int*>(counter.data), named.flaw});
    shim::copy_to_host(out.data(), out_d.data, kCount * 4);
    float difference = 0.0f;
    for (size_t i = 0; i < kCount; ++i) difference += std::abs(out[i] - in[i]);
    return difference;
  }
  throw std::invalid_argument("no faulty kernel is called " + name);
}

}  // namespace pagedcore
