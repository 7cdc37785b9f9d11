// Plans that cut even a small problem into many parts and use every variant. Tests
// need no large tensors with them. They are legal on a real device too.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan.h"

namespace epsa::cuda {

// The device that plans are made for: an H100, or the one that EPSA_SIMT_DEVICE names.
const Device& test_device();

// "auto" (the plan that plans() ranks first on that device), "resident", "cluster2",
// "cluster4", "streaming", "chunks" (streaming, planes cut into chunks)
const std::vector<std::string>& test_modes();

// The mode's plan. Problems without a resident kernel get a streaming one. "chunks"
// is "streaming" in channels_last, which has no planes to cut.
Plan test_plan(const Problem& problem, const std::string& mode);

}  // namespace epsa::cuda
