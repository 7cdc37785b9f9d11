// The operators' schemas and their autograd (library _ops).
#include "ops/attention.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>

#define EPSA_FN inline
namespace epsa {
namespace {
#include "ops/attention_math.inc"

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- the operators, through the dispatcher ----

Forward call_forward(
    at::TensorList feats, const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
    const OptTensor& pooled) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::psa_attention", "")
          .typed<Forward(
              at::TensorList, const Tensor&, const OptTensor&, const Tensor&,
              const OptTensor&, bool, const OptTensor&)>();
  return op.call(
      feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled);
}

Backward call_backward(
    const OptTensor& grad_out, const OptTensor& grad_attention,
    at::TensorList feats, const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, const Tensor& pooled,
    const Tensor& attention, bool reversed,
    const c10::List<bool>& output_mask) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("epsa_fused::psa_attention_backward", "")
          .typed<Backward(
              const OptTensor&, const OptTensor&, at::TensorList, const Tensor&,
              const OptTensor&, const Tensor&, const OptTensor&, const Tensor&,
              const Tensor&, bool, c10::List<bool>)>();
  return op.call(
      grad_out, grad_attention, feats, fc1_weight, fc1_bias, fc2_weight,
      fc2_bias, pooled, attention, reversed, output_mask);
}

// ---- helpers ----

OptTensor optional(const Tensor& t) {
  return t.defined() ? OptTensor(t) : std::nullopt;
}

Tensor tensor(const OptTensor& t) {
  return t.has_value() ? *t : Tensor();
}

bool needs_grad(const Tensor& t) {
  return t.defined() && t.requires_grad();
}

bool any_needs_grad(std::initializer_list<OptTensor> tensors) {
  for (const auto& t : tensors) {
    if (t && t->requires_grad()) {
      return true;
    }
  }
  return false;
}

bool any_needs_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), needs_grad);
}

// Without this the tangents of inputs that need no (reverse) gradient would get
// lost; of the others torch::autograd::Function itself says so.
void refuse_forward_mode(
    const char* op, at::TensorList feats,
    std::initializer_list<OptTensor> tensors) {
  bool any = torch::autograd::isFwGradDefinedTensorList(feats);
  for (const auto& t : tensors) {
    any |= torch::autograd::isFwGradDefined(t);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      !any, op, ": forward-mode differentiation (jvp) is not supported, expected "
      "tensors without tangents; psa_attention_reference supports it");
}

// Feats and SE weights as they lie in a saved list: S maps, then four weights
// of which the biases may be undefined.
struct Inputs {
  variable_list feats;
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;

  Inputs(const variable_list& list, size_t first, size_t branches)
      : feats(list.begin() + first, list.begin() + first + branches),
        fc1_weight(list[first + branches]),
        fc1_bias(list[first + branches + 1]),
        fc2_weight(list[first + branches + 2]),
        fc2_bias(list[first + branches + 3]) {}
};

// ---- the step in differentiable ATen operators, for second derivatives ----

// out [N, S*C, H, W] and attention [N, S, C]
std::pair<Tensor, Tensor> formula(const Inputs& in, bool reversed) {
  const auto dtype = in.feats[0].scalar_type();
  const auto acc = accumulation_type(dtype);
  const int branches = static_cast<int>(in.feats.size());
  variable_list maps, means, slots(branches);
  for (const Tensor& f : in.feats) {
    maps.push_back(f.to(acc));
    means.push_back(maps.back().mean({2, 3}));
  }
  const Tensor p = at::stack(means, 1).unsqueeze(2);  // [N, S, 1, C]
  const c10::SymInt C = p.sym_size(3);
  // [r, C], or [S, r, C]: an S axis makes the number of dimensions odd
  const c10::SymInt hidden =
      in.fc1_weight.sym_size(in.fc1_weight.dim() % 2 ? 1 : 0);
  const auto linear = [acc](
                          const Tensor& x, const Tensor& weight,
                          const Tensor& bias, const c10::SymInt& to,
                          const c10::SymInt& from) {
    const Tensor w =  // [1 or S, to, from]
        weight.reshape_symint({-1, to, from}).to(acc);
    const Tensor y = at::matmul(x, w.transpose(1, 2));
    return bias.defined() ? y + bias.reshape_symint({-1, 1, to}).to(acc) : y;
  };
  const Tensor h = linear(p, in.fc1_weight, in.fc1_bias, hidden, C).relu();
  const Tensor v = linear(h, in.fc2_weight, in.fc2_bias, C, hidden);
  const Tensor a = v.sigmoid().softmax(1).squeeze(2);
  for (int s = 0; s < branches; ++s) {
    slots[slot_of_branch(s, branches, reversed)] =
        maps[s] * a.select(1, s).unsqueeze(-1).unsqueeze(-1);
  }
  return {at::cat(slots, 1).to(dtype), a};
}

// ---- autograd of the backward operator: second derivatives ----

class PsaAttentionBackward
    : public torch::autograd::Function<PsaAttentionBackward> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const OptTensor& grad_out,
      const OptTensor& grad_attention, at::TensorList feats,
      const Tensor& fc1_weight, const OptTensor& fc1_bias,
      const Tensor& fc2_weight, const OptTensor& fc2_bias, const Tensor& pooled,
      const Tensor& attention, bool reversed,
      const c10::List<bool>& output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_feats, dw1, db1, dw2, db2] = call_backward(
        grad_out, grad_attention, feats, fc1_weight, fc1_bias, fc2_weight,
        fc2_bias, pooled, attention, reversed, output_mask);
    variable_list saved{tensor(grad_out), tensor(grad_attention)};
    saved.insert(saved.end(), feats.begin(), feats.end());
    saved.insert(
        saved.end(),
        {fc1_weight, tensor(fc1_bias), fc2_weight, tensor(fc2_bias)});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["reversed"] = reversed;
    ctx->saved_data["output_mask"] = output_mask;
    ctx->set_materialize_grads(false);
    variable_list grads = std::move(grad_feats);
    grads.insert(grads.end(), {dw1, db1, dw2, db2});
    return grads;
  }

  // The vector-Jacobian product of the gradients, by differentiating the
  // formula twice. pooled and attention are functions of the other inputs, so
  // what flows through them is part of the gradients returned for those.
  static variable_list backward(AutogradContext* ctx, variable_list grad_grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t branches = saved.size() - 6;
    const bool reversed = ctx->saved_data["reversed"].toBool();
    const bool create_graph = at::GradMode::is_enabled();
    at::AutoGradMode enable_grad(true);

    // A view of each input: a node of its own, also where two inputs are one
    // tensor. An input outside the graph becomes a leaf.
    variable_list inputs;
    for (const Tensor& t : saved) {
      inputs.push_back(
          !t.defined()          ? t
              : needs_grad(t)   ? t.view_as(t)
                                : t.detach().requires_grad_());
    }
    const auto [out, attention] = formula(Inputs(inputs, 2, branches), reversed);
    variable_list outputs, grad_outputs;
    for (const auto& [output, grad] :
         {std::pair(out, inputs[0]), std::pair(attention, inputs[1])}) {
      if (grad.defined()) {
        outputs.push_back(output);
        grad_outputs.push_back(grad);
      }
    }
    const auto output_mask = ctx->saved_data["output_mask"].toBoolList();
    variable_list wrt, weights;  // the gradients asked for, and their cotangents
    for (size_t i = 0; i < grad_grads.size(); ++i) {
      if (output_mask.get(i) && grad_grads[i].defined() &&
          inputs[2 + i].defined()) {
        wrt.push_back(inputs[2 + i]);
        weights.push_back(grad_grads[i]);
      }
    }
    // One result for each forward argument; pooled, attention, reversed and
    // output_mask have none.
    variable_list result(inputs.size() + 4);
    if (outputs.empty() || wrt.empty()) {
      return result;
    }
    const variable_list all = torch::autograd::grad(
        outputs, wrt, grad_outputs, /*retain_graph=*/true,
        /*create_graph=*/true, /*allow_unused=*/true);
    variable_list first, cotangents;
    for (size_t i = 0; i < all.size(); ++i) {
      if (needs_grad(all[i])) {
        first.push_back(all[i]);
        cotangents.push_back(weights[i]);
      }
    }
    variable_list targets;
    std::vector<size_t> positions;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (needs_grad(saved[i])) {
        targets.push_back(inputs[i]);
        positions.push_back(i);
      }
    }
    if (first.empty() || targets.empty()) {
      return result;
    }
    const variable_list second = torch::autograd::grad(
        first, targets, cotangents, /*retain_graph=*/std::nullopt, create_graph,
        /*allow_unused=*/true);
    for (size_t i = 0; i < second.size(); ++i) {
      result[positions[i]] = second[i];
    }
    return result;
  }
};

Backward backward_autograd(
    const OptTensor& grad_out, const OptTensor& grad_attention,
    at::TensorList feats, const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, const Tensor& pooled,
    const Tensor& attention, bool reversed, c10::List<bool> output_mask) {
  refuse_forward_mode(
      "psa_attention_backward", feats,
      {grad_out, grad_attention, fc1_weight, fc1_bias, fc2_weight, fc2_bias});
  if (!at::GradMode::is_enabled() ||
      !(any_needs_grad(feats) ||
        any_needs_grad({grad_out, grad_attention, fc1_weight, fc1_bias,
                        fc2_weight, fc2_bias}))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(
        grad_out, grad_attention, feats, fc1_weight, fc1_bias, fc2_weight,
        fc2_bias, pooled, attention, reversed, output_mask);
  }
  variable_list grads = PsaAttentionBackward::apply(
      grad_out, grad_attention, feats, fc1_weight, fc1_bias, fc2_weight,
      fc2_bias, pooled, attention, reversed, output_mask);
  const auto weights = grads.end() - 4;
  return {
      variable_list(grads.begin(), weights), weights[0], weights[1], weights[2],
      weights[3]};
}

// ---- autograd of the forward operator ----

class PsaAttention : public torch::autograd::Function<PsaAttention> {
 public:
  static variable_list forward(
      AutogradContext* ctx, at::TensorList feats, const Tensor& fc1_weight,
      const OptTensor& fc1_bias, const Tensor& fc2_weight,
      const OptTensor& fc2_bias, bool reversed, const OptTensor& pooled_in,
      Tensor* pooled_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, pooled, attention] = call_forward(
        feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled_in);
    *pooled_out = pooled;
    variable_list saved(feats.begin(), feats.end());
    saved.insert(
        saved.end(),
        {fc1_weight, tensor(fc1_bias), fc2_weight, tensor(fc2_bias), pooled,
         attention});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["reversed"] = reversed;
    ctx->set_materialize_grads(false);
    return {out, attention};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t branches = saved.size() - 6;
    // One result for each forward argument; reversed, pooled_in and pooled_out
    // have none.
    variable_list result(branches + 7);
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const Inputs in(saved, 0, branches);
    // Edges count the tensors that were given; an absent bias has none.
    c10::List<bool> mask;
    mask.reserve(branches + 4);
    size_t edge = 0;
    for (size_t i = 0; i < branches + 4; ++i) {
      mask.push_back(saved[i].defined() && ctx->needs_input_grad(edge++));
    }
    auto [grad_feats, dw1, db1, dw2, db2] = call_backward(
        optional(grads[0]), optional(grads[1]), in.feats, in.fc1_weight,
        optional(in.fc1_bias), in.fc2_weight, optional(in.fc2_bias),
        saved[branches + 4], saved[branches + 5],
        ctx->saved_data["reversed"].toBool(), mask);
    const Tensor weight_grads[] = {dw1, db1, dw2, db2};
    for (size_t i = 0; i < branches + 4; ++i) {
      if (mask.get(i)) {
        result[i] = i < branches ? grad_feats[i] : weight_grads[i - branches];
      }
    }
    return result;
  }
};

Forward forward_autograd(
    at::TensorList feats, const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
    const OptTensor& pooled) {
  refuse_forward_mode(
      "psa_attention", feats, {fc1_weight, fc1_bias, fc2_weight, fc2_bias});
  if (!at::GradMode::is_enabled() ||
      !(any_needs_grad(feats) ||
        any_needs_grad({fc1_weight, fc1_bias, fc2_weight, fc2_bias}))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_forward(
        feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled);
  }
  // pooled is no output of the Function, since it is not differentiable: marked
  // as such it would keep compiled autograd from tracing.
  Tensor pooled_out;
  const variable_list results = PsaAttention::apply(
      feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled,
      &pooled_out);
  return {results[0], pooled_out, results[1]};
}

}  // namespace

Tensor call_psa_attention(
    at::TensorList feats, const Tensor& fc1_weight, const OptTensor& fc1_bias,
    const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
    const OptTensor& pooled) {
  return std::get<0>(call_forward(
      feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled));
}

TORCH_LIBRARY(epsa_fused, m) {
  m.set_python_module("epsa_fused._fake");
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "psa_attention(Tensor[] feats, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, bool reversed, "
      "Tensor? pooled=None) -> (Tensor out, Tensor pooled, Tensor attention)",
      tags);
  m.def(
      "psa_attention_backward(Tensor? grad_out, Tensor? grad_attention, "
      "Tensor[] feats, Tensor fc1_weight, Tensor? fc1_bias, "
      "Tensor fc2_weight, Tensor? fc2_bias, Tensor pooled, Tensor attention, "
      "bool reversed, bool[] output_mask) -> (Tensor[] grad_feats, "
      "Tensor grad_fc1_weight, Tensor grad_fc1_bias, Tensor grad_fc2_weight, "
      "Tensor grad_fc2_bias)",
      tags);
}

TORCH_LIBRARY_IMPL(epsa_fused, Autograd, m) {
  m.impl("psa_attention", forward_autograd);
  m.impl("psa_attention_backward", backward_autograd);
}

}  // namespace epsa
