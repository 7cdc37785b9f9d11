// csrc/cuda/launch.h over the emulator: it runs the kernels' own source on a CPU.
// EPSA_SIMT_MODE names the plan (test_plans.h). EPSA_SIMT_TRACE writes each plan to
// stderr. emulated_launch.h names the other variables.
#include "emulated_launch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "cuda/kernels.cuh"
#include "emulator.h"
#include "test_plans.h"

namespace epsa::cuda {
namespace {

int64_t setting(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : 0;
}

}  // namespace

Plan choose_plan(const Problem& problem, int) {
  const char* mode = std::getenv("EPSA_SIMT_MODE");
  return test_plan(problem, mode ? mode : "auto");
}

// The emulator holds any number of blocks at once.
int admit(const Problem&, Plan& plan, const Device& device) {
  return plan.cluster > 1 && device.compute_capability < 90 ? 0 : plan.blocks;
}

std::vector<Candidate> admitted_plans(const Problem& problem, const Device& device) {
  return plans(problem, device);
}

std::string describe(const Plan& plan) {
  return std::string(name_of(plan.variant)) + ", clusters of " + std::to_string(plan.cluster) +
      ", vectors of " + std::to_string(plan.vector);
}

namespace {

// What a launch does before its kernel starts, and memory as hostile as it may be.
void prepare(const Call& call) {
  const auto& [problem, plan, params, memory] = call;
  set_plan(params, problem, plan, memory);
  const Workspace w = workspace(problem, plan);
  std::memset(memory, 0xff, w.bytes);  // NaN
  // Counters of other launches, which were stopped: of the last one, and of a similar number.
  static unsigned long long last = 0;
  const unsigned long long others[] = {params.launch ^ 1, last};
  auto* counters = reinterpret_cast<unsigned long long*>(params.groups_arrived);
  for (int64_t i = 0; i < (w.partial - w.groups_arrived) / 8; ++i) {
    counters[i] = others[i % 2] << kArrivalBits | 1;
  }
  last = params.launch;
}

void run(const std::vector<Call>& calls) {
  std::vector<std::pair<emulator::LaunchOptions, std::function<void()>>> all;
  std::string plans;
  for (const Call& call : calls) {
    const auto& [problem, plan, params, memory] = call;
    std::memset(memory, 0, workspace(problem, plan).cleared);
    all.push_back(
        {{.blocks = plan.blocks,
          .threads = plan.threads,
          .cluster = plan.cluster > 1 ? plan.cluster : 0,
          .shared_bytes = plan.shared_bytes,
          .seed = static_cast<uint64_t>(setting("EPSA_SIMT_SEED")),
          .max_resident = static_cast<int>(setting("EPSA_SIMT_RESIDENT"))},
         [kernel = kernel_of(problem, plan), &given = params] { kernel(given); }});
    plans += (plans.empty() ? "" : "; ") + describe(plan);
  }
  if (std::getenv("EPSA_SIMT_TRACE")) {
    std::fprintf(stderr, "plan: %s\n", plans.c_str());
  }
  if (const std::string report = emulator::launch_together(all); !report.empty()) {
    throw std::runtime_error("emulated psa_attention (" + plans + "): " + report);
  }
}

}  // namespace

void launch_together(const std::vector<Call>& calls) {
  for (const Call& call : calls) {
    prepare(call);
  }
  run(calls);
}

void launch_twice(const Call& call, const std::function<void()>& between) {
  prepare(call);
  run({call});
  between();
  run({call});
}

void launch(const Problem& problem, const Plan& plan, Params& params, void* memory, void*) {
  launch_together({{problem, plan, params, memory}});
}

}  // namespace epsa::cuda
