// Launches of the grouped convolutions' kernels (conv_launch.h).
#include "cuda/conv_launch.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "cuda/conv.cuh"

namespace epsa::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, or the next call reports it again
    throw std::runtime_error(std::string("epsa_fused: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Nothing where the device is too old for the kernels.
std::optional<ConvDevice> conv_device(int device) {
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "reading the properties of the device");
    return value;
  };
  if (attribute(cudaDevAttrComputeCapabilityMajor) < 8) {
    return std::nullopt;
  }
  return ConvDevice{
      attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

using Kernel = void (*)(ConvParams);

template <class T>
void launch(const ConvPlan& plan, ConvParams params, cudaStream_t stream) {
  void* arguments[] = {&params};
  const auto run = [&](Kernel kernel, int64_t blocks, int threads, int64_t shared) {
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (shared > 0) {
      // All plans share the kernel, also those of other threads: each sets the same limit.
      check(
          cudaFuncSetAttribute(
              function, cudaFuncAttributeMaxDynamicSharedMemorySize,
              static_cast<int>(plan.shared_limit)),
          "preparing the convolutions");
    }
    check(
        cudaLaunchKernel(
            function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
            arguments, static_cast<size_t>(shared), stream),
        "launching the convolutions");
  };
  const int64_t packing = params.entries * kWarp;
  run(pack_weights<T>, (packing + kConvThreads - 1) / kConvThreads, kConvThreads, 0);
  run(plan.large() ? convolve_tile<T, true> : convolve_tile<T, false>, plan.blocks, plan.threads,
      plan.shared_bytes);
}

}  // namespace

std::optional<ConvPlan> choose_conv_plan(const ConvProblem& p, int device) {
  std::vector<int> key{device, p.samples, p.height, p.width, p.channels, p.outputs};
  for (const ConvShape& shape : p.branches) {
    key.insert(key.end(), {shape.kernel, shape.inputs, shape.outputs});
  }
  static std::mutex mutex;
  static std::map<std::vector<int>, std::optional<ConvPlan>> chosen;
  const std::lock_guard lock(mutex);
  const auto found = chosen.find(key);
  if (found != chosen.end()) {
    return found->second;
  }
  constexpr size_t kMost = 4096;  // bounds the memory of a program with ever new shapes
  if (chosen.size() >= kMost) {
    chosen.clear();
  }
  const std::optional<ConvDevice> properties = conv_device(device);
  const auto plans = properties ? conv_plans(p, *properties) : std::vector<ConvPlan>();
  const auto first = plans.empty() ? std::nullopt : std::optional(plans.front());
  return chosen.emplace(key, first).first->second;
}

void convolve(const ConvPlan& plan, const ConvParams& params, Dtype dtype, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (dtype == Dtype::bf16) {
    launch<simt::bf16>(plan, params, on);
  } else if (dtype == Dtype::f16) {
    launch<simt::f16>(plan, params, on);
  } else {
    throw std::invalid_argument("epsa_fused: the convolutions expect 16-bit elements");
  }
}

}  // namespace epsa::cuda
