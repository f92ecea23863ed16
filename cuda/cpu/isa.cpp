#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "errors.h"

namespace pagedcore::cpu {

#define PAGEDCORE_DECLARE(name) \
  namespace name {              \
  extern const Isa table;       \
  }
PAGEDCORE_DECLARE(scalar)
#ifdef PAGEDCORE_X86
PAGEDCORE_DECLARE(avx2)
PAGEDCORE_DECLARE(avx512)
PAGEDCORE_DECLARE(avx512_bf16)
PAGEDCORE_DECLARE(avx512_bf16_emulated)
#endif

namespace {

// __builtin_cpu_supports asks cpuid and, for wide registers, whether the operating system saves them (XCR0).
std::vector<const Isa*> runnable() {
  std::vector<const Isa*> list{&scalar::table};
#ifdef PAGEDCORE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    list.push_back(&avx2::table);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    list.push_back(&avx512::table);
    if (__builtin_cpu_supports("avx512bf16")) list.push_back(&avx512_bf16::table);
  }
#endif
  return list;
}

const Isa& find(const char* source, const char* wanted) {
  std::string names;
  for (const Isa* isa : runnable()) {
    if (std::strcmp(isa->name, wanted) == 0) return *isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
#ifdef PAGEDCORE_X86
  // Not listed: only tests want it.
  if (std::strcmp(avx512_bf16_emulated::table.name, wanted) == 0 && names.find("avx512") != std::string::npos) {
    return avx512_bf16_emulated::table;
  }
#endif
  throw ArgumentError(Fault::invalid_argument, source, "one that this machine runs (" + names + ")",
                      std::string("'") + wanted + "'");
}

std::atomic<const Isa*> selected{nullptr};

}  // namespace

bool isa_selected() { return selected.load(std::memory_order_acquire) != nullptr; }

void select_best_isa() { selected.store(runnable().back(), std::memory_order_release); }

void select_isa(const char* source, const char* name) {
  selected.store(&find(source, name), std::memory_order_release);
}

const Isa& selected_isa() {
  if (!isa_selected()) select_best_isa();
  return *selected.load(std::memory_order_acquire);
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : runnable()) names.emplace_back(isa->name);
  return names;
}

}  // namespace pagedcore::cpu
