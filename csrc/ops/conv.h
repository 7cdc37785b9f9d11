// The rules of a PSA module's convolutions (the paper's squeeze and concat, SPC),
// the same for every backend: argument checks, sizes, layouts and result types.
// As in ops/attention.h, a rule is a template over the type of a size.
#pragma once

#include "ops/attention.h"

namespace epsa {

// The convolutions' parameters: one entry a branch, and one stride.
struct ConvSettings {
  at::IntArrayRef groups;
  int64_t stride;
  at::IntArrayRef padding, dilation;
  bool winograd = true;  // whether Winograd's method may be used
};

// The convolutions' biases [S*C], in the order of the branches, or none.
struct ConvBias {
  const std::optional<at::Tensor>& value;

  // Branch s's part [C].
  std::optional<at::Tensor> of(int64_t s, int64_t branches) const {
    return value ? std::optional(value->chunk(branches)[s]) : std::nullopt;
  }
};
inline const std::optional<at::Tensor> kNone;
inline const ConvBias kNoBias{kNone};

// Sizes and types of one checked call.
template <class Int>
struct ConvProblemOf {
  Int N{}, in_channels{}, H{}, W{};
  int64_t S{};  // branches
  Int C{};      // output channels of each
  Int out_h{}, out_w{};
  at::ScalarType dtype{};
  at::ScalarType acc{};  // accumulation type
};
using ConvProblem = ConvProblemOf<int64_t>;

// Checks one call's arguments; every error names the argument and states what
// was expected and what was given.
template <class Int = int64_t>
ConvProblemOf<Int> check_conv_arguments(
    const char* op,
    const at::Tensor& x,     // [N, in_channels, H, W]
    at::TensorList weights,  // S x [C, in_channels / groups, kh, kw]
    const ConvSettings& settings);

// Checks the biases beside arguments that were checked.
template <class Int>
void check_bias(
    const char* op, const at::Tensor& x, const ConvBias& bias, const ConvProblemOf<Int>& p);

template <class Int>
void check_conv_backward_arguments(
    const char* op,
    at::TensorList grad_feats,  // S x [N, C, out_h, out_w]
    const at::Tensor& x, const ConvProblemOf<Int>& p,
    const c10::List<bool>& output_mask);  // x, then the S weights

// The layout of the feature maps: x's, contiguous where x has both. Where x has
// neither, the one that at::conv2d would choose.
template <class Int = int64_t>
at::MemoryFormat conv_layout(const at::Tensor& x) {
  for (const at::MemoryFormat format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    if (is_native<Int>(x, format)) {
      return format;
    }
  }
  return x.suggest_memory_format();
}

// spc_conv: (S feats [N, C, out_h, out_w], pooled [N, S, C] in the accumulation
// type)
using ConvForward = std::tuple<std::vector<at::Tensor>, at::Tensor>;
// spc_conv_backward: gradients of x and of the S weights; an empty tensor [0]
// where output_mask is false.
using ConvBackward = std::tuple<at::Tensor, std::vector<at::Tensor>>;

}  // namespace epsa
