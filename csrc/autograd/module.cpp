// The schemas, autograd and autocast of a whole PSA module (library _ops).
#include "ops/attention.h"
#include "ops/conv.h"
#include "autograd/common.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace epsa {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The SE's weights; biases may be undefined.
struct SeWeights {
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  SeWeights(
      const Tensor& w1, const OptTensor& b1, const Tensor& w2,
      const OptTensor& b2)
      : fc1_weight(w1),
        fc1_bias(b1.value_or(Tensor())),
        fc2_weight(w2),
        fc2_bias(b2.value_or(Tensor())) {}

  static OptTensor optional(const Tensor& t) {
    return t.defined() ? OptTensor(t) : std::nullopt;
  }
  std::vector<Tensor> list() const {
    return {fc1_weight, fc1_bias, fc2_weight, fc2_bias};
  }
};

// ---- the operators, through the dispatcher ----

SpcForward call_spc_conv(
    const Tensor& x, at::TensorList weights, const SpcSettings& k) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::spc_conv", "")
          .typed<SpcForward(
              const Tensor&, at::TensorList, at::IntArrayRef, int64_t,
              at::IntArrayRef, at::IntArrayRef)>();
  return op.call(x, weights, k.groups, k.stride, k.padding, k.dilation);
}

Tensor call_psa_forward(
    const Tensor& x, at::TensorList weights, const SpcSettings& k,
    const SeWeights& se, bool reversed, const OptTensor& packed) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::psa_forward", "")
          .typed<Tensor(
              const Tensor&, at::TensorList, at::IntArrayRef, int64_t,
              at::IntArrayRef, at::IntArrayRef, const Tensor&, const OptTensor&,
              const Tensor&, const OptTensor&, bool, const OptTensor&)>();
  return op.call(
      x, weights, k.groups, k.stride, k.padding, k.dilation, se.fc1_weight,
      se.optional(se.fc1_bias), se.fc2_weight, se.optional(se.fc2_bias),
      reversed, packed);
}

Forward call_psa_save_output(
    const Tensor& x, at::TensorList weights, const SpcSettings& k,
    const SeWeights& se, bool reversed) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::psa_save_output", "")
          .typed<Forward(
              const Tensor&, at::TensorList, at::IntArrayRef, int64_t,
              at::IntArrayRef, at::IntArrayRef, const Tensor&, const OptTensor&,
              const Tensor&, const OptTensor&, bool)>();
  return op.call(
      x, weights, k.groups, k.stride, k.padding, k.dilation, se.fc1_weight,
      se.optional(se.fc1_bias), se.fc2_weight, se.optional(se.fc2_bias),
      reversed);
}

ModuleBackward call_psa_save_output_backward(
    const Tensor& grad_out, const Tensor& x, at::TensorList weights,
    const SpcSettings& k, const SeWeights& se, const Tensor& out,
    const Tensor& pooled, const Tensor& attention, bool reversed,
    const c10::List<bool>& output_mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::psa_save_output_backward", "")
          .typed<ModuleBackward(
              const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef,
              int64_t, at::IntArrayRef, at::IntArrayRef, const Tensor&,
              const OptTensor&, const Tensor&, const OptTensor&, const Tensor&,
              const Tensor&, const Tensor&, bool, c10::List<bool>)>();
  return op.call(
      grad_out, x, weights, k.groups, k.stride, k.padding, k.dilation,
      se.fc1_weight, se.optional(se.fc1_bias), se.fc2_weight,
      se.optional(se.fc2_bias), out, pooled, attention, reversed, output_mask);
}

bool any_needs_grad(
    const Tensor& x, at::TensorList weights, const SeWeights& se) {
  return at::GradMode::is_enabled() &&
      (needs_grad(x, weights) || needs_grad(x, se.list()));
}

// ---- psa_forward: where a gradient may be asked for, the two steps, which keep
// what it needs ----

Tensor forward_autograd(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
    const OptTensor& packed) {
  const SpcSettings k{groups, stride, padding, dilation};
  const SeWeights se(fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  refuse_forward_mode("psa_forward", x, weights);
  refuse_forward_mode("psa_forward", x, se.list());
  if (any_needs_grad(x, weights, se)) {
    const auto [feats, pooled] = call_spc_conv(x, weights, k);
    return call_psa_attention(
        feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_psa_forward(x, weights, k, se, reversed, packed);
}

// ---- psa_save_output: of the maps only the output is kept ----

class PsaSaveOutput : public torch::autograd::Function<PsaSaveOutput> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, at::TensorList weights,
      const Tensor& fc1_weight, const OptTensor& fc1_bias,
      const Tensor& fc2_weight, const OptTensor& fc2_bias, const SpcSettings& k,
      bool reversed, Tensor* pooled_out, Tensor* attention_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const SeWeights se(fc1_weight, fc1_bias, fc2_weight, fc2_bias);
    auto [out, pooled, attention] =
        call_psa_save_output(x, weights, k, se, reversed);
    *pooled_out = pooled;
    *attention_out = attention;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    const std::vector<Tensor> se_list = se.list();
    saved.insert(saved.end(), se_list.begin(), se_list.end());
    saved.insert(saved.end(), {out, pooled, attention});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["groups"] = k.groups.vec();
    ctx->saved_data["stride"] = k.stride;
    ctx->saved_data["padding"] = k.padding.vec();
    ctx->saved_data["dilation"] = k.dilation.vec();
    ctx->saved_data["reversed"] = reversed;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t inputs = saved.size() - 3;
    const auto groups = ctx->saved_data["groups"].toIntVector();
    const auto padding = ctx->saved_data["padding"].toIntVector();
    const auto dilation = ctx->saved_data["dilation"].toIntVector();
    const SpcSettings k{
        groups, ctx->saved_data["stride"].toInt(), padding, dilation};
    const bool reversed = ctx->saved_data["reversed"].toBool();
    // Edges count the tensors that were given; an absent bias has none.
    c10::List<bool> mask;
    bool any = false;
    size_t edge = 0;
    for (size_t i = 0; i < inputs; ++i) {
      mask.push_back(saved[i].defined() && ctx->needs_input_grad(edge++));
      any |= mask.get(i);
    }
    // settings, reversed and the two outputs have none
    variable_list result(inputs + 4);
    if (!any) {
      return result;
    }
    const variable_list wanted = at::GradMode::is_enabled()
        ? formula(saved, k, reversed, grads[0], mask)
        : kernel(saved, k, reversed, grads[0], mask);
    for (size_t i = 0; i < inputs; ++i) {
      if (mask.get(i)) {
        result[i] = wanted[i];
      }
    }
    return result;
  }

 private:
  static SeWeights se_of(const variable_list& list, size_t branches) {
    return {
        list[1 + branches], SeWeights::optional(list[2 + branches]),
        list[3 + branches], SeWeights::optional(list[4 + branches])};
  }

  static variable_list kernel(
      const variable_list& saved, const SpcSettings& k, bool reversed,
      const Tensor& grad_out, const c10::List<bool>& mask) {
    const size_t branches = k.groups.size();
    auto [grad_x, grad_weights, dw1, db1, dw2, db2] =
        call_psa_save_output_backward(
            grad_out, saved[0], at::TensorList(saved).slice(1, branches), k,
            se_of(saved, branches), saved[branches + 5], saved[branches + 6],
            saved[branches + 7], reversed, mask);
    variable_list result{grad_x};
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    result.insert(result.end(), {dw1, db1, dw2, db2});
    return result;
  }

  // The same through the module's own definition, computed anew: where the
  // gradients are to be differentiated again.
  static variable_list formula(
      const variable_list& saved, const SpcSettings& k, bool reversed,
      const Tensor& grad_out, const c10::List<bool>& mask) {
    const size_t branches = k.groups.size();
    // A view of each input: a node of its own, also where two are one tensor.
    variable_list inputs, wrt;
    for (size_t i = 0; i < branches + 5; ++i) {
      inputs.push_back(mask.get(i) ? saved[i].view_as(saved[i]) : saved[i]);
      if (mask.get(i)) {
        wrt.push_back(inputs[i]);
      }
    }
    std::vector<Tensor> feats;
    for (size_t s = 0; s < branches; ++s) {
      feats.push_back(at::conv2d(
          inputs[0], inputs[1 + s], {}, {k.stride, k.stride},
          {k.padding[s], k.padding[s]}, {k.dilation[s], k.dilation[s]},
          k.groups[s]));
    }
    const SeWeights se = se_of(inputs, branches);
    const Tensor out = call_psa_attention(
        feats, se.fc1_weight, se.optional(se.fc1_bias), se.fc2_weight,
        se.optional(se.fc2_bias), reversed, std::nullopt);
    const variable_list grads = torch::autograd::grad(
        {out}, wrt, {grad_out}, /*retain_graph=*/true, /*create_graph=*/true,
        /*allow_unused=*/true);
    variable_list result(branches + 5);
    size_t next = 0;
    for (size_t i = 0; i < branches + 5; ++i) {
      if (mask.get(i)) {
        result[i] = grads[next++];
      }
    }
    return result;
  }
};

Forward save_output_autograd(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed) {
  const SpcSettings k{groups, stride, padding, dilation};
  const SeWeights se(fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  refuse_forward_mode("psa_save_output", x, weights);
  refuse_forward_mode("psa_save_output", x, se.list());
  if (!any_needs_grad(x, weights, se)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_psa_save_output(x, weights, k, se, reversed);
  }
  // neither is an output of the Function: they are not differentiable
  Tensor pooled, attention;
  Tensor out = PsaSaveOutput::apply(
      x, weights, fc1_weight, fc1_bias, fc2_weight, fc2_bias, k, reversed,
      &pooled, &attention);
  return {out, pooled, attention};
}

ModuleBackward save_output_backward_autograd(
    const Tensor& grad_out, const Tensor& x, at::TensorList weights,
    at::IntArrayRef groups, int64_t stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, const Tensor& fc1_weight,
    const OptTensor& fc1_bias, const Tensor& fc2_weight,
    const OptTensor& fc2_bias, const Tensor& out, const Tensor& pooled,
    const Tensor& attention, bool reversed, c10::List<bool> output_mask) {
  const SeWeights se(fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any_needs_grad(x, weights, se) &&
          !(at::GradMode::is_enabled() && grad_out.requires_grad()),
      "psa_save_output_backward: its derivative is not supported, expected "
      "tensors that need no gradient; differentiate psa_save_output twice");
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_psa_save_output_backward(
      grad_out, x, weights, {groups, stride, padding, dilation}, se, out, pooled,
      attention, reversed, output_mask);
}

// ---- autocast: the convolutions as conv2d; the attention step takes its weights
// as they are ----

struct Cast {
  Tensor x;
  std::vector<Tensor> weights;

  Cast(const Tensor& x_, at::TensorList weights_) {
    const auto dtype = at::autocast::get_autocast_dtype(at::kCPU);
    x = at::autocast::cached_cast(dtype, x_, at::kCPU);
    weights = at::autocast::cached_cast(dtype, weights_, at::kCPU);
  }
};

Tensor forward_autocast(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
    const OptTensor& packed) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const Cast cast(x, weights);
  // what was packed were the weights before they were cast
  const bool packs_hold =
      weights.empty() || cast.weights[0].is_same(weights[0]);
  return call_psa_forward(
      cast.x, cast.weights, {groups, stride, padding, dilation},
      {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, reversed,
      packs_hold ? packed : std::nullopt);
}

Forward save_output_autocast(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCPU);
  const Cast cast(x, weights);
  return call_psa_save_output(
      cast.x, cast.weights, {groups, stride, padding, dilation},
      {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, reversed);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(epsa_fused, m) {
  m.set_python_module("epsa_fused._fake");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "psa_forward(Tensor x, Tensor[] weights, int[] groups, int stride, "
      "int[] padding, int[] dilation, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, bool reversed, "
      "Tensor? packed=None) -> Tensor",
      tags);
  m.def(
      "psa_save_output(Tensor x, Tensor[] weights, int[] groups, int stride, "
      "int[] padding, int[] dilation, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, bool reversed) "
      "-> (Tensor out, Tensor pooled, Tensor attention)",
      tags);
  m.def(
      "psa_save_output_backward(Tensor grad_out, Tensor x, Tensor[] weights, "
      "int[] groups, int stride, int[] padding, int[] dilation, "
      "Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, "
      "Tensor? fc2_bias, Tensor out, Tensor pooled, Tensor attention, "
      "bool reversed, bool[] output_mask) -> (Tensor grad_x, "
      "Tensor[] grad_weights, Tensor grad_fc1_weight, Tensor grad_fc1_bias, "
      "Tensor grad_fc2_weight, Tensor grad_fc2_bias)",
      tags);
}

TORCH_LIBRARY_IMPL(epsa_fused, Autograd, m) {
  m.impl("psa_forward", forward_autograd);
  m.impl("psa_save_output", save_output_autograd);
  m.impl("psa_save_output_backward", save_output_backward_autograd);
}

TORCH_LIBRARY_IMPL(epsa_fused, AutocastCPU, m) {
  m.impl("psa_forward", forward_autocast);
  m.impl("psa_save_output", save_output_autocast);
}

}  // namespace epsa
