#include "isa.h"

#include <atomic>
#include <cstdlib>
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

const Isa& find(const char* wanted, const char* source) {
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

const Isa& selected_isa() {
  if (const Isa* isa = selected.load(std::memory_order_acquire)) return *isa;
  const char* wanted = std::getenv("PAGEDCORE_CPU_ISA");
  const Isa& isa = wanted && *wanted ? find(wanted, "PAGEDCORE_CPU_ISA") : *runnable().back();
  selected.store(&isa, std::memory_order_release);
  return isa;
}

void select_isa(const char* name) { selected.store(&find(name, "name"), std::memory_order_release); }

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const Isa* isa : runnable()) names.emplace_back(isa->name);
  return names;
}

}  // namespace pagedcore::cpu
