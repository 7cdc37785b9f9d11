// The attention step on the CPU, also for callers that compute the maps.
#pragma once

#include "ops/attention.h"

#include <memory>

namespace epsa::cpu {

// psa_attention on checked arguments.
epsa::Forward attention_forward(
    const Problem& p, at::TensorList feats, const SEWeights& se, bool reversed,
    const std::optional<at::Tensor>& pooled, const Epilogue& epilogue);

// psa_attention_backward on checked arguments. of_output: `feats` are the
// products with the attention, as the output holds them.
epsa::Backward attention_backward(
    const Problem& p, at::TensorList feats, const SEWeights& se, const GradArguments& grads,
    bool reversed, const c10::List<bool>& output_mask, bool of_output);

// The attention step in place, sample by sample.
class AttentionStep {
 public:
  // Takes checked arguments. out [N, S*C, H, W] holds the maps in their slots, in
  // one of the two layouts. Its type is not double.
  AttentionStep(
      const Problem& p, const at::Tensor& out, const SEWeights& se, bool reversed,
      const Epilogue& epilogue);
  ~AttentionStep();

  // Reweights sample n of out in place, given its maps' means [S, C], and writes
  // its attention [S, C]. The epilogue follows in the same pass.
  void run(int64_t n, const float* pooled, float* attention, int64_t threads) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace epsa::cpu
