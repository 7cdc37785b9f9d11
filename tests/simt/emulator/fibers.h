// Fibers: their stacks, and the jump from one to another.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EPSA_UCONTEXT)
#undef EPSA_UCONTEXT
#define EPSA_UCONTEXT
#include <ucontext.h>
#endif

namespace epsa::emulator {

#ifdef EPSA_TSAN
constexpr int64_t kMostThreads = 2048;  // TSan has room for about 8000
#else
constexpr int64_t kMostThreads = 16384;  // a process has 65530 mappings
#endif

struct Stack {
  char* base = nullptr;  // above a page that traps
  size_t bytes = 0;
  [[maybe_unused]] void* tsan = nullptr;  // TSan's handle of the thread
};

Stack take_stack();
// `left_in_order`: did the thread on it end by itself?
void give_stack(const Stack& stack, bool left_in_order);
void end_launch();  // stacks that were given back may be taken again

#ifdef EPSA_UCONTEXT
using Context = ucontext_t;
#else
using Context = void*;  // the stack pointer
#endif

// The first jump to the context calls `entry` on the stack.
void prepare(Context& context, char* stack, void (*entry)());
void jump(Context& from, Context& to);

}  // namespace epsa::emulator
