// The operators spc_conv and spc_prepack on the CPU.
#include "cpu/conv_forward.h"

#include <torch/library.h>

namespace epsa::cpu {
namespace {

Tensor library_forward(
    const SpcProblem& p, const Tensor& x, const Tensor& weight,
    const SpcSettings& k, int64_t s) {
  return at::convolution(
      in_acc(x, p), in_acc(weight, p), std::nullopt, {k.stride, k.stride},
      {k.padding[s], k.padding[s]}, {k.dilation[s], k.dilation[s]},
      /*transposed=*/false, /*output_padding=*/{0, 0}, k.groups[s]);
}

}  // namespace

SpcForward convolve(
    const ForwardBank& native, const SpcProblem& p, const Tensor& x_,
    at::TensorList weights, const SpcSettings& settings) {
  const at::MemoryFormat format = spc_layout(x_);
  Tensor pooled = at::detail::empty_cpu(
      {p.N, p.S, p.C}, p.acc, /*pin_memory=*/false,
      at::MemoryFormat::Contiguous);
  const Tensor x = is_image(x_) ? x_ : x_.contiguous(format);
  std::vector<Tensor> feats;
  bool any = false;
  for (int64_t s = 0; s < p.S; ++s) {
    if (native.has(s)) {
      any = true;
      feats.push_back(at::detail::empty_cpu(
          {p.N, p.C, p.out_h, p.out_w}, p.dtype, /*pin_memory=*/false, format));
      continue;
    }
    const Tensor f = library_forward(p, x, weights[s], settings, s);
    feats.push_back(settled(f, p.dtype, format));
    pooled.select(1, s).copy_(f.mean({2, 3}));
  }
  if (any && p.N > 0) {
    native.run(
        x, feats, pooled.mutable_data_ptr<float>(), [](int64_t, int64_t) {});
  }
  return {std::move(feats), std::move(pooled)};
}

namespace {

SpcForward spc_forward(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p = check_spc_arguments("spc_conv", x, weights, settings);
  const ForwardBank native("spc_conv", p, weights, settings);
  return convolve(native, p, x, weights, settings);
}

Tensor spc_prepack(
    const Tensor& x, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p = check_spc_arguments("spc_prepack", x, weights, settings);
  const ForwardBank native("spc_prepack", p, weights, settings);
  TORCH_CHECK_VALUE(
      native.has_any(), "spc_prepack: expected at least one convolution that has "
      "a kernel here, got none of ", p.S, " (dtype ", p.dtype, ", stride ",
      stride, "): there is nothing to pack");
  return native.prepack();
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("spc_conv", spc_forward);
  m.impl("spc_prepack", spc_prepack);
}

}  // namespace epsa::cpu
