// Results without data: what torch.compile, torch.export and meta tensors ask
// for. The checks and layouts are the kernels' own, on symbolic sizes.
#include "ops/groups.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

namespace epsa {
namespace {

using at::Tensor;
using c10::SymInt;
using OptTensor = std::optional<Tensor>;

Tensor empty(
    c10::SymIntArrayRef sizes, const Tensor& like, at::ScalarType dtype,
    at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return at::empty_symint(sizes, like.options().requires_grad(false).dtype(dtype), format);
}

// A gradient in t's sizes, or an empty tensor [0] where it is not wanted.
Tensor grad_of(const Tensor& t, bool wanted, at::MemoryFormat format) {
  return wanted ? empty(t.sym_sizes(), t, t.scalar_type(), format)
                : empty({SymInt(0)}, t, t.scalar_type());
}

Tensor grad_of(const OptTensor& t, bool wanted, const Tensor& like) {
  return grad_of(t ? *t : like, wanted && t, at::MemoryFormat::Contiguous);
}

// A [N, S, C] tensor of the accumulation type.
template <class Problem>
Tensor branch_vector(const Problem& p, const Tensor& like) {
  return empty({p.N, SymInt(p.S), p.C}, like, p.acc);
}

// ---- the attention step ----

Forward attention(
    at::TensorList feats, const SEWeights& se, bool /*reversed*/, const OptTensor& pooled,
    const Epilogue& epilogue) {
  const auto p = check_arguments<SymInt>("psa_attention", feats, se, pooled, epilogue);
  return {
      empty({p.N, p.C * p.S, p.H, p.W}, feats[0], p.dtype, common_layout<SymInt>(feats)),
      branch_vector(p, feats[0]), branch_vector(p, feats[0])};
}

Backward attention_backward(
    const OptTensor& grad_out, const OptTensor& grad_attention, at::TensorList feats,
    const SEWeights& se, const Tensor& pooled, const Tensor& attention, bool /*reversed*/,
    c10::List<bool> output_mask) {
  const auto p = check_backward_arguments<SymInt>(
      "psa_attention_backward", feats, se, {grad_out, grad_attention, pooled, attention},
      output_mask);
  const at::MemoryFormat format = common_layout<SymInt>(feats);
  std::vector<Tensor> grad_feats;
  for (int64_t s = 0; s < p.S; ++s) {
    grad_feats.push_back(grad_of(feats[s], output_mask.get(s), format));
  }
  const auto weight = [&](const OptTensor& w, int64_t i) {
    return grad_of(w, output_mask.get(p.S + i), se.fc1_weight);
  };
  return {
      std::move(grad_feats), weight(se.fc1_weight, 0), weight(se.fc1_bias, 1),
      weight(se.fc2_weight, 2), weight(se.fc2_bias, 3)};
}

// ---- the convolutions ----

ConvForward conv(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const ConvBias& bias) {
  const auto p = check_conv_arguments<SymInt>("spc_conv", x, weights, k);
  check_bias("spc_conv", x, bias, p);
  const at::MemoryFormat format = conv_layout<SymInt>(x);
  std::vector<Tensor> feats;
  for (int64_t s = 0; s < p.S; ++s) {
    feats.push_back(empty({p.N, p.C, p.out_h, p.out_w}, x, p.dtype, format));
  }
  return {std::move(feats), branch_vector(p, x)};
}

ConvBackward conv_grads(
    const Tensor& x, at::TensorList weights, const c10::List<bool>& output_mask) {
  std::vector<Tensor> grad_weights;
  for (size_t s = 0; s < weights.size(); ++s) {
    grad_weights.push_back(
        output_mask.get(s + 1) ? at::empty_like(weights[s])
                               : grad_of(weights[s], false, at::MemoryFormat::Contiguous));
  }
  return {grad_of(x, output_mask.get(0), conv_layout<SymInt>(x)), std::move(grad_weights)};
}

ConvBackward conv_backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    c10::List<bool> output_mask) {
  const char* op = "spc_conv_backward";
  const auto p = check_conv_arguments<SymInt>(op, x, weights, k);
  check_conv_backward_arguments(op, grad_feats, x, p, output_mask);
  return conv_grads(x, weights, output_mask);
}

// ---- the whole module ----

template <class Problem>
Tensor module_output(const Problem& p, const Tensor& x) {
  return empty({p.N, p.C * p.S, p.out_h, p.out_w}, x, p.dtype, conv_layout<SymInt>(x));
}

Tensor module_forward(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool /*reversed*/, const OptTensor& packed, const Epilogue& epilogue, const ConvBias& bias) {
  const auto p = check_module_arguments<SymInt>("psa_forward", x, weights, k, se);
  check_packed("psa_forward", x, packed);
  check_bias("psa_forward", x, bias, p.conv);
  check_epilogue({"psa_forward", x.device(), "x"}, epilogue, p.attention);
  return module_output(p.conv, x);
}

Forward save_output(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool /*reversed*/) {
  const auto p = check_module_arguments<SymInt>("psa_save_output", x, weights, k, se);
  return {module_output(p.conv, x), branch_vector(p.conv, x), branch_vector(p.conv, x)};
}

ModuleBackward save_output_backward(
    const Tensor& grad_out, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const Tensor& out, const Tensor& pooled, const Tensor& attention,
    bool /*reversed*/, c10::List<bool> output_mask) {
  const OptTensor grad(grad_out), no_grad;
  check_module_backward_arguments<SymInt>(
      "psa_save_output_backward", x, weights, k, se, {grad, no_grad, pooled, attention}, out,
      output_mask);
  auto [grad_x, grad_weights] = conv_grads(x, weights, output_mask);
  const auto weight = [&](const OptTensor& w, size_t i) {
    return grad_of(w, output_mask.get(weights.size() + 1 + i), se.fc1_weight);
  };
  return {
      grad_x,
      std::move(grad_weights),
      weight(se.fc1_weight, 0),
      weight(se.fc1_bias, 1),
      weight(se.fc2_weight, 2),
      weight(se.fc2_bias, 3)};
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, Meta, m) {
  m.impl("_psa_attention_meta", flat<attention>());
  m.impl("_psa_attention_backward_meta", flat<attention_backward>());
  m.impl("_spc_conv_meta", flat<conv>());
  m.impl("_spc_conv_backward_meta", flat<conv_backward>());
  m.impl("_psa_forward_meta", flat<module_forward>());
  m.impl("_psa_save_output_meta", flat<save_output>());
  m.impl("_psa_save_output_backward_meta", flat<save_output_backward>());
}

}  // namespace epsa
