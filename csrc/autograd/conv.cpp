// The convolutions' autograd.
#include "autograd/common.h"
#include "ops/library.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

namespace epsa {
namespace {

// spc_conv_backward in operators of ATen, whose derivatives are known: for second
// derivatives.
ConvBackward conv_formula(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    c10::List<bool> output_mask) {
  Tensor grad_x;
  std::vector<Tensor> grad_weights;
  for (size_t s = 0; s < weights.size(); ++s) {
    const bool weight_wanted = output_mask.get(s + 1);
    const auto [gx, gw] = library_conv_backward(
        grad_feats[s], x, weights[s], k, s, output_mask.get(0), weight_wanted);
    if (gx.defined()) {
      grad_x = grad_x.defined() ? grad_x + gx : gx;
    }
    grad_weights.push_back(weight_wanted ? gw : at::empty({0}, weights[s].options()));
  }
  return {grad_x.defined() ? grad_x : at::empty({0}, x.options()), std::move(grad_weights)};
}

// ---- autograd ----

// [S*C], differentiable.
Tensor bias_grad(at::TensorList grad_feats) {
  std::vector<Tensor> sums;
  for (const Tensor& g : grad_feats) {
    sums.push_back(g.sum({0, 2, 3}));
  }
  return at::cat(sums);
}

class Convolutions : public torch::autograd::Function<Convolutions> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, at::TensorList weights, const OptTensor& bias,
      const ConvSettings& k, Tensor* pooled_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [feats, pooled] = call_conv(x, weights, k, {bias});
    *pooled_out = pooled;
    ctx->saved_data["bias"] = bias.has_value();
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    SavedSettings::save(ctx, k);
    return std::move(feats);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const at::TensorList weights = at::TensorList(saved).slice(1);
    const SavedSettings settings(ctx);
    const c10::List<bool> mask = mask_of(ctx, saved, saved.size());
    variable_list result(saved.size() + 3);  // settings and pooled have none
    // the edge behind those of the saved tensors
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(saved.size())) {
      result[saved.size()] = bias_grad(grads);
    }
    if (!any_of(mask)) {
      return result;
    }
    auto [grad_x, grad_weights] = (at::GradMode::is_enabled() ? conv_formula : call_conv_backward)(
        grads, x, weights, settings.view(), mask);
    for (size_t i = 0; i < saved.size(); ++i) {
      if (mask.get(i)) {
        result[i] = i == 0 ? grad_x : grad_weights[i - 1];
      }
    }
    return result;
  }
};

ConvForward conv_autograd(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const ConvBias& bias) {
  refuse_forward_mode(
      "spc_conv", has_tangent(x) || has_tangent(weights) || has_tangent(bias.value),
      kModuleReference);
  if (!at::GradMode::is_enabled() ||
      !(needs_grad(x) || needs_grad(weights) || needs_grad(bias.value))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_conv(x, weights, k, bias);
  }
  // pooled is not differentiable. Marking an output so would stop compiled autograd's
  // tracing, so pooled is none.
  Tensor pooled;
  variable_list feats = Convolutions::apply(x, weights, bias.value, k, &pooled);
  return {std::move(feats), pooled};
}

ConvBackward conv_backward_autograd(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    c10::List<bool> output_mask) {
  refuse_forward_mode(
      "spc_conv_backward", has_tangent(x) || has_tangent(weights) || has_tangent(grad_feats),
      kModuleReference);
  if (at::GradMode::is_enabled() &&
      (needs_grad(x) || needs_grad(weights) || needs_grad(grad_feats))) {
    const char* op = "spc_conv_backward";
    const auto p = check_conv_arguments<c10::SymInt>(op, x, weights, k);
    check_conv_backward_arguments(op, grad_feats, x, p, output_mask);
    return conv_formula(grad_feats, x, weights, k, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_conv_backward(grad_feats, x, weights, k, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, Autograd, m) {
  m.impl("spc_conv", flat<conv_autograd>());
  m.impl("spc_conv_backward", flat<conv_backward_autograd>());
  m.impl("spc_prepack", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace epsa
