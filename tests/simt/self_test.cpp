// Small kernels for the emulator itself: healthy ones, and ones with a planted
// bug. `self_test NAME` runs one case and prints "ok", or what was wrong.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <limits>
#include <map>
#include <numeric>

#include "cuda/simt.cuh"
#include "emulator.h"

namespace epsa::cuda {
namespace {

using namespace simt;
using emulator::launch;
using emulator::launch_together;
using emulator::LaunchOptions;

// Small blocks: TSan has room for few threads.
constexpr int kThreads = 64;
constexpr int kBlocks = 6;

struct alignas(16) Four {
  float x[4];
};

std::string expect(bool right) { return right ? "" : "wrong result"; }

// The first complaint over the orderly schedule and eight random ones.
template <class Run>
std::string over_schedules(LaunchOptions options, Run run) {
  for (options.seed = 0; options.seed <= 8; ++options.seed) {
    if (std::string report = run(options); !report.empty()) {
      return report;
    }
  }
  return "";
}

// One launch over all schedules, of a kernel that only reads what it is given.
template <class Kernel>
std::string launches(const LaunchOptions& options, Kernel kernel) {
  return over_schedules(options, [&](const LaunchOptions& scheduled) {
    return launch(scheduled, kernel);
  });
}

// ---- the block: shared memory, barriers, shuffles, copies ----

enum class Bug { none, first, second, third };

// out[b] = sum of the block's part of `in`. first: no barrier; second: one warp
// leaves before it; third: one warp is at a shuffle instead.
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
  const LaunchOptions options{
      .blocks = kBlocks, .threads = kThreads, .shared_bytes = 16};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<A> in(kBlocks * kThreads), out(kBlocks);
    std::iota(in.begin(), in.end(), A{1});
    const std::string report = launch(
        scheduled, [&] { block_sum<bug>(in.data(), out.data()); });
    bool right = true;
    for (int b = 0; b < kBlocks; ++b) {
      const A first = in[b * kThreads];
      const A rest = kThreads * (kThreads - 1) / 2;
      right = right && out[b] == kThreads * first + rest;
    }
    return report.empty() ? expect(right) : report;
  });
}

// Reverses the block's part, through shared memory. first: reads before the
// wait; second: never waits; third: writes one element too many.
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
  const LaunchOptions options{.blocks = kBlocks,
                              .threads = kThreads,
                              .shared_bytes = kThreads * sizeof(Four)};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<Four> in(kBlocks * kThreads), out(kBlocks * kThreads);
    float* first = in[0].x;
    std::iota(first, first + 4 * in.size(), 1.f);
    const std::string report = launch(
        scheduled, [&] { reverse<bug>(in[0].x, out[0].x); });
    for (int b = 0; b < kBlocks; ++b) {
      std::reverse(first + 4 * b * kThreads, first + 4 * (b + 1) * kThreads);
    }
    return report.empty()
               ? expect(std::equal(first, first + 4 * in.size(), out[0].x))
               : report;
  });
}

// ---- the cluster ----

constexpr int kCluster = 3;

// out[b] = sum of the ranks + 1, read from the peers' shared memory. first: no
// cluster barrier before the reads; second: none before the exit.
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
  const LaunchOptions options{.blocks = 4 * kCluster,
                              .threads = kThreads,
                              .cluster = kCluster,
                              .shared_bytes = 16,
                              .max_resident = max_resident};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<float> out(scheduled.blocks);
    const std::string report =
        launch(scheduled, [&] { cluster_sum<bug>(out.data()); });
    const auto right = [](float sum) { return sum == 6; };
    return report.empty() ? expect(std::ranges::all_of(out, right)) : report;
  });
}

// The pointer is mapped in time; the read comes after the peer's exit.
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
  const std::string report = launch({.blocks = 2,
                                     .threads = kThreads,
                                     .cluster = 2,
                                     .shared_bytes = 4 * kThreads},
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

// The last block to arrive adds up what all have written. first: the arrival
// orders nothing.
template <Bug bug>
EPSA_KERNEL(kThreads, 1)
last_block(EPSA_PARAMETER Parts args) {
  unsigned* before = reinterpret_cast<unsigned*>(shared_memory());
  const int threads = block_threads();
  args.parts[block_id() * threads + thread_id()] = 1;
  barrier();
  if (thread_id() == 0) {
    *before = bug == Bug::none
                  ? arrive(args.counter)
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
  const LaunchOptions options{.blocks = kBlocks,
                              .threads = kThreads,
                              .shared_bytes = 16,
                              .max_resident = max_resident};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    std::vector<float> parts(kBlocks * kThreads), out(kThreads);
    unsigned counter = 0;
    const std::string report = launch(scheduled, [&] {
      last_block<bug>({parts.data(), &counter, kBlocks, out.data()});
    });
    const auto all = [](float sum) { return sum == kBlocks; };
    return report.empty() ? expect(std::ranges::all_of(out, all)) : report;
  });
}

struct Chain {
  std::vector<float> values = std::vector<float>(kBlocks * kThreads);
  std::vector<unsigned> flags = std::vector<unsigned>(kBlocks);
  unsigned long long tickets = 0;
};

// Every part is its neighbour's plus one. The parts are taken by ticket, and
// wait for the one before. first: the block's number is its ticket, and the
// parts wait for the one behind, so that only all blocks together get through.
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
  const LaunchOptions options{.blocks = kBlocks,
                              .threads = kThreads,
                              .shared_bytes = 16,
                              .max_resident = max_resident};
  return over_schedules(options, [](const LaunchOptions& scheduled) {
    Chain first, second;
    const std::string report =
        launch_together({{scheduled, [&] { chain<bug>(&first); }},
                         {scheduled, [&] { chain<bug>(&second); }}});
    const float last =
        first.values[bug == Bug::none ? (kBlocks - 1) * kThreads : 0];
    return report.empty()
               ? expect(last == kBlocks && first.values == second.values)
               : report;
  });
}

// ---- the schedule ----

// Whatever the order in which launches with unlike numbers of blocks take turns,
// all their blocks run.
std::string unlike_launches() {
  for (uint64_t seed = 0; seed < 32; ++seed) {
    const LaunchOptions one{.seed = seed, .max_resident = 2};
    const LaunchOptions five{.blocks = 5};
    const LaunchOptions pairs{.blocks = 4, .cluster = 2};
    unsigned blocks[3] = {};
    const auto count = [&](int i) {
      return [counter = &blocks[i]] { arrive(counter); };
    };
    const std::string report = launch_together(
        {{one, count(0)}, {five, count(1)}, {pairs, count(2)}});
    if (!report.empty()) {
      return report;
    }
    if (blocks[0] != 1 || blocks[1] != 5 || blocks[2] != 4) {
      return expect(false);
    }
  }
  return "";
}

// The order in which blocks start, and how many run at once.
std::string schedule() {
  std::map<uint64_t, std::vector<int64_t>> orders;
  const LaunchOptions options{.blocks = 16, .max_resident = 3};
  const auto run = [&](const LaunchOptions& scheduled) {
    std::vector<int64_t> order(options.blocks);
    unsigned long long tickets = 0;
    std::atomic<int> running{0}, most{0};
    const std::string report = launch(scheduled, [&] {
      order[next_ticket(&tickets)] = block_id();
      most = std::max(most.load(), ++running);
      for (int i = 0; i < 10; ++i) {
        pause();
      }
      --running;
    });
    const bool again = orders.contains(scheduled.seed);
    const bool right =
        most == 3 && (!again || order == orders[scheduled.seed]);
    orders[scheduled.seed] = order;
    return report.empty() ? expect(right) : report;
  };
  std::string report = over_schedules(options, run);
  report = report.empty() ? over_schedules(options, run) : report;
  std::map<std::vector<int64_t>, int> different;
  for (const auto& [seed, order] : orders) {
    ++different[order];
  }
  return report.empty() ? expect(std::ranges::is_sorted(orders[0]) &&
                                 different.size() == orders.size())
                        : report;
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

// ---- 16-bit floats ----

template <class Half>
float rounded(float x) {
  Half half;
  from_float(x, half);
  return to_float(half);
}

// Both neighbours, and what lies around the middle between them. `unit` is the
// last place of the values from 1 to 2.
template <class Half>
bool rounds_to_even(float unit, float smallest, float largest) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  bool right = rounded<Half>(kInfinity) == kInfinity &&
               rounded<Half>(-kInfinity) == -kInfinity &&
               std::isnan(rounded<Half>(std::nanf(""))) &&
               std::signbit(rounded<Half>(-0.f)) &&
               rounded<Half>(largest) == largest &&
               rounded<Half>(std::nextafter(largest, kInfinity)) == largest;
  for (float low = smallest; low < largest;) {
    const float place =
        std::max(smallest, std::exp2(std::floor(std::log2(low))) * unit);
    const float high = low + place, middle = low + place / 2;
    const bool even = std::fmod(low / place, 2.f) == 0;
    right = right && rounded<Half>(low) == low &&
            rounded<Half>(-middle) == (even ? -low : -high) &&
            rounded<Half>(std::nextafter(middle, low)) == low &&
            rounded<Half>(std::nextafter(middle, high)) == high;
    low = high;
  }
  return right;
}

std::string halves() {
  return expect(rounds_to_even<f16>(0x1p-10f, 0x1p-24f, 65504.f) &&
                rounded<f16>(65519.f) == 65504.f &&
                std::isinf(rounded<f16>(65520.f)) &&
                rounded<f16>(0x1p-25f) == 0 &&
                rounds_to_even<bf16>(0x1p-7f, 0x1p-133f, 0x1.fep127f) &&
                rounded<bf16>(0x1p-134f) == 0 &&
                std::isinf(rounded<bf16>(0x1.ffp127f)));
}

// ---- smaller bugs ----

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

const LaunchOptions kBlock{.threads = kThreads, .shared_bytes = 4 * kThreads};
const LaunchOptions kPair{.blocks = 2,
                          .threads = kThreads,
                          .cluster = 2,
                          .shared_bytes = 4 * kThreads};

std::string uninitialised() {
  float seen = 0;
  const std::string report = launch(kBlock, [&] {
    if (thread_id() == 0) {
      seen = shared_floats()[5];
    }
  });
  return report.empty() ? expect(!std::isnan(seen)) : report;
}

std::string misaligned() {
  std::vector<float> data(8);
  float seen = 0;
  const std::string report = launch({}, [&] {
    seen = reinterpret_cast<const Four*>(data.data() + 1)->x[thread_id()];
  });
  return report.empty() ? expect(seen == 0) : report;
}

// ---- all cases ----

const std::map<std::string, std::string (*)()> kCases = {
    {"block_sum_float", sums<Bug::none, float>},
    {"block_sum_double", sums<Bug::none, double>},
    {"block_sum_int", sums<Bug::none, int>},
    {"copies", reversed<Bug::none>},
    {"clusters", [] { return cluster_sums<Bug::none>(0); }},
    {"clusters_two_resident", [] { return cluster_sums<Bug::none>(6); }},
    {"clusters_larger_than_the_device",
     [] { return cluster_sums<Bug::none>(2); }},
    {"last_block", [] { return last_blocks<Bug::none>(0); }},
    {"tickets", [] { return chains<Bug::none>(0); }},
    {"tickets_two_resident", [] { return chains<Bug::none>(2); }},
    {"tickets_one_resident", [] { return chains<Bug::none>(1); }},
    {"unlike_launches", unlike_launches},
    {"schedule", schedule},
    {"after_failure", after_failure},
    {"halves", halves},

    {"missing_barrier", sums<Bug::first, float>},
    {"exit_before_barrier", sums<Bug::second, float>},
    {"divergent_barriers", sums<Bug::third, float>},
    {"late_copy_wait", reversed<Bug::first>},
    {"no_copy_wait", reversed<Bug::second>},
    {"global_out_of_bounds", reversed<Bug::third>},
    {"missing_cluster_barrier", [] { return cluster_sums<Bug::first>(0); }},
    {"exit_before_peers_read", [] { return cluster_sums<Bug::second>(0); }},
    {"read_after_peers_exit", late_reads},
    {"relaxed_arrival", [] { return last_blocks<Bug::first>(0); }},
    {"relaxed_arrival_one_resident",
     [] { return last_blocks<Bug::first>(1); }},
    {"wait_for_a_later_block", [] { return chains<Bug::first>(1); }},
    {"uninitialised_shared", uninitialised},
    {"misaligned_vector", misaligned},
    {"shared_out_of_bounds",
     [] {
       return launch(kBlock, [] { shared_floats()[thread_id() + 1] = 1; });
     }},
    {"peer_out_of_bounds",
     [] {
       return launch(kPair, [] {
         cluster_arrive();
         cluster_wait();
         const float* peer = cluster_peer(shared_floats(), 1);
         shared_floats()[thread_id()] = peer[thread_id() + 1];
         cluster_arrive();
         cluster_wait();
       });
     }},
    {"peer_rank",
     [] {
       return launches(kPair, [] { cluster_peer(shared_floats(), 2); });
     }},
    {"peer_address",
     [] {
       return launches(kPair,
                       [] { cluster_peer(shared_floats() + kThreads, 1); });
     }},
    {"peer_before_cluster_barrier",
     [] {
       return launches(kPair, [] { cluster_peer(shared_floats(), 1); });
     }},
    {"peer_after_exit",
     [] {
       return launch(kPair, [] {
         cluster_arrive();
         cluster_wait();
         for (int i = 0; cluster_rank() == 0 && i < 100; ++i) {
           pause();
         }
         if (cluster_rank() == 0) {
           cluster_peer(shared_floats(), 1);
         }
       });
     }},
    {"cluster_in_plain_launch",
     [] { return launches(kBlock, [] { cluster_arrive(); }); }},
    {"cluster_wait_alone",
     [] { return launches(kPair, [] { cluster_wait(); }); }},
    {"cluster_arrive_twice",
     [] {
       return launches(kPair, [] {
         cluster_arrive();
         cluster_arrive();
       });
     }},
    {"exit_after_cluster_arrive",
     [] { return launches(kPair, [] { cluster_arrive(); }); }},
    {"exit_before_cluster_barrier",
     [] {
       return launches(kPair, [] {
         if (cluster_rank() == 0) {
           cluster_arrive();
           cluster_wait();
         }
       });
     }},
    {"shuffle_of_half_a_warp",
     [] {
       return launches({.threads = 48}, [] { shuffle_xor(1, 1); });
     }},
    {"shuffle_of_some_lanes",
     [] {
       return launches(kBlock, [] {
         if (thread_id() != 3) {
           shuffle_xor(1, 1);
         }
       });
     }},
    {"misaligned_copy",
     [] {
       alignas(16) static const float data[8] = {};
       return launches(kBlock, [] { copy_async16(shared_floats(), data + 1); });
     }},
    {"copy_out_of_shared",
     [] {
       alignas(16) static const float data[4] = {};
       return launches(
           kBlock, [] { copy_async16(shared_floats() + kThreads, data); });
     }},
    {"copy_of_a_changed_source",
     [] {
       alignas(16) static float data[4] = {};
       return launch({.shared_bytes = 16}, [] {
         copy_async16(shared_floats(), data);
         data[2] = 1;
         copy_async_wait();
       });
     }},
    {"odd_shared_bytes",
     [] { return launches({.shared_bytes = 8}, [] {}); }},
    {"wait_for_ever",
     [] {
       return launches(kBlock, [] {
         while (true) {
           pause();
         }
       });
     }},
};

}  // namespace
}  // namespace epsa::cuda

int main(int argc, char** argv) {
  bool right = true;
  for (int i = 1; i < argc; ++i) {
    const std::string report = epsa::cuda::kCases.at(argv[i])();
    std::printf("%s: %s\n", argv[i], report.empty() ? "ok" : report.c_str());
    std::fflush(stdout);
    right = right && report.empty();
  }
  return right ? 0 : 1;
}
