// Where a thread of a kernel stands while others run: a stack and a place on it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && !defined(CUDA_ON_CPU_UCONTEXT)

/// Saves the callee's registers and the stack pointer at *from, and goes on where `to` was saved.
extern "C" void cuda_on_cpu_switch(void** from, void* to);

namespace cuda_on_cpu {

class Fiber {
 public:
  /// The next switch to it calls entry() on this stack; it must not return.
  void start(char* stack, size_t size, void (*entry)()) {
    auto* top = reinterpret_cast<void**>(stack + size / 16 * 16);
    *--top = nullptr;  // the return address of entry()
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    place_ = top;
  }

  void switch_to(Fiber& other) { cuda_on_cpu_switch(&place_, other.place_); }

 private:
  void* place_ = nullptr;
};

}  // namespace cuda_on_cpu

#else

#include <ucontext.h>

namespace cuda_on_cpu {

class Fiber {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }

  void switch_to(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

}  // namespace cuda_on_cpu

#endif
