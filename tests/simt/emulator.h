// Runs CUDA kernels on the CPU. All their threads are fibers on one host thread.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace epsa::emulator {

struct LaunchOptions {
  int64_t blocks = 1;
  int threads = 1;           // of a block
  int cluster = 0;           // blocks of a cluster; 0: a launch without clusters
  int64_t shared_bytes = 0;  // of a block; filled with NaN before it starts
  // 0: blocks start and threads go on in order, first come, first served. Any other
  // seed draws both at random, and some blocks and threads start late.
  uint64_t seed = 0;
  // The most blocks that the device holds at once. 0: 64, or fewer if they have many
  // threads. A cluster is held as a whole; one that is larger than this runs alone.
  int max_resident = 0;
};

// Calls `kernel` in every thread. Returns when all have ended, or at the first
// mistake. The result says in one line what went wrong; "" means nothing did. A
// launch waits for an earlier one to end.
std::string launch(const LaunchOptions& options, const std::function<void()>& kernel);

// Several launches at once, as from several streams. They share the device: the first
// one's seed and max_resident hold for all.
std::string launch_together(
    const std::vector<std::pair<LaunchOptions, std::function<void()>>>& all);

}  // namespace epsa::emulator
