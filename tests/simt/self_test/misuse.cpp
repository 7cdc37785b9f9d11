// Kernels of a few lines, each with one mistake.
#include <cmath>
#include <vector>

#include "self_test/self_test.h"

namespace epsa::cuda {
namespace {

float* shared_floats() {
  return reinterpret_cast<float*>(shared_memory());
}

const LaunchOptions kBlock{.threads = kThreads, .shared_bytes = 4 * kThreads};
const LaunchOptions kPair{
    .blocks = 2, .threads = kThreads, .cluster = 2, .shared_bytes = 4 * kThreads};

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
  const std::string report =
      launch({}, [&] { seen = reinterpret_cast<const Four*>(data.data() + 1)->x[thread_id()]; });
  return report.empty() ? expect(seen == 0) : report;
}

Cases memory_cases() {
  return {
      {"uninitialised_shared", uninitialised},
      {"misaligned_vector", misaligned},
      {"shared_out_of_bounds",
       [] { return launch(kBlock, [] { shared_floats()[thread_id() + 1] = 1; }); }},
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
  };
}

Cases peer_cases() {
  return {
      {"peer_rank", [] { return launches(kPair, [] { cluster_peer(shared_floats(), 2); }); }},
      {"peer_address",
       [] { return launches(kPair, [] { cluster_peer(shared_floats() + kThreads, 1); }); }},
      {"peer_before_cluster_barrier",
       [] { return launches(kPair, [] { cluster_peer(shared_floats(), 1); }); }},
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
  };
}

Cases cluster_cases() {
  return {
      {"cluster_in_plain_launch", [] { return launches(kBlock, [] { cluster_arrive(); }); }},
      {"cluster_wait_alone", [] { return launches(kPair, [] { cluster_wait(); }); }},
      {"cluster_arrive_twice",
       [] {
         return launches(kPair, [] {
           cluster_arrive();
           cluster_arrive();
         });
       }},
      {"exit_after_cluster_arrive", [] { return launches(kPair, [] { cluster_arrive(); }); }},
      {"exit_before_cluster_barrier",
       [] {
         return launches(kPair, [] {
           if (cluster_rank() == 0) {
             cluster_arrive();
             cluster_wait();
           }
         });
       }},
  };
}

Cases shuffle_cases() {
  return {
      {"shuffle_of_half_a_warp",
       [] { return launches({.threads = 48}, [] { shuffle_xor(1, 1); }); }},
      {"shuffle_of_some_lanes",
       [] {
         return launches(kBlock, [] {
           if (thread_id() != 3) {
             shuffle_xor(1, 1);
           }
         });
       }},
  };
}

Cases copy_cases() {
  return {
      {"misaligned_copy",
       [] {
         alignas(16) static const float data[8] = {};
         return launches(kBlock, [] { copy_async16(shared_floats(), data + 1); });
       }},
      {"misaligned_store",
       [] {
         alignas(16) static float data[8] = {};
         return launches(kBlock, [] { store_evict_first(data + 1, Four{}); });
       }},
      {"copy_out_of_shared",
       [] {
         alignas(16) static const float data[4] = {};
         return launches(kBlock, [] { copy_async16(shared_floats() + kThreads, data); });
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
  };
}

Cases launch_cases() {
  return {
      {"odd_shared_bytes", [] { return launches({.shared_bytes = 8}, [] {}); }},
      {"wait_for_ever",
       [] {
         return launches(kBlock, [] {
           while (true) {
             pause();
           }
         });
       }},
  };
}

}  // namespace

Cases misuse_cases() {
  Cases all;
  for (const auto& cases :
       {memory_cases, peer_cases, cluster_cases, shuffle_cases, copy_cases, launch_cases}) {
    all.merge(cases());
  }
  return all;
}

}  // namespace epsa::cuda
