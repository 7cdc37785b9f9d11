// csrc/cuda/psa_launch.h over the emulator: the kernels' own source, launched on
// a CPU. EPSA_SIMT_MODE names the plan (test_plans.h), EPSA_SIMT_SEED the order
// of blocks and threads (0: first come, first served), EPSA_SIMT_RESIDENT the
// most blocks that run at once.
#include "../../csrc/cuda/psa_launch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../../csrc/cuda/psa_kernels.cuh"
#include "emulator.h"
#include "test_plans.h"

namespace epsa::cuda {
namespace {

int64_t setting(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : otherwise;
}

}  // namespace

Plan choose_plan(const Problem& problem, int) {
  const char* mode = std::getenv("EPSA_SIMT_MODE");
  return test_plan(problem, mode ? mode : "auto");
}

std::string describe(const Plan& plan) {
  return plan.variant == Variant::resident ? "resident" : "streaming";
}

void launch(
    const Problem& problem, const Plan& plan, Params& params, void* memory,
    void*) {
  set_plan(params, problem, plan, memory);
  const Workspace w = workspace(problem, plan);
  std::memset(memory, 0xff, w.bytes);  // NaN
  std::memset(memory, 0, w.cleared);
  const Kernel kernel = kernel_of(problem, plan);
  const std::string report = emulator::launch(
      {.blocks = plan.blocks,
       .threads = plan.threads,
       .cluster = plan.cluster > 1 ? plan.cluster : 0,
       .shared_bytes = plan.shared_bytes,
       .seed = static_cast<uint64_t>(setting("EPSA_SIMT_SEED", 0)),
       .max_resident = static_cast<int>(setting("EPSA_SIMT_RESIDENT", 0))},
      [&] { kernel(params); });
  if (!report.empty()) {
    throw std::runtime_error(
        "emulated psa_attention (" + describe(plan) + "): " + report);
  }
}

}  // namespace epsa::cuda
