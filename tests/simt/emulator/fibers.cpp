#include "emulator/fibers.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "emulator/sanitizers.h"

namespace epsa::emulator {
namespace {

#if defined(EPSA_TSAN) || defined(EPSA_ASAN)
constexpr size_t kStack = 256 << 10;  // for a sanitizer's report
#else
constexpr size_t kStack = 64 << 10;
#endif

}  // namespace

// ---- stacks ----

namespace {
std::vector<Stack> spare_stacks;
}  // namespace

Stack take_stack() {
  if (!spare_stacks.empty()) {
    const Stack stack = spare_stacks.back();
    spare_stacks.pop_back();
    unpoison(stack.base, stack.bytes);  // its last frames never returned
    return stack;
  }
  const size_t page = sysconf(_SC_PAGESIZE);
  void* memory = mmap(
      nullptr, page + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
      -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("a fiber's stack");
    std::abort();
  }
  Stack stack{static_cast<char*>(memory) + page, kStack};
#ifdef EPSA_TSAN
  stack.tsan = __tsan_create_fiber(0);
#endif
  return stack;
}

#ifdef EPSA_TSAN

// A launch gives each thread its own stack. Threads that shared one would race
// there, and TSan would take them for the same thread elsewhere. The next launch
// may use the stack again.
namespace {
std::vector<Stack> used_stacks;
}  // namespace

void give_stack(const Stack& stack, bool left_in_order) {
  // Reuse saves time: TSan needs nearly a millisecond for a new one.
  if (left_in_order && spare_stacks.size() + used_stacks.size() < size_t{kMostThreads}) {
    used_stacks.push_back(stack);
  } else {
    const size_t page = sysconf(_SC_PAGESIZE);
    __tsan_destroy_fiber(stack.tsan);
    munmap(stack.base - page, page + stack.bytes);
  }
}

void end_launch() {
  spare_stacks.insert(spare_stacks.end(), used_stacks.begin(), used_stacks.end());
  used_stacks.clear();
}

#else

void give_stack(const Stack& stack, bool) {
  spare_stacks.push_back(stack);
}
void end_launch() {}

#endif

// ---- contexts ----

#ifdef EPSA_UCONTEXT

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void jump(Context& from, Context& to) {
  swapcontext(&from, &to);
}

#else

// Saves the callee-saved registers on the caller's stack, then restores those of
// the other stack. The floating-point modes are the same on both.
extern "C" __attribute__((visibility("hidden"))) void epsa_switch_stacks(void** from, void* to);
asm(R"(
.text
.hidden epsa_switch_stacks
.globl epsa_switch_stacks
.type epsa_switch_stacks, @function
epsa_switch_stacks:
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
.size epsa_switch_stacks, .-epsa_switch_stacks
)");

void prepare(Context& context, char* stack, void (*entry)()) {
  // Six registers, the entry, and a return address that is never used.
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  context = top;
}

void jump(Context& from, Context& to) {
  epsa_switch_stacks(&from, to);
}

#endif

}  // namespace epsa::emulator
