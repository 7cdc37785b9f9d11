// A whole PSA module on the CPU: the convolutions and the attention step.
#include "cpu/attention.h"
#include "cpu/conv_forward.h"
#include "ops/groups.h"
#include "ops/maps.h"

#include <torch/library.h>

namespace epsa::cpu {
namespace {

using OptTensor = std::optional<Tensor>;

std::vector<Tensor> slots_of(const Tensor& out, int64_t branches, bool reversed) {
  const std::vector<Tensor> slots = out.chunk(branches, 1);
  std::vector<Tensor> of_branches;
  for (int64_t s = 0; s < branches; ++s) {
    of_branches.push_back(slots[glue::slot_of_branch(s, branches, reversed)]);
  }
  return of_branches;
}

// The slots, without a view of each, which would cost small calls time.
std::vector<Images> slot_images(const Tensor& out, int64_t branches, bool reversed) {
  const Images all = images_of(out);
  const int64_t channels = out.size(1) / branches;
  std::vector<Images> of_branches;
  for (int64_t s = 0; s < branches; ++s) {
    of_branches.push_back(all.from(channels * glue::slot_of_branch(s, branches, reversed)));
  }
  return of_branches;
}

// The convolutions write into the output's slots, their epilogue has the means,
// and each sample is reweighted in place while it is in the cache. A branch
// without a kernel here makes a map of its own.
epsa::Forward forward(
    const char* op, const Tensor& x, at::TensorList weights, const ConvSettings& settings,
    const SEWeights& se, bool reversed, const OptTensor& packed = std::nullopt,
    const Epilogue& epilogue = {}, const ConvBias& bias = kNoBias) {
  const ModuleProblem problem = check_module_arguments(op, x, weights, settings, se);
  check_packed(op, x, packed);
  check_epilogue({op, x.device(), "x"}, epilogue, problem.attention);
  const ConvProblem& p = problem.conv;
  check_bias(op, x, bias, p);
  const ForwardBank native(op, p, weights, settings, bias, packed);
  if (!native.has_all()) {
    const auto [feats, pooled] = convolve(native, p, x, weights, settings, bias);
    return attention_forward(problem.attention, feats, se, reversed, pooled, epilogue);
  }
  const at::MemoryFormat format = conv_layout(x);
  const auto empty = [](at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat layout) {
    return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, layout);
  };
  Tensor out = empty({p.N, p.S * p.C, p.out_h, p.out_w}, p.dtype, format);
  Tensor pooled = empty({p.N, p.S, p.C}, p.acc, at::MemoryFormat::Contiguous);
  Tensor attention = at::empty_like(pooled);
  if (p.N > 0) {
    const AttentionStep step(problem.attention, out, se, reversed, epilogue);
    float* means = pooled.mutable_data_ptr<float>();
    float* a = attention.mutable_data_ptr<float>();
    native.run(
        is_image(x) ? x : x.contiguous(format), slot_images(out, p.S, reversed), means,
        [&](int64_t n, int64_t threads) {
          step.run(n, means + n * p.S * p.C, a + n * p.S * p.C, threads);
        });
  }
  return {std::move(out), std::move(pooled), std::move(attention)};
}

Tensor psa_forward(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const OptTensor& packed, const Epilogue& epilogue, const ConvBias& bias) {
  return std::get<0>(forward("psa_forward", x, weights, k, se, reversed, packed, epilogue, bias));
}

epsa::Forward psa_save_output(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed) {
  return forward("psa_save_output", x, weights, k, se, reversed);
}

ModuleBackward psa_save_output_backward(
    const Tensor& grad_out, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const Tensor& out, const Tensor& pooled, const Tensor& attention,
    bool reversed, c10::List<bool> output_mask) {
  const OptTensor grad(grad_out), no_grad;
  const GradArguments grads{grad, no_grad, pooled, attention};
  const ModuleProblem p = check_module_backward_arguments(
      "psa_save_output_backward", x, weights, k, se, grads, out, output_mask);
  const int64_t S = p.conv.S;
  c10::List<bool> conv_mask, attention_mask;
  bool conv = false;
  for (int64_t i = 0; i < S + 1; ++i) {
    conv_mask.push_back(output_mask.get(i));
    conv |= output_mask.get(i);
  }
  for (int64_t i = 0; i < S + 4; ++i) {
    attention_mask.push_back(i < S ? conv : output_mask.get(i + 1));
  }
  auto [grad_feats, dw1, db1, dw2, db2] = attention_backward(
      p.attention, slots_of(out, S, reversed), se, grads, reversed, attention_mask,
      /*of_output=*/true);
  Tensor grad_x = at::empty({0}, x.options());
  std::vector<Tensor> grad_weights;
  if (conv) {
    std::tie(grad_x, grad_weights) = conv_backward(grad_feats, x, weights, k, conv_mask);
  } else {
    for (const Tensor& w : weights) {
      grad_weights.push_back(at::empty({0}, w.options()));
    }
  }
  return {grad_x, std::move(grad_weights), dw1, db1, dw2, db2};
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("psa_forward", flat<psa_forward>());
  m.impl("psa_save_output", flat<psa_save_output>());
  m.impl("psa_save_output_backward", flat<psa_save_output_backward>());
}

}  // namespace epsa::cpu
