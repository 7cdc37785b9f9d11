// csrc/cuda/conv_launch.h over the emulator. EPSA_SIMT_SEED draws the order of blocks and
// threads. EPSA_SIMT_TRACE writes each plan to stderr.
#include "cuda/conv_launch.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>

#include "cuda/conv.cuh"
#include "emulator.h"

namespace epsa::cuda {
namespace {

void run(const std::function<void()>& kernel, int64_t blocks, int threads, int64_t shared) {
  const char* seed = std::getenv("EPSA_SIMT_SEED");
  const std::string report = emulator::launch(
      {.blocks = blocks,
       .threads = threads,
       .shared_bytes = shared,
       .seed = static_cast<uint64_t>(seed ? std::atoll(seed) : 0)},
      kernel);
  if (!report.empty()) {
    throw std::runtime_error("emulated convolutions: " + report);
  }
}

template <class T>
void launch(const ConvPlan& plan, const ConvParams& p) {
  const int64_t threads = p.entries * kWarp;
  run([&] { pack_weights<T>(p); }, (threads + kConvThreads - 1) / kConvThreads, kConvThreads, 0);
  const auto kernel = plan.large() ? convolve_tile<T, true> : convolve_tile<T, false>;
  run([&] { kernel(p); }, plan.blocks, plan.threads, plan.shared_bytes);
}

}  // namespace

// An H100's, or with EPSA_SIMT_MULTIPROCESSORS of another size.
std::optional<ConvPlan> choose_conv_plan(const ConvProblem& problem, int) {
  const char* count = std::getenv("EPSA_SIMT_MULTIPROCESSORS");
  const std::vector<ConvPlan> plans =
      conv_plans(problem, {count ? std::atoi(count) : 132, 227 << 10, 228 << 10});
  if (plans.empty()) {
    return std::nullopt;
  }
  const ConvPlan& plan = plans.front();
  if (std::getenv("EPSA_SIMT_TRACE")) {
    std::fprintf(
        stderr, "plan: tiles of %d x %d x %d, slabs of %d, %d threads, %d blocks, large %d\n",
        plan.images, plan.tile_h, plan.tile_w, plan.slab, plan.threads,
        static_cast<int>(plan.blocks), plan.large());
  }
  return plan;
}

void convolve(const ConvPlan& plan, const ConvParams& params, Dtype dtype, void*) {
  dtype == Dtype::bf16 ? launch<simt::bf16>(plan, params) : launch<simt::f16>(plan, params);
}

}  // namespace epsa::cuda
