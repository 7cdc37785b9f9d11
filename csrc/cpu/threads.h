// Threads for the CPU kernels: at::parallel_for, made safe after fork().
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

namespace epsa::cpu {

// The threads that this process may use now: at::get_num_threads(). It is 1 within a
// parallel region, and in a forked child whose parent had other threads. The OpenMP
// runtime's threads do not survive a fork. A parallel region in such a child would wait
// for them for ever, as PyTorch's own operators do.
int64_t usable_threads();

// f(begin, end) over pieces of the range, of at least `grain` each.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (usable_threads() == 1) {
    if (begin < end) {
      f(begin, end);
    }
    return;
  }
  at::parallel_for(begin, end, grain, f);
}

// f(begin, end): everything on one thread, or a part on each thread.
template <class F>
void for_parts(int64_t count, int64_t threads, const F& f) {
  if (threads == 1) {
    if (count > 0) {
      f(0, count);
    }
  } else {
    parallel_for(0, count, 1, f);
  }
}

// f(i) for i in [0, count). Each i goes to the next free thread.
template <class F>
void for_each(int64_t count, int64_t threads, const F& f) {
  if (threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) {
      f(i);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) {
      f(i);
    }
  });
}

// f(i, own) as in for_each, with what make() returned on the same thread: its scratch
// memory.
template <class Make, class F>
void for_each_with(int64_t count, int64_t threads, const Make& make, const F& f) {
  std::atomic<int64_t> next{0};
  for_parts(threads, threads, [&](int64_t, int64_t) {
    const auto own = make();
    for (int64_t i; (i = next++) < count;) {
      f(i, own);
    }
  });
}

}  // namespace epsa::cpu
