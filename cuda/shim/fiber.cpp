#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pagedcore::shim {
namespace {

constexpr size_t kGuardBytes = 4096;

#if defined(__SANITIZE_ADDRESS__)
void leave_stack(void** fake_stack, const void* to, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, to, bytes);
}
void enter_stack(void* fake_stack, const void** from, size_t* bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
}
// Frames that were given up left their red zones behind.
void clear_stack(const void* stack, size_t bytes) { __asan_unpoison_memory_region(stack, bytes); }
#else
void leave_stack(void**, const void*, size_t) {}
void enter_stack(void*, const void**, size_t*) {}
void clear_stack(const void*, size_t) {}
#endif

}  // namespace

// switch_context(save, load): stores this execution's stack pointer in *save and goes on with the one in `load`. What
// the calling convention lets a callee change freely, the caller has saved already; the rest goes on the stack.
extern "C" void pagedcore_shim_switch(void** save, void* load);
// Where a new fiber begins: calls r12(rbx), which never returns.
extern "C" void pagedcore_shim_begin();
#if defined(__x86_64__)
asm(R"(
.text
.type pagedcore_shim_switch, @function
.hidden pagedcore_shim_switch
pagedcore_shim_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pagedcore_shim_switch, .-pagedcore_shim_switch
.type pagedcore_shim_begin, @function
.hidden pagedcore_shim_begin
pagedcore_shim_begin:
  endbr64
  movq %rbx, %rdi
  call *%r12
  ud2
.size pagedcore_shim_begin, .-pagedcore_shim_begin
)");
#else
#error "the shim's context switch is written for x86-64"
#endif

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  stack_ = static_cast<char*>(memory) + kGuardBytes;
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

void Fiber::start(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  finished_ = false;
  fake_stack_ = nullptr;
  clear_stack(stack_, kStackBytes);
  // What the switch pops: r15, r14, r13, r12, rbx, rbp and the return address; then rsp is a multiple of 16, as a call
  // wants it.
  void** frame = reinterpret_cast<void**>(stack_ + kStackBytes - 16) - 7;
  std::memset(frame, 0, 7 * sizeof *frame);
  frame[3] = reinterpret_cast<void*>(&Fiber::trampoline);
  frame[4] = this;
  frame[6] = reinterpret_cast<void*>(&pagedcore_shim_begin);
  own_context_ = frame;
}

char* Fiber::give_up() {
  clear_stack(stack_, kStackBytes);
  return stack_ + kStackBytes - 64;
}

void Fiber::trampoline(Fiber* self) {
  enter_stack(nullptr, &self->resumer_stack_, &self->resumer_stack_bytes_);
  self->entry_(self->argument_);
  self->finished_ = true;
  leave_stack(nullptr, self->resumer_stack_, self->resumer_stack_bytes_);
  void* abandoned;
  pagedcore_shim_switch(&abandoned, self->resumer_context_);
  __builtin_unreachable();
}

void Fiber::resume() {
  void* fake_stack = nullptr;
  leave_stack(&fake_stack, stack_, kStackBytes);
  pagedcore_shim_switch(&resumer_context_, own_context_);
  enter_stack(fake_stack, nullptr, nullptr);
}

void Fiber::suspend() {
  leave_stack(&fake_stack_, resumer_stack_, resumer_stack_bytes_);
  pagedcore_shim_switch(&own_context_, resumer_context_);
  enter_stack(fake_stack_, &resumer_stack_, &resumer_stack_bytes_);
}

}  // namespace pagedcore::shim
