// The operators through the dispatcher, for the layers above the kernels. Their arguments
// are the schemas' (ops/schemas.cpp), in groups.
#pragma once

#include "ops/groups.h"

namespace epsa {

Forward call_attention(
    at::TensorList feats, const SEWeights& se, bool reversed,
    const std::optional<at::Tensor>& pooled, const Epilogue& epilogue);
Backward call_attention_backward(
    const std::optional<at::Tensor>& grad_out, const std::optional<at::Tensor>& grad_attention,
    at::TensorList feats, const SEWeights& se, const at::Tensor& pooled,
    const at::Tensor& attention, bool reversed, c10::List<bool> output_mask);

ConvForward call_conv(
    const at::Tensor& x, at::TensorList weights, const ConvSettings& k, const ConvBias& bias);
ConvBackward call_conv_backward(
    at::TensorList grad_feats, const at::Tensor& x, at::TensorList weights, const ConvSettings& k,
    c10::List<bool> output_mask);

at::Tensor call_module(
    const at::Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const std::optional<at::Tensor>& packed, const Epilogue& epilogue,
    const ConvBias& bias);
Forward call_save_output(
    const at::Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed);
ModuleBackward call_save_output_backward(
    const at::Tensor& grad_out, const at::Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const at::Tensor& out, const at::Tensor& pooled,
    const at::Tensor& attention, bool reversed, c10::List<bool> output_mask);

}  // namespace epsa
