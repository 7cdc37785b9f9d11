// What the autograd of the convolutions and of the whole module share.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>

namespace epsa {

// Of x, or of any of the others.
inline bool needs_grad(const at::Tensor& x, at::TensorList tensors) {
  return x.requires_grad() ||
      std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) {
           return t.defined() && t.requires_grad();
         });
}

// Without this the tangents of inputs that need no (reverse) gradient would get
// lost; of the others torch::autograd::Function itself says so.
inline void refuse_forward_mode(
    const char* op, const at::Tensor& x, at::TensorList tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::isFwGradDefined(x) &&
          !torch::autograd::isFwGradDefinedTensorList(tensors),
      op, ": forward-mode differentiation (jvp) is not supported, expected "
      "tensors without tangents; PSAModule, the reference, supports it");
}

}  // namespace epsa
