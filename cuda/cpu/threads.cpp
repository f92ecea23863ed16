#include "threads.h"

#include <dlfcn.h>
#include <link.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace pagedcore::cpu {
namespace {

// The OpenMP runtime that is loaded in the process, found at run time and never linked: a kernel that runs on torch's
// own team keeps those threads warm between a linear layer and the attention after it. A second team would put them to
// sleep, or fight them for the cores.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned,
                   unsigned);  // GOMP_parallel; LLVM's and Intel's runtimes export it too
  int (*thread_num)();
  int (*max_threads)();
  int (*in_parallel)();
  std::string name;
};

struct Search {
  unsigned long long loads;  // the dynamic linker's count of loaded objects at the last search
  bool unchanged;
  int best_rank;
  std::string best_path;
};

// torch ships its runtime under torch's own directory: if several are loaded, that is the one whose threads are warm.
int rank_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string file = path.substr(slash == std::string::npos ? 0 : slash + 1);
  const bool gomp = file.rfind("libgomp", 0) == 0;
  const bool kmp = file.rfind("libiomp5", 0) == 0 || file.rfind("libomp", 0) == 0;
  if (!gomp && !kmp) return 0;
  return 1 + (gomp ? 1 : 0) + (path.find("/torch") != std::string::npos ? 2 : 0);
}

int visit(dl_phdr_info* info, size_t, void* data) {
  Search& search = *static_cast<Search*>(data);
  if (info->dlpi_adds == search.loads) {
    search.unchanged = true;
    return 1;
  }
  if (info->dlpi_name) {
    const int rank = rank_of(info->dlpi_name);
    if (rank > search.best_rank) {
      search.best_rank = rank;
      search.best_path = info->dlpi_name;
    }
  }
  return 0;
}

int visit_count(dl_phdr_info* info, size_t, void* data) {
  *static_cast<unsigned long long*>(data) = info->dlpi_adds;
  return 1;
}

std::atomic<const OpenMp*> found{nullptr};
// A forked child inherits the runtime's records of a team whose threads did not come along: it would wait for them.
std::atomic<bool> lost_to_fork{false};
std::mutex search_mutex;

// Null while no runtime is loaded. Looks again only when the process has loaded new objects. The caller has the lock.
const OpenMp* search() {
  if (const OpenMp* known = found.load(std::memory_order_acquire)) return known;
  static unsigned long long searched_at = ~0ull;
  Search search{searched_at, false, 0, {}};
  dl_iterate_phdr(visit, &search);
  if (search.unchanged) return nullptr;
  dl_iterate_phdr(visit_count, &searched_at);
  if (search.best_rank == 0) return nullptr;
  void* library = dlopen(search.best_path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;
  auto* result = new OpenMp{};  // lives as long as the process
  const auto symbol = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    return function != nullptr;
  };
  if (symbol("GOMP_parallel", result->parallel) && symbol("omp_get_thread_num", result->thread_num) &&
      symbol("omp_get_max_threads", result->max_threads) && symbol("omp_in_parallel", result->in_parallel)) {
    result->name = search.best_path.substr(search.best_path.rfind('/') + 1);
    found.store(result, std::memory_order_release);
    return result;
  }
  delete result;
  return nullptr;
}

const OpenMp* openmp() {
  if (lost_to_fork.load(std::memory_order_relaxed)) return nullptr;
  if (const OpenMp* known = found.load(std::memory_order_acquire)) return known;
  const std::lock_guard<std::mutex> lock(search_mutex);
  return search();
}

// Threads of our own, for processes without OpenMP (NumPy callers). They sleep between calls. One parallel call at a
// time uses them; a call that finds them busy runs on its own thread alone.
class Pool {
 public:
  void run(int num_threads, void (*body)(void*, int), void* context) {
    const std::unique_lock<std::mutex> busy(call_mutex_, std::try_to_lock);
    if (!busy.owns_lock()) return body(context, 0);
    grow(num_threads - 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      wanted_ = num_threads - 1 < static_cast<int>(size_) ? num_threads - 1 : static_cast<int>(size_);
      running_ = wanted_;
      ++epoch_;
    }
    wake_.notify_all();
    body(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return running_ == 0; });
  }

 private:
  void grow(int workers) {
    while (static_cast<int>(size_) < workers) {
      const int number = static_cast<int>(size_) + 1;
      uint64_t seen;
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        seen = epoch_;
      }
      try {
        std::thread([this, number, seen] { work(number, seen); }).detach();
      } catch (const std::system_error&) {
        return;  // as many as the system gives
      }
      ++size_;
    }
  }

  void work(int number, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return epoch_ != seen; });
      seen = epoch_;
      if (number > wanted_) continue;
      const auto body = body_;
      void* const context = context_;
      lock.unlock();
      body(context, number);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex call_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  uint64_t epoch_ = 0;
  int wanted_ = 0;
  int running_ = 0;
  size_t size_ = 0;
};

// Never destroyed: its sleeping threads end with the process.
std::atomic<Pool*> own_pool{new Pool};

// A fork comes at any moment, also while another thread is in here without the GIL. The lock is the forking thread's
// while it happens: the child would otherwise inherit it from a thread that did not come along. And the search is made
// before it, because a runtime that no kernel has used yet may have a team as well, which torch started.
void before_fork() {
  search_mutex.lock();
  try {
    search();
  } catch (const std::bad_alloc&) {
    // The process forks all the same.
  }
}

void after_fork_in_child() {
  lost_to_fork.store(found.load() != nullptr);
  search_mutex.unlock();
  own_pool.store(new Pool);  // its threads did not come along either
}

// Installed as the module is loaded: before the first lock, and before anything that a fork could leave half done.
const int handlers_installed = pthread_atfork(before_fork, [] { search_mutex.unlock(); }, after_fork_in_child);

struct Call {
  void (*body)(void*, int);
  void* context;
  int (*thread_num)();
};

}  // namespace

int max_threads() {
  if (const OpenMp* omp = openmp()) return omp->in_parallel() ? 1 : omp->max_threads();
  static const int cpus = [] {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
    return static_cast<int>(std::thread::hardware_concurrency());
  }();
  return cpus > 0 ? cpus : 1;
}

void parallel(int num_threads, void (*body)(void* context, int thread), void* context) {
  if (num_threads <= 1) return body(context, 0);
  if (const OpenMp* omp = openmp()) {
    if (omp->in_parallel()) return body(context, 0);
    Call call{body, context, omp->thread_num};
    omp->parallel(
        [](void* data) {
          const Call& c = *static_cast<Call*>(data);
          c.body(c.context, c.thread_num());
        },
        &call, static_cast<unsigned>(num_threads), 0);
    return;
  }
  own_pool.load()->run(num_threads, body, context);
}

const char* thread_runtime() {
  const OpenMp* omp = openmp();
  return omp ? omp->name.c_str() : "own threads";
}

}  // namespace pagedcore::cpu
