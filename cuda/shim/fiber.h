// Fibers: the threads of a block, on one thread of the operating system, switched in a dozen instructions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pagedcore::shim {

// A stack with an execution on it. Switching back and forth between it and the fiber that resumed it is all it can do.
class Fiber {
 public:
  static constexpr size_t kStackBytes = size_t{256} << 10;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next `resume` runs entry(argument) from the start, on a stack whose earlier contents are given up.
  void start(void (*entry)(void*), void* argument);
  // Runs until the fiber suspends or its entry returns.
  void resume();
  // Called on the fiber: back to who resumed it.
  void suspend();

  bool finished() const { return finished_; }
  // Gives up whatever the fiber was doing: where on its stack a call may begin instead, a multiple of 16.
  char* give_up();

 private:
  static void trampoline(Fiber* self);

  char* stack_ = nullptr;  // its lowest page is not mapped in: an overflow faults
  void* own_context_ = nullptr;
  void* resumer_context_ = nullptr;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;

  // What AddressSanitizer has to be told of a change of stacks; unused without it.
  void* fake_stack_ = nullptr;
  const void* resumer_stack_ = nullptr;
  size_t resumer_stack_bytes_ = 0;
};

}  // namespace pagedcore::shim
