// Plans that cut even a small problem into many parts and use every variant. Tests
// need no large tensors with them. They are legal on a real device too.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan.h"

namespace epsa::cuda {

inline const Device kH100{"H100", 90, 132, 2048, 32, 233472, 232448, 50 << 20};

// "auto" (the plan that plans() ranks first on an H100), "resident", "cluster2",
// "cluster4", "streaming", "chunks" (streaming, planes cut into chunks)
const std::vector<std::string>& test_modes();

// The mode's plan. Problems without a resident kernel get a streaming one. "chunks"
// is "streaming" in channels_last, which has no planes to cut.
Plan test_plan(const Problem& problem, const std::string& mode);

}  // namespace epsa::cuda
