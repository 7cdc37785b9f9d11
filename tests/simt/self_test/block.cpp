// One block: shared memory, barriers, shuffles, copies.
#include <algorithm>
#include <numeric>
#include <vector>

#include "self_test/self_test.h"

namespace epsa::cuda {
namespace {

// out[b] = sum of the block's part of `in`. The bugs: no barrier (first), one warp
// leaves before it (second), one warp is at a shuffle instead (third).
template <Bug bug, class A>
EPSA_KERNEL(kThreads, 1)
block_sum(A* in, A* out) {
  A* shared = reinterpret_cast<A*>(shared_memory());
  A sum = in[block_id() * block_threads() + thread_id()];
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
  }
  if (thread_id() % kWarp == 0) {
    shared[thread_id() / kWarp] = sum;
  }
  const bool last_warp = thread_id() >= block_threads() - kWarp;
  if (bug == Bug::second && last_warp) {
    return;
  }
  if (bug == Bug::third && last_warp) {
    shuffle_xor(sum, 1);
  }
  if (bug == Bug::none || bug == Bug::second ||
      (bug == Bug::third && (thread_id() % 2 != 0 || !last_warp))) {
    barrier();
  } else if (bug == Bug::third) {
    shuffle_xor(sum, 1);
  }
  if (thread_id() == 0) {
    out[block_id()] = 0;
    for (int warp = 0; warp < block_threads() / kWarp; ++warp) {
      out[block_id()] += shared[warp];
    }
  }
}

template <Bug bug, class A>
std::string sums() {
  const LaunchOptions options{.blocks = kBlocks, .threads = kThreads, .shared_bytes = 16};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<A> in(kBlocks * kThreads), out(kBlocks);
    std::iota(in.begin(), in.end(), A{1});
    const std::string report = launch(scheduled, [&] { block_sum<bug>(in.data(), out.data()); });
    bool right = true;
    for (int b = 0; b < kBlocks; ++b) {
      const A first = in[b * kThreads];
      const A rest = kThreads * (kThreads - 1) / 2;
      right = right && out[b] == kThreads * first + rest;
    }
    return report.empty() ? expect(right) : report;
  });
}

// Reverses the block's part, through shared memory. The bugs: it reads before the
// wait (first), never waits (second), writes one element too many (third).
template <Bug bug>
EPSA_KERNEL(kThreads, 1)
reverse(float* in, float* out) {
  Four* shared = reinterpret_cast<Four*>(shared_memory());
  const int64_t base = block_id() * block_threads();
  const int other = block_threads() - 1 - thread_id();
  copy_async16(shared + thread_id(), in + 4 * (base + thread_id()));
  if (bug == Bug::none || bug == Bug::third) {
    copy_async_wait();
  }
  barrier();
  const Four got = shared[other];
  if (bug == Bug::first) {
    copy_async_wait();
  }
  for (int i = 0; i < 4; ++i) {
    const int64_t to = 4 * (base + thread_id()) + 3 - i;
    out[bug == Bug::third ? to + 1 : to] = got.x[i];
  }
}

template <Bug bug>
std::string reversed() {
  const LaunchOptions options{
      .blocks = kBlocks, .threads = kThreads, .shared_bytes = kThreads * sizeof(Four)};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<Four> in(kBlocks * kThreads), out(kBlocks * kThreads);
    float* first = in[0].x;
    std::iota(first, first + 4 * in.size(), 1.f);
    const std::string report = launch(scheduled, [&] { reverse<bug>(in[0].x, out[0].x); });
    for (int b = 0; b < kBlocks; ++b) {
      std::reverse(first + 4 * b * kThreads, first + 4 * (b + 1) * kThreads);
    }
    return report.empty() ? expect(std::equal(first, first + 4 * in.size(), out[0].x)) : report;
  });
}

// A launch that failed leaves nothing behind.
std::string after_failure() {
  for (int i = 0; i < 3; ++i) {
    if (sums<Bug::third, float>().empty() || sums<Bug::none, float>() != "") {
      return "wrong result";
    }
  }
  return "";
}

}  // namespace

Cases block_cases() {
  return {
      {"block_sum_float", sums<Bug::none, float>},
      {"block_sum_double", sums<Bug::none, double>},
      {"block_sum_int", sums<Bug::none, int>},
      {"copies", reversed<Bug::none>},
      {"after_failure", after_failure},
      {"missing_barrier", sums<Bug::first, float>},
      {"exit_before_barrier", sums<Bug::second, float>},
      {"divergent_barriers", sums<Bug::third, float>},
      {"late_copy_wait", reversed<Bug::first>},
      {"no_copy_wait", reversed<Bug::second>},
      {"global_out_of_bounds", reversed<Bug::third>},
  };
}

}  // namespace epsa::cuda
