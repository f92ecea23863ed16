#include "isa.h"

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
#endif

namespace {

// __builtin_cpu_supports asks cpuid and, for wide registers, whether the operating system saves them (XCR0).
std::vector<const Isa*> runnable() {
  std::vector<const Isa*> list{&scalar::table};
#ifdef PAGEDCORE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) list.push_back(&avx2::table);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    list.push_back(&avx512::table);
  }
#endif
  return list;
}

const Isa& choose() {
  const std::vector<const Isa*> list = runnable();
  const char* wanted = std::getenv("PAGEDCORE_CPU_ISA");
  if (!wanted || !*wanted) return *list.back();
  std::string names;
  for (const Isa* isa : list) {
    if (std::strcmp(isa->name, wanted) == 0) return *isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw ArgumentError(Fault::invalid_argument, "PAGEDCORE_CPU_ISA", "one that this machine runs (" + names + ")", std::string("'") + wanted + "'");
}

}  // namespace

const Isa& selected_isa() {
  static const Isa& isa = choose();
  return isa;
}

}  // namespace pagedcore::cpu
