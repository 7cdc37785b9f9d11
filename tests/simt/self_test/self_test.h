// What the emulator's own tests share. A case returns "", or what was wrong.
#pragma once

#include <map>
#include <string>

#include "cuda/simt.cuh"
#include "emulator.h"

namespace epsa::cuda {

using namespace simt;
using emulator::launch;
using emulator::launch_together;
using emulator::LaunchOptions;

using Cases = std::map<std::string, std::string (*)()>;
Cases block_cases();
Cases grid_cases();
Cases schedule_cases();
Cases misuse_cases();

// The bug that a kernel has planted; each kernel lists its own.
enum class Bug { none, first, second, third };

// Small blocks: TSan has room for few threads.
constexpr int kThreads = 64;
constexpr int kBlocks = 6;

struct alignas(16) Four {
  float x[4];
};

inline std::string expect(bool right) {
  return right ? "" : "wrong result";
}

// The first complaint, over the orderly schedule and eight random ones.
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
  return over_schedules(
      options, [&](const LaunchOptions& scheduled) { return launch(scheduled, kernel); });
}

}  // namespace epsa::cuda
