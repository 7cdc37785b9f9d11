// The rules of a whole PSA module: the convolutions' and the attention step's.
#pragma once

#include "ops/conv.h"

namespace epsa {

// Sizes and types of one checked call: of the convolutions, and of the attention
// step on their maps.
template <class Int>
struct ModuleProblemOf {
  ConvProblemOf<Int> conv;
  ProblemOf<Int> attention;
};
using ModuleProblem = ModuleProblemOf<int64_t>;

// Checks the arguments of psa_forward and psa_save_output.
template <class Int = int64_t>
ModuleProblemOf<Int> check_module_arguments(
    const char* op, const at::Tensor& x, at::TensorList weights, const ConvSettings& settings,
    const SEWeights& se);

// Checks what can be told of psa_forward's packed weights without their bytes.
void check_packed(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& packed);

// Checks the arguments of psa_save_output_backward.
template <class Int = int64_t>
ModuleProblemOf<Int> check_module_backward_arguments(
    const char* op, const at::Tensor& x, at::TensorList weights, const ConvSettings& settings,
    const SEWeights& se, const GradArguments& grads,
    const at::Tensor& out,                // [N, S*C, out_h, out_w]
    const c10::List<bool>& output_mask);  // x, the S weights, the SE's four

// psa_save_output_backward: gradients of x, of the S weights and of the SE's.
using ModuleBackward =
    std::tuple<at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace epsa
