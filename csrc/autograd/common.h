// What the operators' autograd shares: who needs a gradient, and what a Function
// saves between its passes.
#pragma once

#include "ops/calls.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <initializer_list>

namespace epsa {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kWeights = 4;  // of the SE, in every saved list

inline OptTensor optional(const Tensor& t) {
  return t.defined() ? OptTensor(t) : std::nullopt;
}

inline Tensor tensor(const OptTensor& t) {
  return t.has_value() ? *t : Tensor();
}

// The SE weights of a saved list, as long as the list lives.
struct SavedSEWeights {
  const Tensor& fc1_weight;
  OptTensor fc1_bias;
  const Tensor& fc2_weight;
  OptTensor fc2_bias;

  // Takes four tensors. A bias may be undefined.
  explicit SavedSEWeights(const Tensor* four)
      : fc1_weight(four[0]),
        fc1_bias(optional(four[1])),
        fc2_weight(four[2]),
        fc2_bias(optional(four[3])) {}

  SEWeights view() const { return {fc1_weight, fc1_bias, fc2_weight, fc2_bias}; }
};

inline bool needs_grad(const Tensor& t) {
  return t.defined() && t.requires_grad();
}
inline bool needs_grad(const OptTensor& t) {
  return t && t->requires_grad();
}
inline bool needs_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return needs_grad(t); });
}
inline bool needs_grad(const SEWeights& se) {
  return needs_grad(se.fc1_weight) || needs_grad(se.fc1_bias) || needs_grad(se.fc2_weight) ||
      needs_grad(se.fc2_bias);
}

inline bool has_tangent(const Tensor& t) {
  return torch::autograd::isFwGradDefined(t);
}
inline bool has_tangent(const OptTensor& t) {
  return t && torch::autograd::isFwGradDefined(*t);
}
inline bool has_tangent(at::TensorList tensors) {
  return torch::autograd::isFwGradDefinedTensorList(tensors);
}
inline bool has_tangent(const SEWeights& se) {
  return has_tangent(se.fc1_weight) || has_tangent(se.fc1_bias) || has_tangent(se.fc2_weight) ||
      has_tangent(se.fc2_bias);
}

inline bool has_tangent(const Epilogue& e) {
  return has_tangent(e.scale) || has_tangent(e.shift);
}

// Function rejects tangents only on inputs that require grad. Others are
// rejected here, or they would be dropped silently.
inline void refuse_forward_mode(const char* op, bool any_tangent, const char* reference) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any_tangent, op,
      ": forward-mode differentiation (jvp) is not supported, "
      "expected tensors without tangents; ",
      reference);
}

// An epilogue has no derivative.
inline void refuse_epilogue(const char* op, const Epilogue& e, bool inputs_need_grad) {
  const bool own = at::GradMode::is_enabled() && (needs_grad(e.scale) || needs_grad(e.shift));
  TORCH_CHECK_NOT_IMPLEMENTED(
      !e.any() || !(inputs_need_grad || own), op,
      ": scale, shift and relu are for inference, expected tensors that need no gradient; "
      "call it under torch.no_grad()");
}

constexpr const char* kAttentionReference = "psa_attention_reference supports it";
constexpr const char* kModuleReference = "PSAModule, the reference, supports it";

// Which of the first `count` saved inputs need a gradient. Edges count the
// tensors that were given; an absent bias has none.
inline c10::List<bool> mask_of(
    const AutogradContext* ctx, const variable_list& saved, size_t count) {
  c10::List<bool> mask;
  mask.reserve(count);
  size_t edge = 0;
  for (size_t i = 0; i < count; ++i) {
    mask.push_back(saved[i].defined() && ctx->needs_input_grad(edge++));
  }
  return mask;
}

inline bool any_of(const c10::List<bool>& mask) {
  for (size_t i = 0; i < mask.size(); ++i) {
    if (mask.get(i)) {
      return true;
    }
  }
  return false;
}

// The convolutions' settings in a Function's context.
class SavedSettings {
 public:
  static void save(AutogradContext* ctx, const ConvSettings& k) {
    ctx->saved_data["groups"] = k.groups.vec();
    ctx->saved_data["stride"] = k.stride;
    ctx->saved_data["padding"] = k.padding.vec();
    ctx->saved_data["dilation"] = k.dilation.vec();
    ctx->saved_data["winograd"] = k.winograd;
  }

  explicit SavedSettings(AutogradContext* ctx)
      : groups_(ctx->saved_data["groups"].toIntVector()),
        padding_(ctx->saved_data["padding"].toIntVector()),
        dilation_(ctx->saved_data["dilation"].toIntVector()),
        stride_(ctx->saved_data["stride"].toInt()),
        winograd_(ctx->saved_data["winograd"].toBool()) {}

  ConvSettings view() const { return {groups_, stride_, padding_, dilation_, winograd_}; }

 private:
  std::vector<int64_t> groups_, padding_, dilation_;
  int64_t stride_;
  bool winograd_;
};

}  // namespace epsa
