// Choice of a plan and launch of its kernel (launch.h).
#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda/kernels.cuh"

namespace epsa::cuda {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // clears the error, or the next call reports it again
    throw std::runtime_error("epsa_fused: " + what + ": " + cudaGetErrorString(error));
  }
}

// The launch's settings; `attributes` must outlive it.
cudaLaunchConfig_t configuration(const Plan& plan, void* stream, cudaLaunchAttribute& cluster) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  if (plan.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  return config;
}

// Was the kernel compiled for an architecture with clusters? The driver may have compiled it from
// the PTX of an older one, whose cluster instructions are traps. False if the driver cannot tell.
bool has_clusters(const void* function) {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, function) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  return attributes.ptxVersion >= 90;
}

}  // namespace

int admit(const Problem& problem, Plan& plan, const Device& device) {
  const std::string what = "preparing the kernel of " + describe(plan);
  const auto* function = reinterpret_cast<const void*>(kernel_of(problem, plan));
  if (plan.cluster > 1 && !has_clusters(function)) {
    return 0;
  }
  check(
      cudaFuncSetAttribute(
          function, cudaFuncAttributeMaxDynamicSharedMemorySize,
          static_cast<int>(device.shared_per_block)),
      what);
  int blocks = 0;
  if (plan.cluster > 1) {
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = configuration(plan, nullptr, cluster);
    cudaError_t found = plan.cluster > 8
        ? cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)
        : cudaSuccess;
    if (found == cudaSuccess) {
      found = cudaOccupancyMaxActiveClusters(&blocks, function, &config);
    }
    // Drivers and partitioned devices refuse clusters by various errors. A broken context fails in
    // every call.
    if (found != cudaSuccess) {
      cudaGetLastError();
      cudaFuncAttributes attributes;
      check(cudaFuncGetAttributes(&attributes, function), what);
      return 0;
    }
    return blocks * plan.cluster;
  }
  check(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &blocks, function, plan.threads, static_cast<size_t>(plan.shared_bytes)),
      what);
  blocks *= device.multiprocessors;
  if (plan.variant == Variant::streaming) {
    // A block beyond those that fit starts late and finds no ticket.
    plan.blocks = std::min(plan.blocks, blocks);
  }
  return blocks;
}

std::vector<Candidate> admitted_plans(const Problem& problem, const Device& device) {
  const std::string what =
      "device " + device.name + " (sm_" + std::to_string(device.compute_capability) + ")";
  if (device.compute_capability < 80) {
    throw std::runtime_error(
        "epsa_fused: " + what + " is too old, expected compute capability 8.0 or more");
  }
  cudaFuncAttributes attributes;
  std::vector<Candidate> admitted;
  for (Candidate candidate : plans(problem, device)) {
    const cudaError_t found = cudaFuncGetAttributes(
        &attributes, reinterpret_cast<const void*>(kernel_of(problem, candidate.plan)));
    if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      throw std::runtime_error(
          "epsa_fused: this library holds no kernels for " + what +
          "; build it with TORCH_CUDA_ARCH_LIST naming that architecture");
    }
    check(found, "reading the kernels for " + what);
    candidate.resident = admit(problem, candidate.plan, device);
    if (candidate.resident > 0) {
      admitted.push_back(candidate);
    }
  }
  if (admitted.empty()) {
    throw std::runtime_error("epsa_fused: no kernel fits " + what);
  }
  rank(problem, device, admitted);
  return admitted;
}

Device device_properties(int device) {
  Device d;
  cudaDeviceProp properties;
  check(
      cudaGetDeviceProperties(&properties, device),
      "reading the properties of CUDA device " + std::to_string(device));
  d.name = properties.name;
  d.compute_capability = 10 * properties.major + properties.minor;
  d.multiprocessors = properties.multiProcessorCount;
  d.threads_per_multiprocessor = properties.maxThreadsPerMultiProcessor;
  d.blocks_per_multiprocessor = properties.maxBlocksPerMultiProcessor;
  d.shared_per_multiprocessor = static_cast<int64_t>(properties.sharedMemPerMultiprocessor);
  d.shared_per_block = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  d.l2 = properties.l2CacheSize;
  return d;
}

Plan choose_plan(const Problem& p, int device) {
  const auto key = std::tuple(
      device, p.pass, p.samples, p.branches, p.channels, p.pixels, p.hidden, p.dtype, p.layout,
      p.aligned, p.pooled_given, p.epilogue, p.grad_out_given, p.feats_wanted, p.weights_wanted);
  static std::mutex mutex;
  static std::map<decltype(key), Plan> chosen;
  const std::lock_guard lock(mutex);
  if (const auto found = chosen.find(key); found != chosen.end()) {
    return found->second;
  }
  // The runtime takes long to answer, and the answer never changes.
  static std::map<int, Device> devices;
  const auto known = devices.find(device);
  const Device& properties = known != devices.end()
      ? known->second
      : devices.emplace(device, device_properties(device)).first->second;
  const Plan plan = admitted_plans(p, properties).front().plan;
  constexpr size_t kMost = 4096;  // bounds the memory of a program with ever new shapes
  if (chosen.size() >= kMost) {
    chosen.clear();
  }
  chosen.emplace(key, plan);
  return plan;
}

std::string describe(const Plan& plan) {
  const auto text = [](int64_t x) { return std::to_string(x); };
  return std::string(name_of(plan.variant)) + ", clusters of " + text(plan.cluster) + ", " +
      text(plan.pieces) + " pieces held, " + text(plan.blocks) + " blocks of " +
      text(plan.threads) + " threads, " + text(plan.shared_bytes) +
      " bytes of shared memory, vectors of " + text(plan.vector) + ", " + text(plan.split.parts) +
      " parts";
}

void launch(const Problem& problem, const Plan& plan, Params& params, void* memory, void* stream) {
  set_plan(params, problem, plan, memory);
  const int64_t cleared = workspace(problem, plan).cleared;
  if (cleared > 0) {
    check(
        cudaMemsetAsync(memory, 0, static_cast<size_t>(cleared), static_cast<cudaStream_t>(stream)),
        "clearing the counters");
  }
  cudaLaunchAttribute cluster{};
  const cudaLaunchConfig_t config = configuration(plan, stream, cluster);
  void* arguments[] = {&params};
  check(
      cudaLaunchKernelExC(
          &config, reinterpret_cast<const void*>(kernel_of(problem, plan)), arguments),
      "launching psa_attention (" + describe(plan) + ")");
}

}  // namespace epsa::cuda
