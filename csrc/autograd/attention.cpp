// The attention step's autograd.
#include "autograd/common.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/library.h>

namespace epsa {
namespace {
#define EPSA_FN inline
#include "ops/attention_math.inc"
#undef EPSA_FN

// ---- the step in differentiable ATen operators, for second derivatives ----

// out [N, S*C, H, W] and attention [N, S, C]
std::pair<Tensor, Tensor> attention_formula(
    at::TensorList feats, const SEWeights& se, bool reversed) {
  const auto dtype = feats[0].scalar_type();
  const auto acc = accumulation_type(dtype);
  const int branches = static_cast<int>(feats.size());
  variable_list maps, means, slots(branches);
  for (const Tensor& f : feats) {
    maps.push_back(f.to(acc));
    means.push_back(maps.back().mean({2, 3}));
  }
  const Tensor p = at::stack(means, 1).unsqueeze(2);  // [N, S, 1, C]
  const c10::SymInt C = p.sym_size(3);
  // [r, C], or [S, r, C]: an S axis makes the number of dimensions odd
  const c10::SymInt hidden = se.fc1_weight.sym_size(se.fc1_weight.dim() % 2 ? 1 : 0);
  const auto linear = [acc](
                          const Tensor& x, const Tensor& weight, const OptTensor& bias,
                          const c10::SymInt& to, const c10::SymInt& from) {
    const Tensor w =  // [1 or S, to, from]
        weight.reshape_symint({-1, to, from}).to(acc);
    const Tensor y = at::matmul(x, w.transpose(1, 2));
    return bias ? y + bias->reshape_symint({-1, 1, to}).to(acc) : y;
  };
  const Tensor h = linear(p, se.fc1_weight, se.fc1_bias, hidden, C).relu();
  const Tensor v = linear(h, se.fc2_weight, se.fc2_bias, C, hidden);
  const Tensor a = v.sigmoid().softmax(1).squeeze(2);
  for (int s = 0; s < branches; ++s) {
    slots[slot_of_branch(s, branches, reversed)] =
        maps[s] * a.select(1, s).unsqueeze(-1).unsqueeze(-1);
  }
  return {at::cat(slots, 1).to(dtype), a};
}

// ---- autograd of the backward operator: second derivatives ----

// A view of each input that needs a gradient: a node of its own, also where two
// inputs are one tensor. An input outside the graph becomes a leaf.
variable_list nodes_of(const variable_list& saved) {
  variable_list nodes;
  for (const Tensor& t : saved) {
    nodes.push_back(!t.defined() ? t : needs_grad(t) ? t.view_as(t) : t.detach().requires_grad_());
  }
  return nodes;
}

// The gradients of the gradients `first`, weighed by `cotangents`, to the saved
// inputs that need one.
void second_derivatives(
    const variable_list& first, const variable_list& cotangents, const variable_list& saved,
    const variable_list& nodes, bool create_graph, variable_list& result) {
  variable_list targets;
  std::vector<size_t> positions;
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (needs_grad(saved[i])) {
      targets.push_back(nodes[i]);
      positions.push_back(i);
    }
  }
  if (first.empty() || targets.empty()) {
    return;
  }
  const variable_list second = torch::autograd::grad(
      first, targets, cotangents, /*retain_graph=*/std::nullopt, create_graph,
      /*allow_unused=*/true);
  for (size_t i = 0; i < second.size(); ++i) {
    result[positions[i]] = second[i];
  }
}

class AttentionBackward : public torch::autograd::Function<AttentionBackward> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const OptTensor& grad_out, const OptTensor& grad_attention,
      at::TensorList feats, const Tensor& fc1_weight, const OptTensor& fc1_bias,
      const Tensor& fc2_weight, const OptTensor& fc2_bias, const Tensor& pooled,
      const Tensor& attention, bool reversed, const c10::List<bool>& output_mask) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_feats, dw1, db1, dw2, db2] = call_attention_backward(
        grad_out, grad_attention, feats, {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, pooled,
        attention, reversed, output_mask);
    variable_list saved{tensor(grad_out), tensor(grad_attention)};
    saved.insert(saved.end(), feats.begin(), feats.end());
    saved.insert(saved.end(), {fc1_weight, tensor(fc1_bias), fc2_weight, tensor(fc2_bias)});
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
  // their share is part of the gradients returned for those.
  static variable_list backward(AutogradContext* ctx, variable_list grad_grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t branches = saved.size() - 2 - kWeights;
    const bool create_graph = at::GradMode::is_enabled();
    at::AutoGradMode enable_grad(true);
    // One result for each forward argument; pooled, attention, reversed and
    // output_mask have none.
    variable_list result(saved.size() + 4);

    const variable_list nodes = nodes_of(saved);
    const SavedSEWeights se(&nodes[2 + branches]);
    const auto [out, attention] = attention_formula(
        at::TensorList(nodes).slice(2, branches), se.view(), ctx->saved_data["reversed"].toBool());
    variable_list outputs, grad_outputs;
    for (const auto& [output, grad] : {std::pair(out, nodes[0]), std::pair(attention, nodes[1])}) {
      if (grad.defined()) {
        outputs.push_back(output);
        grad_outputs.push_back(grad);
      }
    }
    const auto output_mask = ctx->saved_data["output_mask"].toBoolList();
    variable_list wrt, weights;  // the gradients asked for, and their cotangents
    for (size_t i = 0; i < grad_grads.size(); ++i) {
      if (output_mask.get(i) && grad_grads[i].defined() && nodes[2 + i].defined()) {
        wrt.push_back(nodes[2 + i]);
        weights.push_back(grad_grads[i]);
      }
    }
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
    second_derivatives(first, cotangents, saved, nodes, create_graph, result);
    return result;
  }
};

Backward attention_backward_autograd(
    const OptTensor& grad_out, const OptTensor& grad_attention, at::TensorList feats,
    const SEWeights& se, const Tensor& pooled, const Tensor& attention, bool reversed,
    c10::List<bool> output_mask) {
  refuse_forward_mode(
      "psa_attention_backward",
      has_tangent(feats) || has_tangent(se) || has_tangent(grad_out) || has_tangent(grad_attention),
      kAttentionReference);
  if (!at::GradMode::is_enabled() ||
      !(needs_grad(feats) || needs_grad(se) || needs_grad(grad_out) ||
        needs_grad(grad_attention))) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_attention_backward(
        grad_out, grad_attention, feats, se, pooled, attention, reversed, output_mask);
  }
  variable_list grads = AttentionBackward::apply(
      grad_out, grad_attention, feats, se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias,
      pooled, attention, reversed, output_mask);
  const auto weights = grads.end() - 4;
  return {variable_list(grads.begin(), weights), weights[0], weights[1], weights[2], weights[3]};
}

// ---- autograd of the forward operator ----

class Attention : public torch::autograd::Function<Attention> {
 public:
  static variable_list forward(
      AutogradContext* ctx, at::TensorList feats, const Tensor& fc1_weight,
      const OptTensor& fc1_bias, const Tensor& fc2_weight, const OptTensor& fc2_bias, bool reversed,
      const OptTensor& pooled_in, Tensor* pooled_out) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, pooled, attention] = call_attention(
        feats, {fc1_weight, fc1_bias, fc2_weight, fc2_bias}, reversed, pooled_in, {});
    *pooled_out = pooled;
    variable_list saved(feats.begin(), feats.end());
    saved.insert(
        saved.end(),
        {fc1_weight, tensor(fc1_bias), fc2_weight, tensor(fc2_bias), pooled, attention});
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["reversed"] = reversed;
    ctx->set_materialize_grads(false);
    return {out, attention};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const size_t inputs = saved.size() - 2;  // without pooled and attention
    const size_t branches = inputs - kWeights;
    // One result for each forward argument; reversed, pooled_in and pooled_out
    // have none.
    variable_list result(inputs + 3);
    if (!grads[0].defined() && !grads[1].defined()) {
      return result;
    }
    const c10::List<bool> mask = mask_of(ctx, saved, inputs);
    const OptTensor grad_out = optional(grads[0]);
    const OptTensor grad_attention = optional(grads[1]);
    const SavedSEWeights se(&saved[branches]);
    auto [grad_feats, dw1, db1, dw2, db2] = call_attention_backward(
        grad_out, grad_attention, at::TensorList(saved).slice(0, branches), se.view(),
        saved[inputs], saved[inputs + 1], ctx->saved_data["reversed"].toBool(), mask);
    const Tensor weight_grads[] = {dw1, db1, dw2, db2};
    for (size_t i = 0; i < inputs; ++i) {
      if (mask.get(i)) {
        result[i] = i < branches ? grad_feats[i] : weight_grads[i - branches];
      }
    }
    return result;
  }
};

Forward attention_autograd(
    at::TensorList feats, const SEWeights& se, bool reversed, const OptTensor& pooled,
    const Epilogue& epilogue) {
  refuse_forward_mode(
      "psa_attention", has_tangent(feats) || has_tangent(se) || has_tangent(epilogue),
      kAttentionReference);
  const bool grad = at::GradMode::is_enabled() && (needs_grad(feats) || needs_grad(se));
  refuse_epilogue("psa_attention", epilogue, grad);
  if (!grad) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_attention(feats, se, reversed, pooled, epilogue);
  }
  // pooled is not differentiable. Marking an output so would stop compiled autograd's
  // tracing, so pooled is none.
  Tensor pooled_out;
  const variable_list results = Attention::apply(
      feats, se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias, reversed, pooled, &pooled_out);
  return {results[0], pooled_out, results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, Autograd, m) {
  m.impl("psa_attention", flat<attention_autograd>());
  m.impl("psa_attention_backward", flat<attention_backward_autograd>());
}

}  // namespace epsa
