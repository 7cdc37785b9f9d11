// The operators through the dispatcher, for the layers above the kernels.
#pragma once

#include "ops/module.h"

namespace epsa {

Forward call_attention(
    at::TensorList feats, const SEWeights& se, bool reversed,
    const std::optional<at::Tensor>& pooled);
Backward call_attention_backward(
    const GradArguments& grads, at::TensorList feats, const SEWeights& se, bool reversed,
    const c10::List<bool>& output_mask);

ConvForward call_conv(const at::Tensor& x, at::TensorList weights, const ConvSettings& k);
ConvBackward call_conv_backward(
    at::TensorList grad_feats, const at::Tensor& x, at::TensorList weights, const ConvSettings& k,
    const c10::List<bool>& output_mask);

at::Tensor call_module(
    const at::Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const std::optional<at::Tensor>& packed);
Forward call_save_output(
    const at::Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed);
// grads: grad_out, and no grad_attention.
ModuleBackward call_save_output_backward(
    const GradArguments& grads, const at::Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const at::Tensor& out, bool reversed, const c10::List<bool>& output_mask);

}  // namespace epsa
