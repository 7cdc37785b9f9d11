// What the emulator tells the sanitizers. They do not watch the emulator itself, see
// build.py: what the scheduler does is no synchronisation of the threads that it
// runs. With EPSA_ASAN or EPSA_TSAN these functions report stacks, threads and the
// order that the primitives promise.
#pragma once

#include <cstddef>
#include <cstring>

#ifdef __SANITIZE_THREAD__
#error "the scheduler must not be watched"
#endif

#ifdef EPSA_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef EPSA_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
#endif

namespace epsa::emulator {

// For TSan: everything before a release of `order` is seen after its acquire.
#ifdef EPSA_TSAN
constexpr unsigned kNoSync = 1;
inline void acquire(void* order) {
  __tsan_acquire(order);
}
inline void release(void* order) {
  __tsan_release(order);
}
#else
inline void acquire(void*) {}
inline void release(void*) {}
#endif

// Fills memory that is gone with NaN. ASan reports any access.
inline void poison(void* memory, size_t bytes) {
  std::memset(memory, 0xff, bytes);
#ifdef EPSA_ASAN
  __asan_poison_memory_region(memory, bytes);
#endif
}

inline void unpoison([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#ifdef EPSA_ASAN
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace epsa::emulator
