#include "shim.h"

#include <signal.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

#include "fiber.h"
#include "memory.h"
#include "races.h"
#include "random.h"

namespace pagedcore::shim {
namespace {

struct AsyncCopy {
  char* shared;
  const char* global;
  int bytes, valid_bytes;
};

struct Thread {
  Fiber fiber;
  int id = 0;
  // Where it waits: the operation's name and line, and for a warp collective its operands and what completes it.
  const char* kind = "";
  int line = 0;
  void* operands = nullptr;
  void (*complete)(void**) = nullptr;
  std::vector<std::vector<AsyncCopy>> committed;  // groups, oldest first
  std::vector<AsyncCopy> open_group;
};

struct Runtime {
  Random random;
  uint64_t seed = 0;
  int multiprocessors = 6;
  int compute_capability = 80;
  ThreadIndex index{};
  std::vector<std::unique_ptr<Thread>> threads;  // made once, reused by every block
  std::vector<int> ready;
  std::vector<char> shared;  // room for alignment included
  char* shared_begin = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  Thread* running = nullptr;
  int at_barrier = 0;
  std::vector<int> at_warp;  // lanes waiting, per warp
  bool faulted = false;
  std::string message;
  Recording* recording = nullptr;
  const void* last_stream = nullptr;  // of the last launch
};

Runtime& runtime() {
  static Runtime r;
  return r;
}

std::string place(const Thread& t) {
  const Dim& b = runtime().index.block;
  return "thread " + std::to_string(t.id) + " of block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
         std::to_string(b.z) + ")";
}

void make_ready(const Thread& t) { runtime().ready.push_back(t.id); }

void wait(const char* kind, int line) {
  Thread& t = *runtime().running;
  t.kind = kind;
  t.line = line;
  t.fiber.suspend();
}

void thread_main(void* argument) {
  Thread& t = *static_cast<Thread*>(argument);
  (*runtime().body)();
  if (!t.open_group.empty() || !t.committed.empty()) fault("returned with cp.async copies that it never waited for");
}

// Both of these run when the last thread has arrived.
void finish_block_barrier(Runtime& r) {
  const Thread& first = *r.threads[0];
  for (int i = 1; i < r.index.threads; ++i) {
    if (r.threads[i]->line != first.line) {
      fault("divergent barrier: " + place(first) + " waits at line " + std::to_string(first.line) + ", " +
            place(*r.threads[i]) + " at line " + std::to_string(r.threads[i]->line));
    }
  }
  races::block_barrier();
  r.at_barrier = 0;
  for (int i = 0; i < r.index.threads; ++i) {
    if (r.threads[i].get() != r.running) make_ready(*r.threads[i]);
  }
}

void finish_collective(Runtime& r, int warp) {
  void* operands[kWarpSize];
  Thread* lanes[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) lanes[i] = r.threads[warp * kWarpSize + i].get();
  for (int i = 0; i < kWarpSize; ++i) {
    if (lanes[i]->line != lanes[0]->line || std::strcmp(lanes[i]->kind, lanes[0]->kind) != 0) {
      fault("divergent warp collective: " + place(*lanes[0]) + " brought " + lanes[0]->kind + " at line " +
            std::to_string(lanes[0]->line) + ", " + place(*lanes[i]) + " " + lanes[i]->kind + " at line " +
            std::to_string(lanes[i]->line));
    }
    operands[i] = lanes[i]->operands;
  }
  r.running->complete(operands);
  r.at_warp[warp] = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    if (lanes[i] != r.running) make_ready(*lanes[i]);
  }
}

std::string describe_deadlock(Runtime& r) {
  const Thread* waiting = nullptr;
  const Thread* returned = nullptr;
  const Thread* elsewhere = nullptr;
  for (int i = 0; i < r.index.threads; ++i) {
    const Thread* t = r.threads[i].get();
    if (t->fiber.finished()) {
      returned = t;
    } else if (waiting == nullptr) {
      waiting = t;
    } else if (t->line != waiting->line || std::strcmp(t->kind, waiting->kind) != 0) {
      elsewhere = t;
    }
  }
  std::string text = "not reached by all: " + place(*waiting) + " waits in " + waiting->kind + " at line " +
                     std::to_string(waiting->line);
  if (elsewhere != nullptr) {
    text += ", " + place(*elsewhere) + " in " + elsewhere->kind + " at line " + std::to_string(elsewhere->line);
  }
  if (returned != nullptr) text += ", " + place(*returned) + " has returned";
  return text;
}

void run_block(Runtime& r) {
  const int threads = r.index.threads;
  std::memset(r.shared_begin, 0xff, r.shared_bytes);
  r.at_barrier = 0;
  r.at_warp.assign((threads + kWarpSize - 1) / kWarpSize, 0);
  r.ready.clear();
  for (int i = 0; i < threads; ++i) {
    Thread& t = *r.threads[i];
    t.id = i;
    t.committed.clear();
    t.open_group.clear();
    t.fiber.start(thread_main, &t);
    make_ready(t);
  }
  int unfinished = threads;
  while (unfinished > 0) {
    if (r.ready.empty()) {
      r.faulted = true;
      r.message = describe_deadlock(r);
      return;
    }
    std::swap(r.ready[r.random.below(r.ready.size())], r.ready.back());
    r.running = r.threads[r.ready.back()].get();
    r.ready.pop_back();
    r.index.thread = r.running->id;
    r.running->fiber.resume();
    if (r.faulted) return;
    if (r.running->fiber.finished()) --unfinished;
  }
}

// A bad address in a kernel becomes a KernelFault: the handler lets the fiber go on in `bad_address`, at the top of its
// stack, which nobody will want any more.
char* volatile bad_address_at = nullptr;

void bad_address() {
  char text[64];
  snprintf(text, sizeof text, "invalid memory access at %p", static_cast<void*>(bad_address_at));
  fault(text);
}

struct sigaction earlier_action;

void on_bad_address(int, siginfo_t* info, void* context) {
  Runtime& r = runtime();
  if (r.running == nullptr) {  // not a kernel's: let it happen again, as it was before
    sigaction(SIGSEGV, &earlier_action, nullptr);
    return;
  }
  bad_address_at = static_cast<char*>(info->si_addr);
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = reinterpret_cast<greg_t>(r.running->fiber.give_up()) - 8;
  registers[REG_RIP] = reinterpret_cast<greg_t>(&bad_address);
}

class CatchBadAddresses {
 public:
  CatchBadAddresses() {
    stack_t alternate{};
    alternate.ss_sp = stack_;
    alternate.ss_size = sizeof stack_;
    sigaltstack(&alternate, &earlier_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_bad_address;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &earlier_action);
  }
  ~CatchBadAddresses() {
    sigaction(SIGSEGV, &earlier_action, nullptr);
    sigaltstack(&earlier_stack_, nullptr);
  }
  CatchBadAddresses(const CatchBadAddresses&) = delete;
  CatchBadAddresses& operator=(const CatchBadAddresses&) = delete;

 private:
  stack_t earlier_stack_{};
  alignas(16) char stack_[16384];
};

void run(const LaunchShape& shape, const std::function<void()>& body) {
  Runtime& r = runtime();
  if (r.running != nullptr) throw KernelFault("a kernel runs already");
  if (shape.threads < kWarpSize || shape.threads > 1024 || shape.threads % kWarpSize != 0) {
    throw KernelFault("a block of " + std::to_string(shape.threads) +
                      " threads: a multiple of 32 up to 1024 is needed");
  }
  const int64_t blocks = shape.grid.count();
  if (blocks <= 0 || shape.grid.y > 65535 || shape.grid.z > 65535) throw KernelFault("an empty or too large grid");
  constexpr size_t kMaxShared = size_t{227} << 10;  // what one block of sm_90 can have
  if (shape.shared_bytes > kMaxShared) {
    throw KernelFault(std::to_string(shape.shared_bytes) + " bytes of shared memory: at most " +
                      std::to_string(kMaxShared));
  }
  while (r.threads.size() < static_cast<size_t>(shape.threads)) r.threads.push_back(std::make_unique<Thread>());
  constexpr size_t kSharedAlignment = 1024;
  std::vector<char>(shape.shared_bytes + 2 * kSharedAlignment).swap(r.shared);
  r.shared_begin = r.shared.data() + kSharedAlignment - reinterpret_cast<uintptr_t>(r.shared.data()) % kSharedAlignment;
  r.shared_bytes = shape.shared_bytes;
  forbid(r.shared.data(), static_cast<size_t>(r.shared_begin - r.shared.data()));
  forbid(r.shared_begin + r.shared_bytes, r.shared.size() - r.shared_bytes - (r.shared_begin - r.shared.data()));
  r.body = &body;
  r.faulted = false;
  r.index.grid = shape.grid;
  r.index.threads = shape.threads;

  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[r.random.below(i)]);

  {
    const DeviceMemoryOpen memory;
    const CatchBadAddresses handler;
    races::begin_launch();
    for (const int64_t block : order) {
      r.index.block = {static_cast<int>(block % shape.grid.x), static_cast<int>(block / shape.grid.x % shape.grid.y),
                       static_cast<int>(block / shape.grid.x / shape.grid.y)};
      races::begin_block(block, r.shared_begin, r.shared_bytes, shape.threads);
      run_block(r);
      if (r.faulted) break;
    }
    r.running = nullptr;
  }
  if (r.faulted) throw KernelFault(r.message);
}

}  // namespace

uintptr_t last_stream() { return reinterpret_cast<uintptr_t>(runtime().last_stream); }

void launch(const LaunchShape& shape, std::function<void()> body) {
  runtime().last_stream = shape.stream;
  if (Recording* recording = runtime().recording) {
    recording->launches_.emplace_back(shape, std::move(body));
  } else {
    run(shape, body);
  }
}

void set_seed(uint64_t seed) {
  runtime().random.seed(seed);
  runtime().seed = seed;
}

void set_multiprocessors(int count) { runtime().multiprocessors = count; }
int multiprocessors() { return runtime().multiprocessors; }

void set_compute_capability(int capability) { runtime().compute_capability = capability; }
int compute_capability() { return runtime().compute_capability; }

Recording::Recording() {
  if (runtime().recording != nullptr) throw KernelFault("launches are being recorded already");
  runtime().recording = this;
}

Recording::~Recording() { stop(); }

void Recording::stop() {
  if (runtime().recording == this) runtime().recording = nullptr;
}

void Recording::replay() const {
  for (const auto& [shape, body] : launches_) run(shape, body);
}

const ThreadIndex& index() { return runtime().index; }
char* shared_memory() { return runtime().shared_begin; }

void fault(const std::string& what) {
  Runtime& r = runtime();
  r.faulted = true;
  r.message = what.find("of block (") == std::string::npos ? place(*r.running) + ": " + what : what;
  r.running->fiber.suspend();  // for good: a launch that failed runs none of its fibers again
  __builtin_unreachable();
}

void sync_threads(int line) {
  Runtime& r = runtime();
  r.running->line = line;
  if (++r.at_barrier == r.index.threads) {
    finish_block_barrier(r);
  } else {
    wait("sync_threads", line);
  }
}

void collective(const char* kind, int line, void* operands, void (*complete)(void** operands)) {
  Runtime& r = runtime();
  Thread& t = *r.running;
  t.kind = kind;
  t.line = line;
  t.operands = operands;
  t.complete = complete;
  const int warp = t.id / kWarpSize;
  if (++r.at_warp[warp] == kWarpSize) {
    finish_collective(r, warp);
  } else {
    wait(kind, line);
  }
}

void sync_warp(int line) {
  collective("sync_warp", line, nullptr, [](void**) { races::warp_barrier(runtime().running->id / kWarpSize); });
}

void cp_async(void* shared, const void* global, int bytes, int valid_bytes) {
  Runtime& r = runtime();
  char* to = static_cast<char*>(shared);
  if (to < r.shared_begin || to + bytes > r.shared_begin + r.shared_bytes)
    fault("cp.async to outside of shared memory");
  if (reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(bytes) != 0) fault("cp.async to a misaligned address");
  if (reinterpret_cast<uintptr_t>(global) % static_cast<uintptr_t>(bytes) != 0)
    fault("cp.async from a misaligned address");
  if (valid_bytes > 0 && !is_device_memory(global, static_cast<size_t>(valid_bytes))) {
    fault("cp.async from what is not device memory");
  }
  races::write(r.running->id, to, static_cast<size_t>(bytes));
  // Whoever looks before the wait sees NaN, whatever was there.
  std::memset(to, 0xff, static_cast<size_t>(bytes));
  r.running->open_group.push_back({to, static_cast<const char*>(global), bytes, valid_bytes});
}

void cp_async_commit() {
  Thread& t = *runtime().running;
  t.committed.push_back(std::move(t.open_group));
  t.open_group.clear();
  // The others go on while the copies are under way.
  make_ready(t);
  t.fiber.suspend();
}

void cp_async_wait(int groups_left) {
  Thread& t = *runtime().running;
  const size_t left = static_cast<size_t>(groups_left);
  const size_t done = t.committed.size() > left ? t.committed.size() - left : 0;
  for (size_t i = 0; i < done; ++i) {
    for (const AsyncCopy& copy : t.committed[i]) {
      if (copy.valid_bytes > 0) races::read(t.id, copy.global, static_cast<size_t>(copy.valid_bytes));
      races::write(t.id, copy.shared, static_cast<size_t>(copy.bytes));
      std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.valid_bytes));
      std::memset(copy.shared + copy.valid_bytes, 0, static_cast<size_t>(copy.bytes - copy.valid_bytes));
    }
  }
  t.committed.erase(t.committed.begin(), t.committed.begin() + static_cast<std::ptrdiff_t>(done));
}

void fence() { races::fence(runtime().running->id); }

void atomic_access(const void* address) { races::atomic(runtime().running->id, address); }

float approximate(float exact, int ulps) {
  if (!std::isfinite(exact) || exact == 0.0f) return exact;
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof bits);
  Random random;
  random.seed(runtime().seed << 32 ^ bits);
  const auto offset = static_cast<int>(random.below(static_cast<uint64_t>(2 * ulps + 1))) - ulps;
  bits += static_cast<uint32_t>(offset);
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return std::isfinite(result) ? result : exact;
}

}  // namespace pagedcore::shim
