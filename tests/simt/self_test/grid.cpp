// Several blocks: clusters, arrivals, flags, tickets.
#include <algorithm>
#include <atomic>
#include <set>
#include <vector>

#include "cuda/launch_number.h"
#include "self_test/self_test.h"

namespace epsa::cuda {
namespace {

constexpr int kCluster = 3;

// out[b] = sum of the ranks + 1, read from the peers' shared memory. The bugs: no
// cluster barrier before the reads (first), none before the exit (second).
template <Bug bug>
EPSA_KERNEL(kThreads, 1)
cluster_sum(float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  cluster_arrive();
  cluster_wait();
  if (thread_id() == 0) {
    shared[1] = static_cast<float>(cluster_rank() + 1);
  }
  if (bug != Bug::first) {
    cluster_arrive();
    barrier();
    cluster_wait();
  }
  if (thread_id() == block_threads() - 1) {
    float sum = 0;
    for (int rank = 0; rank < kCluster; ++rank) {
      sum += cluster_peer(shared, rank)[1];
    }
    out[block_id()] = sum;
  }
  if (bug != Bug::second) {
    cluster_arrive();
    cluster_wait();
  }
}

template <Bug bug>
std::string cluster_sums(int max_resident) {
  const LaunchOptions options{
      .blocks = 4 * kCluster,
      .threads = kThreads,
      .cluster = kCluster,
      .shared_bytes = 16,
      .max_resident = max_resident};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<float> out(scheduled.blocks);
    const std::string report = launch(scheduled, [&] { cluster_sum<bug>(out.data()); });
    const auto right = [](float sum) { return sum == 6; };
    return report.empty() ? expect(std::ranges::all_of(out, right)) : report;
  });
}

// Maps the peer's address in time, but reads it after the peer's exit.
EPSA_KERNEL(kThreads, 1)
late_read(unsigned* counter, float* out) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[thread_id()] = 1;
  cluster_arrive();
  cluster_wait();
  if (cluster_rank() == 0) {
    const float* peer = cluster_peer(shared, 1);
    while (arrive(counter) < 5 * kThreads * kThreads) {
    }
    out[thread_id()] = peer[thread_id()];
  }
}

std::string late_reads() {
  unsigned counter = 0;
  std::vector<float> out(kThreads);
  const std::string report = launch(
      {.blocks = 2, .threads = kThreads, .cluster = 2, .shared_bytes = 4 * kThreads},
      [&] { late_read(&counter, out.data()); });
  const auto one = [](float x) { return x == 1; };
  return report.empty() ? expect(std::ranges::all_of(out, one)) : report;
}

// ---- the whole device ----

struct Parts {
  float* parts;
  unsigned* counter;
  int64_t blocks;
  float* out;
};

// The last block to arrive adds up what all blocks have written. The bug: the
// arrival orders nothing.
template <Bug bug>
EPSA_KERNEL(kThreads, 1)
last_block(EPSA_PARAMETER Parts args) {
  unsigned* before = reinterpret_cast<unsigned*>(shared_memory());
  const int threads = block_threads();
  args.parts[block_id() * threads + thread_id()] = 1;
  barrier();
  if (thread_id() == 0) {
    *before = bug == Bug::none ? arrive(args.counter)
                               : __atomic_fetch_add(args.counter, 1u, __ATOMIC_RELAXED);
  }
  barrier();
  if (*before == args.blocks - 1) {
    float sum = 0;
    for (int64_t b = 0; b < args.blocks; ++b) {
      sum += args.parts[b * threads + thread_id()];
    }
    args.out[thread_id()] = sum;
  }
}

template <Bug bug>
std::string last_blocks(int max_resident) {
  const LaunchOptions options{
      .blocks = kBlocks, .threads = kThreads, .shared_bytes = 16, .max_resident = max_resident};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<float> parts(kBlocks * kThreads), out(kThreads);
    unsigned counter = 0;
    const std::string report =
        launch(scheduled, [&] { last_block<bug>({parts.data(), &counter, kBlocks, out.data()}); });
    const auto all = [](float sum) { return sum == kBlocks; };
    return report.empty() ? expect(std::ranges::all_of(out, all)) : report;
  });
}

// Each block makes a counter of anything one of launch 5, unless another has, and arrives. The
// bug: a store that does not look at what the counter holds by then.
template <Bug bug>
EPSA_KERNEL(kThreads, 1)
begun_counter(unsigned long long* counter, int64_t blocks, std::atomic<int>* lasts) {
  if (thread_id() == 0) {
    const unsigned long long before = peek(counter);
    if (before >> 8 != 5) {
      if (bug == Bug::none) {
        replace(counter, before, 5 << 8);
      } else {
        *counter = 5 << 8;
      }
    }
    *lasts += static_cast<int64_t>(arrive(counter) % 256) == blocks - 1;
  }
}

template <Bug bug>
std::string begun_counters() {
  const LaunchOptions options{.blocks = kBlocks, .threads = kThreads};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    unsigned long long counter = ~0ull;
    std::atomic<int> lasts{0};
    const std::string report =
        launch(scheduled, [&] { begun_counter<bug>(&counter, kBlocks, &lasts); });
    return report.empty() ? expect(lasts == 1) : report;
  });
}

// Numbers of launches: each its own, in range, and far from the one before.
std::string launch_numbers() {
  constexpr int kNumbers = 100'000;
  std::set<unsigned long long> numbers;
  unsigned long long before = new_launch_number();
  for (int i = 0; i < kNumbers; ++i) {
    const unsigned long long number = new_launch_number();
    const unsigned long long distance = number > before ? number - before : before - number;
    if (number == 0 || number >> (64 - kArrivalBits) != 0 || distance >> 32 == 0) {
      return "wrong result";
    }
    numbers.insert(number);
    before = number;
  }
  return expect(numbers.size() == kNumbers);
}

struct Chain {
  std::vector<float> values = std::vector<float>(kBlocks * kThreads);
  std::vector<unsigned> flags = std::vector<unsigned>(kBlocks);
  unsigned long long tickets = 0;
};

// Every part is its neighbour's plus one. Parts are taken by ticket and wait for
// the part before. The bug: the block's number is its ticket, and a part waits for
// the one behind, so that only all blocks together get through.
template <Bug bug>
EPSA_KERNEL(kThreads, 1)
chain(Chain* all) {
  auto* ticket = reinterpret_cast<unsigned long long*>(shared_memory());
  for (bool once = true; bug == Bug::none || once; once = false) {
    if (thread_id() == 0) {
      *ticket = bug == Bug::none ? next_ticket(&all->tickets) : block_id();
    }
    barrier();
    const auto part = static_cast<int64_t>(*ticket);
    if (part >= kBlocks) {
      return;
    }
    const int64_t before = bug == Bug::none ? part - 1 : part + 1;
    const bool waits = before >= 0 && before < kBlocks;
    if (waits && thread_id() == 0) {
      while (!is_published(&all->flags[before])) {
        pause();
      }
    }
    barrier();
    all->values[part * kThreads + thread_id()] =
        1 + (waits ? all->values[before * kThreads + thread_id()] : 0);
    barrier();
    if (thread_id() == 0) {
      publish(&all->flags[part]);
    }
  }
}

template <Bug bug>
std::string chains(int max_resident) {
  const LaunchOptions options{
      .blocks = kBlocks, .threads = kThreads, .shared_bytes = 16, .max_resident = max_resident};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    Chain first, second;
    const std::string report = launch_together(
        {{scheduled, [&] { chain<bug>(&first); }}, {scheduled, [&] { chain<bug>(&second); }}});
    const float last = first.values[bug == Bug::none ? (kBlocks - 1) * kThreads : 0];
    return report.empty() ? expect(last == kBlocks && first.values == second.values) : report;
  });
}

}  // namespace

Cases grid_cases() {
  return {
      {"clusters", [] { return cluster_sums<Bug::none>(0); }},
      {"clusters_two_resident", [] { return cluster_sums<Bug::none>(6); }},
      {"clusters_larger_than_the_device", [] { return cluster_sums<Bug::none>(2); }},
      {"last_block", [] { return last_blocks<Bug::none>(0); }},
      {"begun_counter", [] { return begun_counters<Bug::none>(); }},
      {"launch_numbers", launch_numbers},
      {"tickets", [] { return chains<Bug::none>(0); }},
      {"tickets_two_resident", [] { return chains<Bug::none>(2); }},
      {"tickets_one_resident", [] { return chains<Bug::none>(1); }},
      {"missing_cluster_barrier", [] { return cluster_sums<Bug::first>(0); }},
      {"exit_before_peers_read", [] { return cluster_sums<Bug::second>(0); }},
      {"read_after_peers_exit", late_reads},
      {"relaxed_arrival", [] { return last_blocks<Bug::first>(0); }},
      {"relaxed_arrival_one_resident", [] { return last_blocks<Bug::first>(1); }},
      {"counter_overwritten", [] { return begun_counters<Bug::first>(); }},
      {"wait_for_a_later_block", [] { return chains<Bug::first>(1); }},
  };
}

}  // namespace epsa::cuda
