// The attention step on the CPU, for who has its maps and their means at hand.
#pragma once

#include "../psa.h"

#include <memory>

namespace epsa::cpu {

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

  // Reweights sample n of out in place, given its maps' means [S, C].
  void run(int64_t n, const float* pooled, int64_t threads) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace epsa::cpu
