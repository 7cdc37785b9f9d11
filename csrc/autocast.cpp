// Autocast: the convolutions run in the lower type, as conv2d does. The attention
// step takes its weights as they are.
#include "ops/calls.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace epsa {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

template <c10::DeviceType device>
struct Cast {
  c10::impl::ExcludeDispatchKeyGuard guard{
      at::autocast::get_autocast_dispatch_key_from_device_type(device)};
  Tensor x;
  std::vector<Tensor> weights;
  OptTensor bias;

  Cast(const Tensor& x_, at::TensorList weights_, const ConvBias& bias_ = kNoBias) {
    const auto dtype = at::autocast::get_autocast_dtype(device);
    x = at::autocast::cached_cast(dtype, x_, device);
    weights = at::autocast::cached_cast(dtype, weights_, device);
    bias = at::autocast::cached_cast(dtype, bias_.value, device);
  }
};

template <c10::DeviceType device>
ConvForward conv(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const ConvBias& bias) {
  const Cast<device> cast(x, weights, bias);
  return call_conv(cast.x, cast.weights, k, {cast.bias});
}

template <c10::DeviceType device>
Tensor module(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const OptTensor& packed, const Epilogue& epilogue, const ConvBias& bias) {
  const Cast<device> cast(x, weights, bias);
  // Packed weights hold the originals, so a cast leaves them unused.
  const bool same = weights.empty() || cast.weights[0].is_same(weights[0]);
  return call_module(
      cast.x, cast.weights, k, se, reversed, same ? packed : std::nullopt, epilogue, {cast.bias});
}

template <c10::DeviceType device>
Forward save_output(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed) {
  const Cast<device> cast(x, weights);
  return call_save_output(cast.x, cast.weights, k, se, reversed);
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, AutocastCPU, m) {
  m.impl("spc_conv", flat<conv<at::kCPU>>());
  m.impl("psa_forward", flat<module<at::kCPU>>());
  m.impl("psa_save_output", flat<save_output<at::kCPU>>());
}

TORCH_LIBRARY_IMPL(epsa_fused, AutocastCUDA, m) {
  m.impl("spc_conv", flat<conv<at::kCUDA>>());
  m.impl("psa_forward", flat<module<at::kCUDA>>());
}

}  // namespace epsa
