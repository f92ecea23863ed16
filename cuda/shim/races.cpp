#include "races.h"

#ifndef PAGEDCORE_SHIM_RACES

namespace pagedcore::shim::races {
void begin_launch() {}
void begin_block(int64_t, const void*, size_t, int) {}
void block_barrier() {}
void warp_barrier(int) {}
void fence(int) {}
void atomic(int, const void*) {}
void read(int, const void*, size_t) {}
void write(int, const void*, size_t) {}
}  // namespace pagedcore::shim::races

#else

#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>
#include <vector>

#include "shim.h"

namespace pagedcore::shim::races {
namespace {

constexpr int kMany = -2;  // more than one thread, warp or block

// When and by whom a byte was accessed. Epochs count barriers: of the block, and of the warp within it.
struct Access {
  int64_t block = -1;  // -1: not in this launch
  int epoch = 0;
  int warp_epoch = 0;
  int thread = 0;
  int warp = 0;
};

struct Cell {
  Access write, read;
};

// What one thread of a block made visible to others: everything in its block before epoch `epoch`, and its own accesses
// up to it.
struct Release {
  int64_t block;
  int thread;
  int epoch;
  bool covers(const Access& a) const {
    return a.block == block && (a.epoch < epoch || (a.thread == thread && a.epoch <= epoch));
  }
};

using Releases = std::vector<Release>;

void merge(Releases& into, const Releases& from) {
  for (const Release& r : from) {
    const bool known = std::any_of(into.begin(), into.end(), [&](const Release& have) {
      return have.block == r.block && have.thread == r.thread && have.epoch >= r.epoch;
    });
    if (!known) into.push_back(r);
  }
}

struct ThreadClock {
  int fence_epoch = -1;  // of its last fence; -1: none in this block
  Releases seen;         // by its atomics since its last fence
  Releases acquired;
};

struct State {
  bool active = false;
  int64_t block = 0;
  int epoch = 0;
  std::vector<int> warp_epochs;
  std::vector<ThreadClock> threads;
  Releases acquired;  // by every thread of the block
  const char* shared = nullptr;
  std::vector<Cell> shared_cells;
  std::unordered_map<uintptr_t, std::array<Cell, 64>> global_lines;
  std::unordered_map<const void*, Releases> atomics;
};

State& state() {
  static State s;
  return s;
}

bool ordered_across_blocks(const State& s, int thread, const Access& earlier) {
  const auto covers = [&](const Release& r) { return r.covers(earlier); };
  const Releases& own = s.threads[static_cast<size_t>(thread)].acquired;
  return std::any_of(s.acquired.begin(), s.acquired.end(), covers) || std::any_of(own.begin(), own.end(), covers);
}

// Whether `earlier` happens before what `thread` does now.
bool ordered(const State& s, int thread, const Access& earlier) {
  if (earlier.block == -1) return true;
  if (earlier.block == kMany) return false;
  if (earlier.block != s.block) return ordered_across_blocks(s, thread, earlier);
  if (earlier.epoch < s.epoch || earlier.thread == thread) return true;
  const int warp = thread / kWarpSize;
  return earlier.warp == warp && earlier.warp_epoch < s.warp_epochs[static_cast<size_t>(warp)];
}

[[noreturn]] void report(const char* now, const char* before, const Access& earlier, const void* address) {
  const State& s = state();
  std::string where;
  const auto* p = static_cast<const char*>(address);
  if (p >= s.shared && p < s.shared + s.shared_cells.size()) {
    where = "byte " + std::to_string(p - s.shared) + " of shared memory";
  } else {
    where = "device memory";
  }
  std::string who = earlier.thread == kMany ? "several threads" : "thread " + std::to_string(earlier.thread);
  if (earlier.block == kMany) {
    who += " of several blocks";
  } else if (earlier.block != s.block) {
    who += " of another block, number " + std::to_string(earlier.block);
  }
  fault("race: " + std::string(now) + " of " + where + " not ordered after the " + before + " by " + who);
}

Access now(const State& s, int thread) {
  const int warp = thread / kWarpSize;
  return {s.block, s.epoch, s.warp_epochs[static_cast<size_t>(warp)], thread, warp};
}

// A second reader joins: what later writes must be ordered after. An earlier read that happens before this one need not
// be kept, as whatever is ordered after this one is ordered after it too, except for other warps: those are told apart.
void add_reader(const State& s, int thread, Access& reader) {
  const Access mine = now(s, thread);
  if (ordered(s, thread, reader)) {
    reader = mine;
  } else if (reader.block != s.block) {
    reader.block = kMany;
  } else {
    reader.thread = kMany;
    if (reader.warp != mine.warp) reader.warp = kMany;
  }
}

void access(int thread, const char* address, bool writes, Cell& cell) {
  const State& s = state();
  if (!ordered(s, thread, cell.write)) report(writes ? "write" : "read", "write", cell.write, address);
  if (writes) {
    if (!ordered(s, thread, cell.read)) report("write", "read", cell.read, address);
    cell.write = now(s, thread);
    cell.read = Access{};
  } else {
    add_reader(s, thread, cell.read);
  }
}

void access(int thread, const void* address, size_t bytes, bool writes) {
  State& s = state();
  if (!s.active || bytes == 0) return;
  const auto* p = static_cast<const char*>(address);
  if (p >= s.shared && p < s.shared + s.shared_cells.size()) {
    for (size_t i = 0; i < bytes && p + i < s.shared + s.shared_cells.size(); ++i) {
      access(thread, p + i, writes, s.shared_cells[static_cast<size_t>(p + i - s.shared)]);
    }
  } else if (is_device_memory(address, bytes)) {
    for (size_t i = 0; i < bytes; ++i) {
      const auto at = reinterpret_cast<uintptr_t>(p + i);
      access(thread, p + i, writes, s.global_lines[at / 64][at % 64]);
    }
  }
}

}  // namespace

void begin_launch() {
  State& s = state();
  s.global_lines.clear();
  s.atomics.clear();
  s.active = false;
}

void begin_block(int64_t block, const void* shared, size_t shared_bytes, int threads) {
  State& s = state();
  s.active = true;
  s.block = block;
  s.epoch = 0;
  s.warp_epochs.assign(static_cast<size_t>((threads + kWarpSize - 1) / kWarpSize), 0);
  s.threads.assign(static_cast<size_t>(threads), ThreadClock{});
  s.acquired.clear();
  s.shared = static_cast<const char*>(shared);
  s.shared_cells.assign(shared_bytes, Cell{});
}

void block_barrier() {
  State& s = state();
  ++s.epoch;
  for (ThreadClock& t : s.threads) {
    merge(s.acquired, t.acquired);
    t.acquired.clear();
  }
}

void warp_barrier(int warp) {
  State& s = state();
  ++s.warp_epochs[static_cast<size_t>(warp)];
  const auto first = static_cast<size_t>(warp * kWarpSize);
  Releases all;
  for (size_t i = first; i < first + kWarpSize; ++i) merge(all, s.threads[i].acquired);
  for (size_t i = first; i < first + kWarpSize; ++i) s.threads[i].acquired = all;
}

void fence(int thread) {
  State& s = state();
  ThreadClock& t = s.threads[static_cast<size_t>(thread)];
  t.fence_epoch = s.epoch;
  merge(t.acquired, t.seen);
  t.seen.clear();
}

void atomic(int thread, const void* address) {
  State& s = state();
  ThreadClock& t = s.threads[static_cast<size_t>(thread)];
  Releases& here = s.atomics[address];
  merge(t.seen, here);
  if (t.fence_epoch >= 0) {
    merge(here, {{s.block, thread, t.fence_epoch}});
    merge(here, s.acquired);
    merge(here, t.acquired);
  }
}

void read(int thread, const void* address, size_t bytes) { access(thread, address, bytes, false); }
void write(int thread, const void* address, size_t bytes) { access(thread, address, bytes, true); }

}  // namespace pagedcore::shim::races

// What the compiler calls for -fsanitize=thread.
namespace races = pagedcore::shim::races;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define PAGEDCORE_HOOKS(bytes)                                                                           \
  void __tsan_read##bytes(void* p) { races::read(pagedcore::shim::index().thread, p, bytes); }           \
  void __tsan_write##bytes(void* p) { races::write(pagedcore::shim::index().thread, p, bytes); }         \
  void __tsan_unaligned_read##bytes(void* p) { races::read(pagedcore::shim::index().thread, p, bytes); } \
  void __tsan_unaligned_write##bytes(void* p) { races::write(pagedcore::shim::index().thread, p, bytes); }
PAGEDCORE_HOOKS(1)
PAGEDCORE_HOOKS(2)
PAGEDCORE_HOOKS(4)
PAGEDCORE_HOOKS(8)
PAGEDCORE_HOOKS(16)
#undef PAGEDCORE_HOOKS
void __tsan_read_range(void* p, size_t n) { races::read(pagedcore::shim::index().thread, p, n); }
void __tsan_write_range(void* p, size_t n) { races::write(pagedcore::shim::index().thread, p, n); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

#endif
