// What every backend of the operators shares: argument checks, problem sizes,
// memory layouts, result types.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>

#include <optional>
#include <tuple>
#include <vector>

#include "types.h"

namespace epsa {

// Sizes and types of one checked call.
struct Problem {
  int64_t N, S, C, H, W;  // S branches of [N, C, H, W]
  int64_t hidden;  // r, hidden units of the SE MLP
  bool shared;  // one set of SE weights for all branches?
  at::ScalarType dtype;  // of features and output
  at::ScalarType weight_dtype;
  at::ScalarType acc;  // accumulation type

  int64_t pixels() const { return H * W; }
  int64_t weight_sets() const { return shared ? 1 : S; }
};

inline at::ScalarType accumulation_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

// Checks one call's arguments; every error names the argument and states what
// was expected and what was given. `op` begins the message.
Problem check_arguments(
    const char* op,
    at::TensorList feats,  // S x [N, C, H, W]
    const at::Tensor& fc1_weight,  // [r, C] or [S, r, C], also with (1, 1) behind
    const std::optional<at::Tensor>& fc1_bias,  // [r] or [S, r]
    const at::Tensor& fc2_weight,  // [C, r] or [S, C, r], also with (1, 1) behind
    const std::optional<at::Tensor>& fc2_bias);  // [C] or [S, C]

// Checks a [N, S, C] tensor of the accumulation type.
void check_branch_vector(
    const char* op, const char* name, const at::Tensor& t, const Problem& p,
    const at::Tensor& like);

// Checks the arguments of one call of the backward operator.
Problem check_backward_arguments(
    const char* op,
    const std::optional<at::Tensor>& grad_out,  // [N, S*C, H, W]
    const std::optional<at::Tensor>& grad_attention,  // [N, S, C]
    at::TensorList feats, const at::Tensor& fc1_weight,
    const std::optional<at::Tensor>& fc1_bias, const at::Tensor& fc2_weight,
    const std::optional<at::Tensor>& fc2_bias,
    const at::Tensor& pooled,  // [N, S, C]
    const at::Tensor& attention,  // [N, S, C]
    const c10::List<bool>& output_mask);  // S + 4

// Can a kernel read or write t in this layout as it is? contiguous: C, H, W are
// dense, any batch stride. channels_last: C is dense, pixels are evenly spaced
// by any stride, any batch stride.
bool is_native(const at::Tensor& t, at::MemoryFormat format);

// The layout of most maps; contiguous where a map has both, and in a draw.
at::MemoryFormat common_layout(at::TensorList feats);

// psa_attention: (out [N, S*C, H, W], pooled [N, S, C], attention [N, S, C])
using Forward = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
// psa_attention_backward: gradients of feats, fc1_weight, fc1_bias, fc2_weight
// and fc2_bias; an empty tensor [0] where output_mask (S + 4 entries) is false.
using Backward = std::tuple<
    std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// psa_attention through the dispatcher: its output alone.
at::Tensor call_psa_attention(
    at::TensorList feats, const at::Tensor& fc1_weight,
    const std::optional<at::Tensor>& fc1_bias, const at::Tensor& fc2_weight,
    const std::optional<at::Tensor>& fc2_bias, bool reversed,
    const std::optional<at::Tensor>& pooled);

}  // namespace epsa
