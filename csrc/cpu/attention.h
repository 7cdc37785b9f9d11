// The attention step on the CPU, for who computes its maps.
#pragma once

#include "ops/attention.h"

#include <memory>

namespace epsa::cpu {

// psa_attention and psa_attention_backward, under another operator's name.
// of_output: `feats` are the products with the attention, as the output holds them.
epsa::Forward attention_forward(
    const char* op, at::TensorList feats, const at::Tensor& fc1_weight,
    const std::optional<at::Tensor>& fc1_bias, const at::Tensor& fc2_weight,
    const std::optional<at::Tensor>& fc2_bias, bool reversed,
    const std::optional<at::Tensor>& pooled);
epsa::Backward attention_backward(
    const char* op, const std::optional<at::Tensor>& grad_out,
    const std::optional<at::Tensor>& grad_attention, at::TensorList feats,
    const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
    const at::Tensor& fc2_weight, const std::optional<at::Tensor>& fc2_bias,
    const at::Tensor& pooled, const at::Tensor& attention, bool reversed,
    const c10::List<bool>& output_mask, bool of_output);

// Sample by sample, in place.
class AttentionStep {
 public:
  // Checks the arguments as psa_attention does. out [N, S*C, H, W] holds the maps
  // in their slots, in one of the two layouts. Its type is not double.
  AttentionStep(
      const char* op, const at::Tensor& out, int64_t branches,
      const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
      const at::Tensor& fc2_weight, const std::optional<at::Tensor>& fc2_bias,
      bool reversed);
  ~AttentionStep();

  // Reweights sample n of out in place, given its maps' means [S, C], and writes
  // its attention [S, C].
  void run(
      int64_t n, const float* pooled, float* attention, int64_t threads) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace epsa::cpu
