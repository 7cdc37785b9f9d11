// The convolutions of a PSA module (the paper's squeeze and concat, SPC): what
// the operators' autograd and their backends share.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include <tuple>
#include <vector>

namespace epsa {

// The convolutions' parameters, one entry a branch but for the stride.
struct SpcSettings {
  at::IntArrayRef groups;
  int64_t stride;
  at::IntArrayRef padding, dilation;
};

// Sizes and types of one checked call.
struct SpcProblem {
  int64_t N, in_channels, H, W;
  int64_t S, C;  // branches, and output channels of each
  int64_t out_h, out_w;
  at::ScalarType dtype;
  at::ScalarType acc;  // accumulation type
};

// Checks one call's arguments; every error names the argument and states what
// was expected and what was given.
SpcProblem check_spc_arguments(
    const char* op,
    const at::Tensor& x,  // [N, in_channels, H, W]
    at::TensorList weights,  // S x [C, in_channels / groups, kh, kw]
    const SpcSettings& settings);

void check_spc_backward_arguments(
    const char* op,
    at::TensorList grad_feats,  // S x [N, C, out_h, out_w]
    const at::Tensor& x, const SpcProblem& p,
    const c10::List<bool>& output_mask);  // x, then the S weights

// Of both checks what holds of the lists alone: before indexing them where sizes
// are symbols, of which the rest cannot be asked.
void check_spc_counts(const char* op, int64_t S, const SpcSettings& settings);
void check_spc_backward_counts(
    const char* op, int64_t S, at::TensorList grad_feats,
    const c10::List<bool>& output_mask);

// Of a whole module's output [N, S * C, out_h, out_w], and of the mask: x, the S
// weights, and the SE's four.
void check_module_backward_arguments(
    const char* op, const at::Tensor& out, const SpcProblem& p,
    const c10::List<bool>& output_mask);

// The layout of the feature maps: that of x, contiguous where it has both, or
// where it has neither that which at::conv2d would choose.
at::MemoryFormat spc_layout(const at::Tensor& x);

// spc_conv: (S feats [N, C, out_h, out_w], pooled [N, S, C] in the accumulation
// type)
using SpcForward = std::tuple<std::vector<at::Tensor>, at::Tensor>;
// spc_conv_backward: gradients of x and of the S weights; an empty tensor [0]
// where output_mask is false.
using SpcBackward = std::tuple<at::Tensor, std::vector<at::Tensor>>;

// psa_save_output_backward: the same, and gradients of the SE's weights.
using ModuleBackward = std::tuple<
    at::Tensor, std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor,
    at::Tensor>;

}  // namespace epsa
