// Autocast: the convolutions run in the lower type, as conv2d does. The attention
// step takes its weights as they are.
#include "ops/calls.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace epsa {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

struct Cast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKey::AutocastCPU};
  Tensor x;
  std::vector<Tensor> weights;

  Cast(const Tensor& x_, at::TensorList weights_) {
    const auto dtype = at::autocast::get_autocast_dtype(at::kCPU);
    x = at::autocast::cached_cast(dtype, x_, at::kCPU);
    weights = at::autocast::cached_cast(dtype, weights_, at::kCPU);
  }
};

ConvForward conv(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups, int64_t stride,
    at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Cast cast(x, weights);
  return call_conv(cast.x, cast.weights, {groups, stride, padding, dilation});
}

Tensor module(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups, int64_t stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, const Tensor& fc1_weight,
    const OptTensor& fc1_bias, const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
    const OptTensor& packed) {
  const Cast cast(x, weights);
  // Packed weights hold the originals, so a cast leaves them unused.
  const bool same = weights.empty() || cast.weights[0].is_same(weights[0]);
  return call_module(
      cast.x, cast.weights, {groups, stride, padding, dilation},
      {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, reversed, same ? packed : std::nullopt);
}

Forward save_output(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups, int64_t stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, const Tensor& fc1_weight,
    const OptTensor& fc1_bias, const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed) {
  const Cast cast(x, weights);
  return call_save_output(
      cast.x, cast.weights, {groups, stride, padding, dilation},
      {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, reversed);
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, AutocastCPU, m) {
  m.impl("spc_conv", conv);
  m.impl("psa_forward", module);
  m.impl("psa_save_output", save_output);
}

}  // namespace epsa
