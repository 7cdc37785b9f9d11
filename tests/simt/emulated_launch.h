// The part of the emulated launch that csrc/cuda/launch.h does not have.
#pragma once

#include <functional>
#include <vector>

#include "cuda/launch.h"

namespace epsa::cuda {

// The arguments of a launch, without its stream.
struct Call {
  const Problem& problem;
  const Plan& plan;
  Params& params;
  void* memory;
};

// Several launches at once, as from several streams. EPSA_SIMT_SEED draws the order
// of blocks and threads (0: first come, first served). EPSA_SIMT_RESIDENT is the
// most blocks that run at once.
void launch_together(const std::vector<Call>& calls);

// Two launches as of one CUDA graph: with the same parameters, in the memory that the
// first one left.
void launch_twice(const Call& call, const std::function<void()>& between);

}  // namespace epsa::cuda
