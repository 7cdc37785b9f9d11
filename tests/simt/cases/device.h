// Where the cases run: on the emulator, in host memory, or on a GPU.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

#ifdef EPSA_EMULATED
#include "emulated_launch.h"
#else
#include "cuda/launch.h"
#endif

namespace epsa::cuda {

void* allocate(size_t bytes);
void release(void* p);
void copy(void* to, const void* from, size_t bytes);  // in any direction
const Device& device();

#ifndef EPSA_EMULATED
struct Call {
  const Problem& problem;
  const Plan& plan;
  Params& params;
  void* memory;
};

// Several launches at once, each on a stream of its own.
void launch_together(const std::vector<Call>& calls);

// A CUDA graph of one launch, launched twice.
void launch_twice(const Call& call, const std::function<void()>& between);
#endif

}  // namespace epsa::cuda
