// The operators on CUDA devices: allocation, layouts and the current stream around
// the launches. A call never synchronises and uses PyTorch's memory only, so that
// CUDA graphs can capture it.
#include "ops/groups.h"
#include "ops/maps.h"
#include "cuda/launch.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

namespace epsa::cuda {
namespace {

using namespace glue;
using at::Tensor;
using OptTensor = std::optional<Tensor>;

// Can every access to these maps have 16 bytes, if may_align() holds?
bool aligned(const Maps& maps, const Problem& p) {
  const int64_t size = element_size(p.dtype);
  const bool strided = p.layout == Layout::channels_last && p.pixels > 1;
  for (int s = 0; s < p.branches; ++s) {
    if (maps.data[s] &&
        (reinterpret_cast<uintptr_t>(maps.data[s]) % 16 ||
         (p.samples > 1 && maps.batch_stride[s] * size % 16) ||
         (strided && maps.pixel_stride[s] * size % 16))) {
      return false;
    }
  }
  return true;
}

Problem problem_of(const char* op, Pass pass, const epsa::Problem& p, at::MemoryFormat format) {
  const std::string error = size_error(p.N, p.S, p.C, p.pixels(), p.hidden, p.shared);
  TORCH_CHECK_VALUE(error.empty(), op, ": ", error);
  Problem problem{};
  problem.pass = pass;
  problem.samples = static_cast<int>(p.N);
  problem.branches = static_cast<int>(p.S);
  problem.channels = static_cast<int>(p.C);
  problem.pixels = static_cast<int>(p.pixels());
  problem.hidden = static_cast<int>(p.hidden);
  problem.shared = p.shared;
  problem.dtype = dtype_of(p.dtype);
  problem.layout = along_pixels(p, format) ? Layout::contiguous : Layout::channels_last;
  problem.aligned = may_align(problem.dtype, problem.layout, problem.channels, problem.pixels);
  return problem;
}

// The SE weights as the kernels read them: dense, in their own dtype.
struct DenseWeights {
  Tensor fc1, fc1_bias, fc2, fc2_bias;  // keep the memory alive

  DenseWeights(const epsa::Problem& p, const SEWeights& se, Params& params)
      : fc1(se.fc1_weight.contiguous()),
        fc1_bias(se.fc1_bias ? se.fc1_bias->contiguous() : Tensor()),
        fc2(se.fc2_weight.contiguous()),
        fc2_bias(se.fc2_bias ? se.fc2_bias->contiguous() : Tensor()) {
    params.half_weights = p.weight_dtype != p.acc;
    params.fc1 = fc1.const_data_ptr();
    params.fc1_bias = se.fc1_bias ? fc1_bias.const_data_ptr() : nullptr;
    params.fc2 = fc2.const_data_ptr();
    params.fc2_bias = se.fc2_bias ? fc2_bias.const_data_ptr() : nullptr;
  }
};

void run(const Problem& problem, Params& params, const Tensor& like) {
  const auto device = like.device().index();
  const Plan plan = choose_plan(problem, device);
  const Tensor memory =
      at::empty({workspace(problem, plan).bytes}, like.options().dtype(at::kByte));
  launch(
      problem, plan, params, memory.data_ptr(), c10::cuda::getCurrentCUDAStream(device).stream());
}

c10::SmallVector<Tensor, kMaxBranches> feats_in_layout(
    at::TensorList feats, at::MemoryFormat format) {
  c10::SmallVector<Tensor, kMaxBranches> result;
  for (const Tensor& f : feats) {
    result.push_back(in_layout(f, format));
  }
  return result;
}

Forward forward(
    at::TensorList feats_, const SEWeights& se, bool reversed, const OptTensor& pooled_in,
    const Epilogue& epilogue) {
  const char* op = "psa_attention";
  const epsa::Problem p = check_arguments(op, feats_, se, pooled_in, epilogue);
  const c10::cuda::CUDAGuard guard(feats_[0].device());
  const auto options = feats_[0].options().requires_grad(false);
  const at::MemoryFormat format = common_layout(feats_);
  Tensor out = at::empty({p.N, p.S * p.C, p.H, p.W}, options, format);
  Tensor pooled = pooled_in ? pooled_in->clone(at::MemoryFormat::Contiguous)
                            : at::empty({p.N, p.S, p.C}, options.dtype(p.acc));
  Tensor attention = at::empty({p.N, p.S, p.C}, options.dtype(p.acc));
  if (p.N == 0) {
    return {out, pooled, attention};
  }

  const auto feats = feats_in_layout(feats_, format);
  Params params{};
  params.feats = maps_of(feats);
  params.out = slots_of(out, p, format, reversed);
  params.pooled = pooled.mutable_data_ptr();
  params.attention = attention.mutable_data_ptr();
  const DenseWeights weights(p, se, params);
  const Tensor scale = epilogue.scale ? epilogue.scale->contiguous() : Tensor();
  const Tensor shift = epilogue.shift ? epilogue.shift->contiguous() : Tensor();
  params.scale = epilogue.scale ? scale.const_data_ptr() : nullptr;
  params.shift = epilogue.shift ? shift.const_data_ptr() : nullptr;
  params.reversed = reversed;
  params.relu = epilogue.relu;

  Problem problem = problem_of(op, Pass::forward, p, format);
  problem.epilogue = epilogue.any();
  problem.aligned &= aligned(params.feats, problem) && aligned(params.out, problem);
  problem.pooled_given = pooled_in.has_value();
  run(problem, params, feats_[0]);
  return {out, pooled, attention};
}

Backward backward(
    const OptTensor& grad_out_, const OptTensor& grad_attention_, at::TensorList feats_,
    const SEWeights& se, const Tensor& pooled_, const Tensor& attention_, bool reversed,
    c10::List<bool> output_mask) {
  const char* op = "psa_attention_backward";
  const GradArguments grads{grad_out_, grad_attention_, pooled_, attention_};
  const epsa::Problem p = check_backward_arguments(op, feats_, se, grads, output_mask);
  const c10::cuda::CUDAGuard guard(feats_[0].device());
  const auto options = feats_[0].options().requires_grad(false);
  const at::MemoryFormat format = common_layout(feats_);
  const bool zero = p.N == 0 || (!grad_out_ && !grad_attention_);
  const auto grad = [&](bool wanted, at::IntArrayRef sizes, at::ScalarType dtype,
                        at::MemoryFormat layout) {
    const Tensor t = wanted ? at::empty(sizes, options.dtype(dtype), layout)
                            : at::empty({0}, options.dtype(dtype));
    return zero ? t.zero_() : t;
  };
  bool any_feats = false, any_weights = false;
  std::vector<Tensor> grad_feats;
  for (int64_t s = 0; s < p.S; ++s) {
    const bool wanted = output_mask.get(s);
    any_feats |= wanted;
    grad_feats.push_back(grad(wanted, {p.N, p.C, p.H, p.W}, p.dtype, format));
  }
  const OptTensor given[] = {se.fc1_weight, se.fc1_bias, se.fc2_weight, se.fc2_bias};
  Tensor grad_weights[4];
  void* grad_data[4] = {};
  for (int i = 0; i < 4; ++i) {
    const bool wanted = output_mask.get(p.S + i) && given[i];
    any_weights |= wanted;
    grad_weights[i] = grad(
        wanted, wanted ? given[i]->sizes() : at::IntArrayRef(), p.weight_dtype,
        at::MemoryFormat::Contiguous);
    grad_data[i] = wanted ? grad_weights[i].mutable_data_ptr() : nullptr;
  }
  if (!zero && (any_feats || any_weights)) {
    const auto feats = feats_in_layout(feats_, format);
    const Tensor grad_out = grad_out_ ? in_layout(*grad_out_, format) : Tensor();
    const Tensor grad_attention = grad_attention_ ? grad_attention_->contiguous() : Tensor();
    const Tensor pooled = pooled_.contiguous();
    const Tensor attention = attention_.contiguous();

    Params params{};
    params.feats = maps_of(feats);
    params.pooled = data_of(pooled);
    params.attention = data_of(attention);
    if (grad_out_) {
      params.grad_out = slots_of(grad_out, p, format, reversed);
    }
    params.grad_attention = grad_attention_ ? grad_attention.const_data_ptr() : nullptr;
    params.grad_feats = wanted_maps(grad_feats, output_mask);
    params.grad_fc1 = grad_data[0];
    params.grad_fc1_bias = grad_data[1];
    params.grad_fc2 = grad_data[2];
    params.grad_fc2_bias = grad_data[3];
    const DenseWeights weights(p, se, params);

    Problem problem = problem_of(op, Pass::backward, p, format);
    problem.aligned &= aligned(params.feats, problem) && aligned(params.grad_out, problem) &&
        aligned(params.grad_feats, problem);
    problem.grad_out_given = grad_out_.has_value();
    problem.feats_wanted = any_feats;
    problem.weights_wanted = any_weights;
    run(problem, params, feats_[0]);
  }
  return {
      std::move(grad_feats), grad_weights[0], grad_weights[1], grad_weights[2], grad_weights[3]};
}

}  // namespace

#ifndef EPSA_EMULATED
TORCH_LIBRARY_IMPL(epsa_fused, CUDA, m) {
  m.impl("psa_attention", flat<forward>());
  m.impl("psa_attention_backward", flat<backward>());
}
#endif

}  // namespace epsa::cuda
