// The convolutions' schemas, autograd and autocast (library _ops).
#include "ops/attention.h"
#include "ops/conv.h"
#include "autograd/common.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

namespace epsa {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- the operators, through the dispatcher ----

SpcForward call_forward(
    const Tensor& x, at::TensorList weights, const SpcSettings& k) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::spc_conv", "")
          .typed<SpcForward(
              const Tensor&, at::TensorList, at::IntArrayRef, int64_t,
              at::IntArrayRef, at::IntArrayRef)>();
  return op.call(x, weights, k.groups, k.stride, k.padding, k.dilation);
}

SpcBackward call_backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights,
    const SpcSettings& k, const c10::List<bool>& output_mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::spc_conv_backward", "")
          .typed<SpcBackward(
              at::TensorList, const Tensor&, at::TensorList, at::IntArrayRef,
              int64_t, at::IntArrayRef, at::IntArrayRef, c10::List<bool>)>();
  return op.call(
      grad_feats, x, weights, k.groups, k.stride, k.padding, k.dilation,
      output_mask);
}

// The same in operators of ATen, whose own derivatives are known: where the
// gradients are to be differentiated again.
SpcBackward formula(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights,
    const SpcSettings& k, const c10::List<bool>& output_mask) {
  Tensor grad_x;
  std::vector<Tensor> grad_weights;
  for (size_t s = 0; s < weights.size(); ++s) {
    const bool weight_wanted = output_mask.get(s + 1);
    auto [gx, gw, gb] = at::convolution_backward(
        grad_feats[s], x, weights[s], c10::nullopt, {k.stride, k.stride},
        {k.padding[s], k.padding[s]}, {k.dilation[s], k.dilation[s]},
        /*transposed=*/false, /*output_padding=*/{0, 0}, k.groups[s],
        {output_mask.get(0), weight_wanted, false});
    if (gx.defined()) {
      grad_x = grad_x.defined() ? grad_x + gx : gx;
    }
    grad_weights.push_back(
        weight_wanted ? gw : at::empty({0}, weights[s].options()));
  }
  return {
      grad_x.defined() ? grad_x : at::empty({0}, x.options()),
      std::move(grad_weights)};
}

bool has_symbols(const Tensor& x, at::TensorList tensors) {
  const auto symbolic = [](const Tensor& t) {
    return t.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
  };
  return symbolic(x) || std::any_of(tensors.begin(), tensors.end(), symbolic);
}

// ---- autograd ----

class SpcConv : public torch::autograd::Function<SpcConv> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, at::TensorList weights,
      const SpcSettings& k, Tensor* pooled_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [feats, pooled] = call_forward(x, weights, k);
    *pooled_out = pooled;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["groups"] = k.groups.vec();
    ctx->saved_data["stride"] = k.stride;
    ctx->saved_data["padding"] = k.padding.vec();
    ctx->saved_data["dilation"] = k.dilation.vec();
    return std::move(feats);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const at::TensorList weights = at::TensorList(saved).slice(1);
    const auto groups = ctx->saved_data["groups"].toIntVector();
    const auto padding = ctx->saved_data["padding"].toIntVector();
    const auto dilation = ctx->saved_data["dilation"].toIntVector();
    const SpcSettings k{
        groups, ctx->saved_data["stride"].toInt(), padding, dilation};
    c10::List<bool> mask;
    bool any = false;
    for (size_t i = 0; i < saved.size(); ++i) {
      mask.push_back(ctx->needs_input_grad(i));
      any |= mask.get(i);
    }
    variable_list result(saved.size() + 2);  // settings and pooled have none
    if (!any) {
      return result;
    }
    auto [grad_x, grad_weights] =
        (at::GradMode::is_enabled() ? formula : call_backward)(
            grads, x, weights, k, mask);
    for (size_t i = 0; i < saved.size(); ++i) {
      if (mask.get(i)) {
        result[i] = i == 0 ? grad_x : grad_weights[i - 1];
      }
    }
    return result;
  }
};

SpcForward forward_autograd(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const SpcSettings k{groups, stride, padding, dilation};
  refuse_forward_mode("spc_conv", x, weights);
  if (!at::GradMode::is_enabled() || !needs_grad(x, weights)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(x, weights, k);
  }
  // pooled is no output of the Function, since it is not differentiable: marked
  // as such it would keep compiled autograd from tracing.
  Tensor pooled;
  variable_list feats = SpcConv::apply(x, weights, k, &pooled);
  return {std::move(feats), pooled};
}

SpcBackward backward_autograd(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights,
    at::IntArrayRef groups, int64_t stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, c10::List<bool> output_mask) {
  const SpcSettings k{groups, stride, padding, dilation};
  refuse_forward_mode("spc_conv_backward", x, weights);
  refuse_forward_mode("spc_conv_backward", x, grad_feats);
  if (at::GradMode::is_enabled() &&
      (needs_grad(x, weights) || needs_grad(x, grad_feats))) {
    const char* op = "spc_conv_backward";
    if (has_symbols(x, weights) || has_symbols(x, grad_feats)) {
      const int64_t S = static_cast<int64_t>(weights.size());
      check_spc_counts(op, S, k);
      check_spc_backward_counts(op, S, grad_feats, output_mask);
    } else {
      const SpcProblem p = check_spc_arguments(op, x, weights, k);
      check_spc_backward_arguments(op, grad_feats, x, p, output_mask);
    }
    return formula(grad_feats, x, weights, k, output_mask);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_backward(grad_feats, x, weights, k, output_mask);
}

// ---- autocast: to the lower type, as conv2d is ----

SpcForward forward_autocast(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const auto device = at::kCPU;
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  const std::vector<Tensor> cast =
      at::autocast::cached_cast(dtype, weights, device);
  return call_forward(
      at::autocast::cached_cast(dtype, x, device), cast,
      {groups, stride, padding, dilation});
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(epsa_fused, m) {
  m.set_python_module("epsa_fused._fake");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "spc_conv(Tensor x, Tensor[] weights, int[] groups, int stride, "
      "int[] padding, int[] dilation) -> (Tensor[] feats, Tensor pooled)",
      tags);
  m.def(
      "spc_conv_backward(Tensor[] grad_feats, Tensor x, Tensor[] weights, "
      "int[] groups, int stride, int[] padding, int[] dilation, "
      "bool[] output_mask) -> (Tensor grad_x, Tensor[] grad_weights)",
      tags);
  m.def(
      "spc_prepack(Tensor x, Tensor[] weights, int[] groups, int stride, "
      "int[] padding, int[] dilation) -> Tensor packed");
}

TORCH_LIBRARY_IMPL(epsa_fused, Autograd, m) {
  m.impl("spc_conv", forward_autograd);
  m.impl("spc_conv_backward", backward_autograd);
  m.impl("spc_prepack", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(epsa_fused, AutocastCPU, m) {
  m.impl("spc_conv", forward_autocast);
}

}  // namespace epsa
