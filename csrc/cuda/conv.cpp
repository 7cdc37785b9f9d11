// The convolutions and the whole module on CUDA devices. Grouped convolutions of 16-bit
// floats have a kernel of their own; torch's library computes the other branches and the gradients.
#include "ops/calls.h"
#include "ops/library.h"
#include "ops/maps.h"
#include "cuda/conv_launch.h"
#include "cuda/merged_groups.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/stack.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace epsa::cuda {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using TorchProblem = epsa::ConvProblem;

constexpr auto kLast = at::MemoryFormat::ChannelsLast;

// The branches that the kernel takes, and the plan for them.
struct Native {
  ConvProblem problem;
  std::vector<int64_t> branches;
  ConvPlan plan;
};

bool half(at::ScalarType type) {
  return type == at::kBFloat16 || type == at::kHalf;
}

Native native_branches(
    const TorchProblem& p, at::TensorList weights, const ConvSettings& k, int device) {
  Native native;
  constexpr int64_t kMost = std::numeric_limits<int>::max() / 16;
  const bool small = p.N <= kMost && p.H <= kMost && p.W <= kMost && p.in_channels <= kMost;
  if (!half(p.dtype) || !small || k.stride != 1 || p.N == 0 || p.H * p.W == 0) {
    return native;
  }
  const auto as_int = [](int64_t n) { return static_cast<int>(n); };
  native.problem = {as_int(p.N), as_int(p.H), as_int(p.W), as_int(p.in_channels), as_int(p.C), {}};
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t kernel = weights[s].size(2);
    const ConvShape shape{as_int(kernel), as_int(weights[s].size(1)), as_int(p.C / k.groups[s])};
    if (kernel == weights[s].size(3) && k.dilation[s] == 1 && 2 * k.padding[s] + 1 == kernel &&
        conv_supported(shape)) {
      native.branches.push_back(s);
      native.problem.branches.push_back(shape);
    }
  }
  std::vector<ConvShape>& shapes = native.problem.branches;
  while (!shapes.empty()) {
    if (std::optional<ConvPlan> plan = choose_conv_plan(native.problem, device)) {
      native.plan = *std::move(plan);
      break;
    }
    // The others may fit without the branch that wants most of a block.
    const auto widest = std::max_element(
        shapes.begin(), shapes.end(),
        [](const ConvShape& a, const ConvShape& b) { return a.inputs < b.inputs; });
    native.branches.erase(native.branches.begin() + (widest - shapes.begin()));
    shapes.erase(widest);
  }
  return native;
}

// The maps of the native branches, x in channels_last and dense.
void run(
    const Native& native, const Tensor& x, at::TensorList weights, const ConvBias& bias,
    std::vector<Tensor>& feats) {
  ConvParams params{};
  set_conv_plan(params, native.problem, native.plan);
  int64_t bytes = 0;
  for (const ConvUnit& unit : native.plan.units) {
    bytes += packed_bytes(unit, native.problem.outputs);
  }
  const Tensor packed = at::empty({bytes}, x.options().dtype(at::kByte));
  char* next = static_cast<char*>(packed.mutable_data_ptr());
  const Tensor biases = bias.value ? bias.value->contiguous() : Tensor();
  params.x = x.const_data_ptr();
  for (size_t i = 0; i < native.branches.size(); ++i) {
    const int64_t s = native.branches[i];
    const Tensor& weight = weights[s];
    Tensor& out = feats[s];
    out = at::empty({x.size(0), native.problem.outputs, x.size(2), x.size(3)}, x.options(), kLast);
    ConvBranch& b = params.branch[i];
    b.weight = weight.const_data_ptr();
    for (int d = 0; d < 4; ++d) {
      b.stride[d] = weight.stride(d);
    }
    if (biases.defined()) {
      b.bias = static_cast<const char*>(biases.const_data_ptr()) +
          s * native.problem.outputs * biases.element_size();
    }
    b.packed = next;
    next += packed_bytes(b.unit, native.problem.outputs);
    b.out = out.mutable_data_ptr();
  }
  convolve(
      native.plan, params, glue::dtype_of(x.scalar_type()),
      c10::cuda::getCurrentCUDAStream(x.device().index()).stream());
}

// The maps of all branches, [N, C, out_h, out_w] each. The kernel's are channels_last: so are
// then the others.
std::vector<Tensor> maps(
    const TorchProblem& p, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const ConvBias& bias) {
  std::vector<Tensor> feats(p.S);
  const Native native = native_branches(p, weights, k, x.device().index());
  Tensor image = x;
  if (!native.branches.empty()) {
    image = x.contiguous(kLast);
    if (reinterpret_cast<uintptr_t>(image.const_data_ptr()) % 16) {
      image = image.clone(kLast);  // the kernel copies 16 bytes at once
    }
    run(native, image, weights, bias, feats);
  }
  for (int64_t s = 0; s < p.S; ++s) {
    if (!feats[s].defined()) {
      feats[s] = library_conv(image, weights[s], k, s, bias.of(s, p.S));
    }
  }
  return feats;
}

ConvForward conv(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const ConvBias& bias) {
  const TorchProblem p = check_conv_arguments("spc_conv", x, weights, k);
  check_bias("spc_conv", x, bias, p);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::MemoryFormat format = conv_layout(x);
  std::vector<Tensor> feats = maps(p, x, weights, k, bias);
  std::vector<Tensor> means;
  for (Tensor& f : feats) {
    f = f.contiguous(format);
    means.push_back(at::mean(f, {2, 3}, /*keepdim=*/false, p.acc));
  }
  return {std::move(feats), at::stack(means, 1)};
}

ConvBackward conv_backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    c10::List<bool> output_mask) {
  const char* op = "spc_conv_backward";
  const TorchProblem p = check_conv_arguments(op, x, weights, k);
  check_conv_backward_arguments(op, grad_feats, x, p, output_mask);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor grad_x;
  std::vector<Tensor> grad_weights;
  for (int64_t s = 0; s < p.S; ++s) {
    const auto [input, weight] = (half(p.dtype) ? merged_conv_backward : library_conv_backward)(
        grad_feats[s], x, weights[s], k, s, output_mask.get(0), output_mask.get(s + 1));
    if (input.defined()) {
      grad_x = grad_x.defined() ? grad_x.add_(input) : input;
    }
    Tensor g =
        output_mask.get(s + 1) ? at::empty_like(weights[s]) : at::empty({0}, weights[s].options());
    if (weight.defined()) {
      if (g.strides() == weight.strides()) {
        g = weight;
      } else {
        g.copy_(weight);
      }
    }
    grad_weights.push_back(std::move(g));
  }
  grad_x = grad_x.defined() ? grad_x.contiguous(conv_layout(x)) : at::empty({0}, x.options());
  return {std::move(grad_x), std::move(grad_weights)};
}

Tensor module(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const OptTensor& packed, const Epilogue& epilogue, const ConvBias& bias) {
  const char* op = "psa_forward";
  const ModuleProblem p = check_module_arguments(op, x, weights, k, se);
  check_epilogue({op, x.device(), "x"}, epilogue, p.attention);
  check_bias(op, x, bias, p.conv);
  TORCH_CHECK_VALUE(
      !packed, op, ": packed: expected None on ", x.device().type(), ", got packed weights");
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<Tensor> feats = maps(p.conv, x, weights, k, bias);
  const Tensor out = std::get<0>(call_attention(feats, se, reversed, std::nullopt, epilogue));
  return out.contiguous(conv_layout(x));
}

}  // namespace

#ifndef EPSA_EMULATED
TORCH_LIBRARY_IMPL(epsa_fused, CUDA, m) {
  m.impl("spc_conv", flat<conv>());
  m.impl("spc_conv_backward", flat<conv_backward>());
  m.impl("psa_forward", flat<module>());
}
#endif

}  // namespace epsa::cuda
