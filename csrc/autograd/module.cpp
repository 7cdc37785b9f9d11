// The autograd of a whole PSA module.
#include "autograd/common.h"
#include "ops/foreign.h"
#include "ops/library.h"
#include "ops/module.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

namespace epsa {
namespace {

bool any_needs_grad(
    const Tensor& x, at::TensorList weights, const SEWeights& se, const OptTensor& bias = kNone) {
  return at::GradMode::is_enabled() &&
      (needs_grad(x) || needs_grad(weights) || needs_grad(se) || needs_grad(bias));
}

void refuse_tangents(
    const char* op, const Tensor& x, at::TensorList weights, const SEWeights& se,
    const Epilogue& epilogue = {}, const OptTensor& bias = kNone) {
  refuse_forward_mode(
      op,
      has_tangent(x) || has_tangent(weights) || has_tangent(se) || has_tangent(epilogue) ||
          has_tangent(bias),
      kModuleReference);
}

// ---- psa_forward: two operators where a gradient may be asked for, since they keep
// its inputs ----

Tensor module_autograd(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const OptTensor& packed, const Epilogue& epilogue, const ConvBias& bias) {
  refuse_tangents("psa_forward", x, weights, se, epilogue, bias.value);
  const bool grad = any_needs_grad(x, weights, se, bias.value);
  refuse_epilogue("psa_forward", epilogue, grad);
  // Below autograd the dispatcher refuses foreign tensors.
  const bool foreign = is_foreign(x) || std::any_of(weights.begin(), weights.end(), is_foreign);
  if (grad && !foreign) {
    check_packed("psa_forward", x, packed);
    try {
      const auto [feats, pooled] = call_conv(x, weights, k, bias);
      return std::get<0>(call_attention(feats, se, reversed, pooled, {}));
    } catch (...) {
      // Both operators name themselves. These checks would cost each call a few microseconds.
      const auto p = check_module_arguments<c10::SymInt>("psa_forward", x, weights, k, se);
      check_bias("psa_forward", x, bias, p.conv);
      throw;
    }
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_module(x, weights, k, se, reversed, packed, epilogue, bias);
}

// ---- psa_save_output: keeps the output in place of the maps ----

class SaveOutput : public torch::autograd::Function<SaveOutput> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, at::TensorList weights, const Tensor& fc1_weight,
      const OptTensor& fc1_bias, const Tensor& fc2_weight, const OptTensor& fc2_bias,
      const ConvSettings& k, bool reversed, Tensor* pooled_out, Tensor* attention_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const SEWeights se{fc1_weight, fc1_bias, fc2_weight, fc2_bias};
    auto [out, pooled, attention] = call_save_output(x, weights, k, se, reversed);
    *pooled_out = pooled;
    *attention_out = attention;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    saved.insert(
        saved.end(),
        {fc1_weight, tensor(fc1_bias), fc2_weight, tensor(fc2_bias), out, pooled, attention});
    ctx->save_for_backward(std::move(saved));
    SavedSettings::save(ctx, k);
    ctx->saved_data["reversed"] = reversed;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t inputs = saved.size() - 3;
    const SavedSettings settings(ctx);
    const ConvSettings k = settings.view();
    const bool reversed = ctx->saved_data["reversed"].toBool();
    const c10::List<bool> mask = mask_of(ctx, saved, inputs);
    // settings, reversed and the two outputs have none
    variable_list result(inputs + 4);
    if (!any_of(mask)) {
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
  static variable_list kernel(
      const variable_list& saved, const ConvSettings& k, bool reversed, const Tensor& grad,
      const c10::List<bool>& mask) {
    const size_t branches = k.groups.size();
    const SavedSEWeights se(&saved[branches + 1]);
    const Tensor* outputs = &saved[branches + 1 + kWeights];
    auto [grad_x, grad_weights, dw1, db1, dw2, db2] = call_save_output_backward(
        grad, saved[0], at::TensorList(saved).slice(1, branches), k, se.view(), outputs[0],
        outputs[1], outputs[2], reversed, mask);
    variable_list result{grad_x};
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    result.insert(result.end(), {dw1, db1, dw2, db2});
    return result;
  }

  // The same through the module's definition, computed anew, for second
  // derivatives.
  static variable_list formula(
      const variable_list& saved, const ConvSettings& k, bool reversed, const Tensor& grad_out,
      const c10::List<bool>& mask) {
    const size_t branches = k.groups.size();
    // A view of each input: a node of its own, also where two are one tensor.
    variable_list inputs, wrt;
    for (size_t i = 0; i < branches + 1 + kWeights; ++i) {
      inputs.push_back(mask.get(i) ? saved[i].view_as(saved[i]) : saved[i]);
      if (mask.get(i)) {
        wrt.push_back(inputs[i]);
      }
    }
    std::vector<Tensor> feats;
    for (size_t s = 0; s < branches; ++s) {
      feats.push_back(library_conv(inputs[0], inputs[1 + s], k, s));
    }
    const SavedSEWeights se(&inputs[branches + 1]);
    const Tensor out = std::get<0>(call_attention(feats, se.view(), reversed, std::nullopt, {}));
    const variable_list grads = torch::autograd::grad(
        {out}, wrt, {grad_out}, /*retain_graph=*/true, /*create_graph=*/true,
        /*allow_unused=*/true);
    variable_list result(branches + 1 + kWeights);
    size_t next = 0;
    for (size_t i = 0; i < branches + 1 + kWeights; ++i) {
      if (mask.get(i)) {
        result[i] = grads[next++];
      }
    }
    return result;
  }
};

Forward save_output_autograd(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed) {
  refuse_tangents("psa_save_output", x, weights, se);
  if (!any_needs_grad(x, weights, se)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_save_output(x, weights, k, se, reversed);
  }
  // Neither is differentiable, so neither is an output of the Function.
  Tensor pooled, attention;
  Tensor out = SaveOutput::apply(
      x, weights, se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias, k, reversed, &pooled,
      &attention);
  return {out, pooled, attention};
}

ModuleBackward save_output_backward_autograd(
    const Tensor& grad_out, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const Tensor& out, const Tensor& pooled, const Tensor& attention,
    bool reversed, c10::List<bool> output_mask) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any_needs_grad(x, weights, se) && !(at::GradMode::is_enabled() && grad_out.requires_grad()),
      "psa_save_output_backward: its derivative is not supported, expected "
      "tensors that need no gradient; differentiate psa_save_output twice");
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_save_output_backward(
      grad_out, x, weights, k, se, out, pooled, attention, reversed, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, Autograd, m) {
  m.impl("psa_forward", flat<module_autograd>());
  m.impl("psa_save_output", flat<save_output_autograd>());
  m.impl("psa_save_output_backward", flat<save_output_backward_autograd>());
}

}  // namespace epsa
