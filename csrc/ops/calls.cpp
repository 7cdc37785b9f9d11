#include "ops/calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace epsa {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

template <class Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

}  // namespace

Forward call_attention(
    at::TensorList feats, const SEWeights& se, bool reversed, const OptTensor& pooled) {
  static const auto op = find<Forward(
      at::TensorList, const Tensor&, const OptTensor&, const Tensor&, const OptTensor&, bool,
      const OptTensor&)>("epsa_fused::psa_attention");
  return op.call(feats, se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias, reversed, pooled);
}

Backward call_attention_backward(
    const GradArguments& grads, at::TensorList feats, const SEWeights& se, bool reversed,
    const c10::List<bool>& output_mask) {
  static const auto op = find<Backward(
      const OptTensor&, const OptTensor&, at::TensorList, const Tensor&, const OptTensor&,
      const Tensor&, const OptTensor&, const Tensor&, const Tensor&, bool, c10::List<bool>)>(
      "epsa_fused::psa_attention_backward");
  return op.call(
      grads.grad_out, grads.grad_attention, feats, se.fc1_weight, se.fc1_bias, se.fc2_weight,
      se.fc2_bias, grads.pooled, grads.attention, reversed, output_mask);
}

ConvForward call_conv(const Tensor& x, at::TensorList weights, const ConvSettings& k) {
  static const auto op = find<ConvForward(
      const Tensor&, at::TensorList, at::IntArrayRef, int64_t, at::IntArrayRef, at::IntArrayRef)>(
      "epsa_fused::spc_conv");
  return op.call(x, weights, k.groups, k.stride, k.padding, k.dilation);
}

ConvBackward call_conv_backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const c10::List<bool>& output_mask) {
  static const auto op = find<ConvBackward(
      at::TensorList, const Tensor&, at::TensorList, at::IntArrayRef, int64_t, at::IntArrayRef,
      at::IntArrayRef, c10::List<bool>)>("epsa_fused::spc_conv_backward");
  return op.call(grad_feats, x, weights, k.groups, k.stride, k.padding, k.dilation, output_mask);
}

Tensor call_module(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const OptTensor& packed) {
  static const auto op = find<Tensor(
      const Tensor&, at::TensorList, at::IntArrayRef, int64_t, at::IntArrayRef, at::IntArrayRef,
      const Tensor&, const OptTensor&, const Tensor&, const OptTensor&, bool, const OptTensor&)>(
      "epsa_fused::psa_forward");
  return op.call(
      x, weights, k.groups, k.stride, k.padding, k.dilation, se.fc1_weight, se.fc1_bias,
      se.fc2_weight, se.fc2_bias, reversed, packed);
}

Forward call_save_output(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed) {
  static const auto op = find<Forward(
      const Tensor&, at::TensorList, at::IntArrayRef, int64_t, at::IntArrayRef, at::IntArrayRef,
      const Tensor&, const OptTensor&, const Tensor&, const OptTensor&, bool)>(
      "epsa_fused::psa_save_output");
  return op.call(
      x, weights, k.groups, k.stride, k.padding, k.dilation, se.fc1_weight, se.fc1_bias,
      se.fc2_weight, se.fc2_bias, reversed);
}

ModuleBackward call_save_output_backward(
    const GradArguments& grads, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const Tensor& out, bool reversed, const c10::List<bool>& output_mask) {
  static const auto op = find<ModuleBackward(
      const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef, int64_t, at::IntArrayRef,
      at::IntArrayRef, const Tensor&, const OptTensor&, const Tensor&, const OptTensor&,
      const Tensor&, const Tensor&, const Tensor&, bool, c10::List<bool>)>(
      "epsa_fused::psa_save_output_backward");
  return op.call(
      *grads.grad_out, x, weights, k.groups, k.stride, k.padding, k.dilation, se.fc1_weight,
      se.fc1_bias, se.fc2_weight, se.fc2_bias, out, grads.pooled, grads.attention, reversed,
      output_mask);
}

}  // namespace epsa
