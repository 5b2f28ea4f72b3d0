// The fortified longjmp takes a jump to another stack for an error.
#undef _FORTIFY_SOURCE
#ifdef __APPLE__
#define _XOPEN_SOURCE 700  // its ucontext.h wants it
#define _DARWIN_C_SOURCE
#endif

#include "fiber.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstddef>
#include <stdexcept>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ON_HOST_ADDRESS_SANITIZER
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define ON_HOST_ADDRESS_SANITIZER
#endif
#ifdef ON_HOST_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace on_host {

namespace {

#ifdef ON_HOST_ADDRESS_SANITIZER
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// One side of a switch: where it goes on, and what the sanitizer knows of its stack.
struct Side {
  ucontext_t context{};
  jmp_buf jump;
  bool jumps = false;  // has been entered by its context, and left since
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// swapcontext asks the system for the signal mask at each switch, which takes five times as long as
// a jump, or more. The sanitizer, which follows each jump, gets the slow way.
[[gnu::noinline]] void go(Side& from, Side& to) {
#ifdef ON_HOST_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#else
  from.jumps = true;
  if (_setjmp(from.jump) != 0) return;
  if (to.jumps) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

}  // namespace

struct Fiber {
  Side inside, outside;
  char* stack = nullptr;  // with a page below that nobody may touch
  size_t guard = 0;
  void (*work)(void*) = nullptr;
  void* of = nullptr;
  bool ended = true;
};

namespace {

thread_local Fiber* beginning = nullptr;  // makecontext passes no pointers

void begin() {
  Fiber* fiber = beginning;
#ifdef ON_HOST_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &fiber->outside.stack, &fiber->outside.stack_bytes);
#endif
  for (;;) {  // once for each start()
    fiber->work(fiber->of);
    fiber->ended = true;
    go(fiber->inside, fiber->outside);
  }
}

}  // namespace

Fiber* new_fiber() {
  auto* fiber = new Fiber;
  fiber->guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, fiber->guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("on_host: no memory for the stack of a fiber");
  mprotect(memory, fiber->guard, PROT_NONE);
  fiber->stack = static_cast<char*>(memory);
  Side& inside = fiber->inside;
  inside.stack = fiber->stack + fiber->guard;
  inside.stack_bytes = kStackBytes;
  getcontext(&inside.context);
  inside.context.uc_stack.ss_sp = fiber->stack + fiber->guard;
  inside.context.uc_stack.ss_size = kStackBytes;
  inside.context.uc_link = nullptr;
  makecontext(&inside.context, begin, 0);
#ifdef ON_HOST_ADDRESS_SANITIZER
  inside.context.uc_stack = {};  // or swapcontext would forget what is poisoned there
#endif
  return fiber;
}

void delete_fiber(Fiber* fiber) {
#ifdef ON_HOST_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(fiber->inside.stack, kStackBytes);  // others may get these pages
#endif
  munmap(fiber->stack, fiber->guard + kStackBytes);
  delete fiber;
}

void start(Fiber* fiber, void (*work)(void*), void* of) {
  fiber->work = work;
  fiber->of = of;
  fiber->ended = false;
}

void enter(Fiber* fiber) {
  beginning = fiber;
  go(fiber->outside, fiber->inside);
}

void leave(Fiber* fiber) { go(fiber->inside, fiber->outside); }

bool has_ended(const Fiber* fiber) { return fiber->ended; }

}  // namespace on_host
