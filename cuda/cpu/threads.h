// Runs a function on the threads that the process already has.
#pragma once

namespace pagedcore::cpu {

// Threads a parallel call uses by default: what the OpenMP runtime in the process says (torch.set_num_threads sets it),
// else the CPUs this process may run on.
int max_threads();

// Calls body(context, thread) with thread = 0 .. n - 1, n <= num_threads, and returns when all calls have returned.
// Thread 0 is the caller. `n` may be smaller than asked for, so the body takes its work from a shared counter, not from
// its number. The body must not throw.
void parallel(int num_threads, void (*body)(void* context, int thread), void* context);

template <class Body>
void parallel(int num_threads, const Body& body) {
  const auto call = [](void* context, int thread) { (*static_cast<const Body*>(context))(thread); };
  parallel(num_threads, call, const_cast<Body*>(&body));
}

// "libgomp.so.1", ... or "own threads"; for diagnostics.
const char* thread_runtime();

}  // namespace pagedcore::cpu
