#include "cases/device.h"

#ifdef EPSA_EMULATED
#include <cstdlib>
#include <cstring>

#include "test_plans.h"
#else
#include <cuda_runtime.h>

#include <stdexcept>
#endif

namespace epsa::cuda {

#ifdef EPSA_EMULATED

void* allocate(size_t bytes) {
  return std::malloc(bytes);
}
void release(void* p) {
  std::free(p);
}
void copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}

const Device& device() {
  return test_device();
}

#else

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

}  // namespace

void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return p;
}
void release(void* p) {
  cudaFree(p);
}
void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
  check(
      cudaDeviceSynchronize());  // it may return before the bytes arrive; other streams don't wait
}

const Device& device() {
  static const Device d = device_properties(0);
  return d;
}

void launch_together(const std::vector<Call>& calls) {
  std::vector<cudaStream_t> streams(calls.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    check(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    const auto& [problem, plan, params, memory] = calls[i];
    launch(problem, plan, params, memory, streams[i]);
  }
  check(cudaDeviceSynchronize());
  for (const cudaStream_t stream : streams) {
    check(cudaStreamDestroy(stream));
  }
}

void launch_twice(const Call& call, const std::function<void()>& between) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  const auto& [problem, plan, params, memory] = call;
  launch(problem, plan, params, memory, stream);
  cudaGraph_t graph;
  check(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t again;
  check(cudaGraphInstantiate(&again, graph, 0));
  check(cudaGraphLaunch(again, stream));
  check(cudaStreamSynchronize(stream));
  between();
  check(cudaGraphLaunch(again, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaGraphExecDestroy(again));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
}

#endif

}  // namespace epsa::cuda
