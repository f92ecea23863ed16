// Device memory of the shim: mappings of their own between guard pages, open only while a kernel runs.
#include "memory.h"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <new>

#include "shim.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace pagedcore::shim {
namespace {

constexpr size_t kPage = 4096;
// Unmapped on both sides of an allocation: an index that is a block off lands there.
constexpr size_t kGuard = size_t{1} << 20;
constexpr size_t kAlignment = 256;  // what cudaMalloc promises

struct Mapping {
  char* base;  // of the mapping, guard pages included
  size_t mapped;
  size_t bytes;
};

std::map<const char*, Mapping>& mappings() {
  static std::map<const char*, Mapping> all;
  return all;
}

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

void protect(const Mapping& m, int protection) {
  const size_t inner = m.mapped - 2 * kGuard;
  if (inner != 0) mprotect(m.base + kGuard, inner, protection);
}

const std::pair<const char* const, Mapping>* find(const void* address, size_t bytes) {
  const char* p = static_cast<const char*>(address);
  auto it = mappings().upper_bound(p);
  if (it == mappings().begin()) return nullptr;
  --it;
  return p + bytes <= it->first + it->second.bytes ? &*it : nullptr;
}

// Opens one allocation for a copy by the host.
class Opened {
 public:
  Opened(const void* address, size_t bytes) : entry_(find(address, bytes)) {
    if (entry_ == nullptr)
      throw std::out_of_range("not " + std::to_string(bytes) + " bytes of the shim's device memory");
    protect(entry_->second, PROT_READ | PROT_WRITE);
  }
  ~Opened() { protect(entry_->second, PROT_NONE); }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

 private:
  const std::pair<const char* const, Mapping>* entry_;
};

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
void forbid(const void* memory, size_t bytes) { __asan_poison_memory_region(memory, bytes); }
void allow(const void* memory, size_t bytes) { __asan_unpoison_memory_region(memory, bytes); }
#else
void forbid(const void*, size_t) {}
void allow(const void*, size_t) {}
#endif

void* allocate(size_t bytes, bool poison) {
  // The end touches the guard, up to the alignment: reading past it by more is a fault at once.
  const size_t padded = round_up(bytes, kAlignment);
  const size_t inner = round_up(padded, kPage);
  const size_t mapped = inner + 2 * kGuard;
  void* base = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) throw std::bad_alloc();
  char* data = static_cast<char*>(base) + kGuard + (inner - padded);
  mappings()[data] = {static_cast<char*>(base), mapped, bytes};
  // What alignment adds before and after is mapped too: only AddressSanitizer sees a step into it.
  forbid(data - (inner - padded), inner - padded);
  forbid(data + bytes, padded - bytes);
  if (poison && bytes != 0) {
    const Opened open(data, bytes);
    std::memset(data, 0xff, bytes);  // NaN in every float format here
  }
  return data;
}

void release(void* memory) {
  if (memory == nullptr) return;
  const auto it = mappings().find(static_cast<char*>(memory));
  if (it == mappings().end()) throw std::out_of_range("not the start of an allocation of the shim");
  const Mapping& m = it->second;
  char* const inner = m.base + kGuard;
  char* const end = m.base + m.mapped - kGuard;
  allow(inner, static_cast<size_t>(it->first - inner));
  allow(it->first + m.bytes, static_cast<size_t>(end - (it->first + m.bytes)));
  munmap(m.base, m.mapped);
  mappings().erase(it);
}

void copy_to_device(void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  const Opened open(device, bytes);
  std::memcpy(device, host, bytes);
}

void copy_to_host(void* host, const void* device, size_t bytes) {
  if (bytes == 0) return;
  const Opened open(device, bytes);
  std::memcpy(host, device, bytes);
}

bool is_device_memory(const void* address, size_t bytes) { return find(address, bytes) != nullptr; }

DeviceMemoryOpen::DeviceMemoryOpen() {
  for (const auto& [data, m] : mappings()) protect(m, PROT_READ | PROT_WRITE);
}

DeviceMemoryOpen::~DeviceMemoryOpen() {
  for (const auto& [data, m] : mappings()) protect(m, PROT_NONE);
}

}  // namespace pagedcore::shim
