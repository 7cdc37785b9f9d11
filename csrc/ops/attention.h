// The attention step's rules, the same for every backend: argument checks,
// sizes, memory layouts and result types.
//
// Every rule is a template over the type of a size. Kernels use int64_t; shapes
// without data (csrc/ops/meta.cpp) use c10::SymInt.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "types.h"

namespace epsa {

template <class Int>
at::ArrayRef<Int> sizes_of(const at::Tensor& t);
template <>
inline at::IntArrayRef sizes_of(const at::Tensor& t) {
  return t.sizes();
}
template <>
inline c10::SymIntArrayRef sizes_of(const at::Tensor& t) {
  return t.sym_sizes();
}

template <class Int>
at::ArrayRef<Int> strides_of(const at::Tensor& t);
template <>
inline at::IntArrayRef strides_of(const at::Tensor& t) {
  return t.strides();
}
template <>
inline c10::SymIntArrayRef strides_of(const at::Tensor& t) {
  return t.sym_strides();
}

// Sizes and types of one checked call.
template <class Int>
struct ProblemOf {
  Int N{};
  int64_t S{};  // branches of [N, C, H, W]
  Int C{}, H{}, W{};
  Int hidden{};            // r, hidden units of the SE MLP
  bool shared{};           // one set of SE weights for all branches?
  at::ScalarType dtype{};  // of features and output
  at::ScalarType weight_dtype{};
  at::ScalarType acc{};  // accumulation type

  Int pixels() const { return H * W; }
  int64_t weight_sets() const { return shared ? 1 : S; }
};
using Problem = ProblemOf<int64_t>;

inline at::ScalarType accumulation_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

bool is_supported(at::ScalarType dtype);
std::string supported_dtypes();  // for messages: "Float, Double, ... or Half"

// The SE MLP's weights, as one call was given them.
struct SEWeights {
  const at::Tensor& fc1_weight;               // [r, C] or [S, r, C], also with (1, 1) behind
  const std::optional<at::Tensor>& fc1_bias;  // [r] or [S, r]
  const at::Tensor& fc2_weight;               // [C, r] or [S, C, r], also with (1, 1) behind
  const std::optional<at::Tensor>& fc2_bias;  // [C] or [S, C]
};

// What follows the attention step in inference, BatchNorm and ReLU say:
// relu(out * scale + shift). The result is rounded once.
struct Epilogue {
  std::optional<at::Tensor> scale;  // [S*C] of the accumulation type, in the output's order
  std::optional<at::Tensor> shift;  // the same; both or none
  bool relu = false;

  bool any() const { return scale || shift || relu; }
};

// Who is checked: the operator's name begins every message, and every tensor
// must be on the device of `owner`, an argument of that operator.
struct Caller {
  const char* op;
  at::Device device;
  const char* owner;
};

// What the backward pass is given beside the forward pass's arguments.
struct GradArguments {
  const std::optional<at::Tensor>& grad_out;        // [N, S*C, H, W]
  const std::optional<at::Tensor>& grad_attention;  // [N, S, C]
  const at::Tensor& pooled;                         // [N, S, C]
  const at::Tensor& attention;                      // [N, S, C]
};

// ---- checks: every error names the argument, what was expected and given ----

void check_device(const Caller& caller, const char* name, const at::Tensor& t);

// Checks the number of branches, as many as argument `name` has entries.
void check_branches(const char* op, const char* name, int64_t given);

// Checks the SE weights beside maps of p's sizes, and completes p.
template <class Int>
void check_weights(const Caller& caller, const SEWeights& se, ProblemOf<Int>& p);

// Checks the gradients and saved vectors of a backward pass.
template <class Int>
void check_grads(const Caller& caller, const GradArguments& grads, const ProblemOf<Int>& p);

// Checks an epilogue beside maps of p's sizes.
template <class Int>
void check_epilogue(const Caller& caller, const Epilogue& epilogue, const ProblemOf<Int>& p);

// Checks the arguments of psa_attention.
template <class Int = int64_t>
ProblemOf<Int> check_arguments(
    const char* op, at::TensorList feats, const SEWeights& se,
    const std::optional<at::Tensor>& pooled, const Epilogue& epilogue = {});

// Checks the arguments of psa_attention_backward.
template <class Int = int64_t>
ProblemOf<Int> check_backward_arguments(
    const char* op, at::TensorList feats, const SEWeights& se, const GradArguments& grads,
    const c10::List<bool>& output_mask);  // S + 4

// ---- layouts ----

// Can a kernel read or write t in this layout as it is? contiguous: C, H, W are
// dense, any batch stride. channels_last: C is dense, pixels are evenly spaced
// by any stride, any batch stride.
template <class Int = int64_t>
bool is_native(const at::Tensor& t, at::MemoryFormat format) {
  const auto size = sizes_of<Int>(t);
  const auto stride = strides_of<Int>(t);
  const Int &C = size[1], &H = size[2], &W = size[3];
  if (format == at::MemoryFormat::Contiguous) {
    return (W == 1 || stride[3] == 1) && (H == 1 || stride[2] == W) &&
        (C == 1 || stride[1] == H * W);
  }
  return (C == 1 || stride[1] == 1) && (H == 1 || W == 1 || stride[2] == W * stride[3]);
}

// The layout of most maps; contiguous where a map has both, and in a draw.
template <class Int = int64_t>
at::MemoryFormat common_layout(at::TensorList feats) {
  int64_t contiguous = 0, channels_last = 0;
  for (const at::Tensor& f : feats) {
    if (is_native<Int>(f, at::MemoryFormat::Contiguous)) {
      ++contiguous;
    } else if (is_native<Int>(f, at::MemoryFormat::ChannelsLast)) {
      ++channels_last;
    }
  }
  return channels_last > contiguous ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// ---- results ----

// psa_attention: (out [N, S*C, H, W], pooled [N, S, C], attention [N, S, C])
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// psa_attention_backward: gradients of feats, fc1_weight, fc1_bias, fc2_weight
// and fc2_bias; an empty tensor [0] where output_mask (S + 4 entries) is false.
using Backward =
    std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

}  // namespace epsa
