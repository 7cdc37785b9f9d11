// Launches of the grouped convolutions' kernels. The emulator has its own (tests/simt).
#pragma once

#include <optional>
#include <stdexcept>

#include "cuda/conv_params.h"

namespace epsa::cuda {

// The best plan for the device, remembered. None if there is none.
std::optional<ConvPlan> choose_conv_plan(const ConvProblem& problem, int device);

// Packs the weights and convolves. dtype is bf16 or f16.
void convolve(const ConvPlan& plan, const ConvParams& params, Dtype dtype, void* stream);

}  // namespace epsa::cuda
