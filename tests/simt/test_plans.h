// Plans that cut even a small problem into many parts and use every variant, so
// that tests need no large tensors. Legal on a real device too.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan.h"

namespace epsa::cuda {

// "auto" (what plans() ranks first on an H100), "resident", "cluster2",
// "cluster4", "streaming", "chunks" (streaming, planes cut into chunks)
const std::vector<std::string>& test_modes();

// The mode's plan; streaming where the problem has no resident kernel, and
// chunks of pixels where planes are not what is cut.
Plan test_plan(const Problem& problem, const std::string& mode);

}  // namespace epsa::cuda
