// Threads for the CPU kernels: at::parallel_for, made safe after fork().
#pragma once

#include <ATen/Parallel.h>

namespace epsa::cpu {

// How many threads this process may use now: at::get_num_threads(), but 1 within
// a parallel region and in a child of fork() whose parent had other threads. The
// OpenMP runtime's threads do not survive a fork, and a parallel region in such
// a child waits for them for ever (PyTorch's own operators do).
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

}  // namespace epsa::cpu
