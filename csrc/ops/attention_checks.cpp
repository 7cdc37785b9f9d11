// Argument checks and layouts shared by the backends (psa.h).
#include "ops/attention.h"

#include <c10/util/Exception.h>

#include <string>

namespace epsa {
namespace {

bool is_half(at::ScalarType t) {
  return t == at::kHalf || t == at::kBFloat16;
}

// The sizes of a 1x1 convolution's weight without its two trailing ones.
at::IntArrayRef matrix_sizes(const at::Tensor& w) {
  const auto sizes = w.sizes();
  if (w.dim() >= 4 && w.dim() <= 5 && sizes.end()[-1] == 1 &&
      sizes.end()[-2] == 1) {
    return sizes.slice(0, w.dim() - 2);
  }
  return sizes;
}

void check_device(
    const char* op, const char* name, const at::Tensor& t,
    const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " is None, expected a Tensor");
  TORCH_CHECK(
      t.device() == like.device(), op, ": ", name, " is on ", t.device(),
      ", expected ", like.device(), ", the device of feats[0]");
}

void check_sizes(
    const char* op, const char* name, const at::Tensor& t,
    at::IntArrayRef expected, const char* meaning) {
  TORCH_CHECK_VALUE(
      t.sizes() == expected, op, ": ", name, " has shape ", t.sizes(),
      ", expected ", expected, " (", meaning, ")");
}

void check_weight(
    const char* op, const char* name, const at::Tensor& w, const Problem& p,
    const at::Tensor& like) {
  check_device(op, name, w, like);
  TORCH_CHECK_TYPE(
      w.scalar_type() == p.weight_dtype, op, ": ", name, " has dtype ",
      w.scalar_type(), ", expected ", p.weight_dtype,
      ", the dtype of fc1_weight (all SE weights must be alike)");
}

void check_bias(
    const char* op, const char* name, const std::optional<at::Tensor>& bias,
    int64_t length, const Problem& p, const at::Tensor& like) {
  if (!bias) {
    return;
  }
  check_weight(op, name, *bias, p, like);
  if (p.shared) {
    check_sizes(op, name, *bias, {length}, "SE weights shared by all branches");
  } else {
    check_sizes(op, name, *bias, {p.S, length}, "SE weights of each branch");
  }
}

}  // namespace

Problem check_arguments(
    const char* op, at::TensorList feats, const at::Tensor& fc1_weight,
    const std::optional<at::Tensor>& fc1_bias, const at::Tensor& fc2_weight,
    const std::optional<at::Tensor>& fc2_bias) {
  const int64_t S = static_cast<int64_t>(feats.size());
  TORCH_CHECK_VALUE(
      S >= kMinBranches && S <= kMaxBranches, op, ": feats has ", S,
      " branches, expected ", kMinBranches, " to ", kMaxBranches);
  const at::Tensor& first = feats[0];
  TORCH_CHECK_VALUE(
      first.dim() == 4, op, ": feats[0] has shape ", first.sizes(),
      ", expected 4 dimensions [N, C, H, W]");
  const at::ScalarType dtype = first.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || is_half(dtype), op,
      ": feats[0] has dtype ", dtype,
      ", expected Float, Double, BFloat16 or Half");
  for (int64_t s = 1; s < S; ++s) {
    TORCH_CHECK_VALUE(
        feats[s].sizes() == first.sizes(), op, ": feats[", s, "] has shape ",
        feats[s].sizes(), ", expected ", first.sizes(),
        ", the shape of feats[0]");
    TORCH_CHECK_TYPE(
        feats[s].scalar_type() == dtype, op, ": feats[", s, "] has dtype ",
        feats[s].scalar_type(), ", expected ", dtype, ", the dtype of feats[0]");
    TORCH_CHECK(
        feats[s].device() == first.device(), op, ": feats[", s, "] is on ",
        feats[s].device(), ", expected ", first.device(),
        ", the device of feats[0]");
  }

  Problem p{};
  p.N = first.size(0);
  p.S = S;
  p.C = first.size(1);
  p.H = first.size(2);
  p.W = first.size(3);
  p.dtype = dtype;
  check_device(op, "fc1_weight", fc1_weight, first);
  p.weight_dtype = fc1_weight.scalar_type();
  p.acc = accumulation_type(dtype);
  TORCH_CHECK_VALUE(
      p.C >= 1 && p.H >= 1 && p.W >= 1, op, ": feats[0] has shape ",
      first.sizes(),
      ", expected at least one channel and a spatial size of at least 1 x 1 "
      "(only the batch may be empty)");

  TORCH_CHECK_TYPE(
      p.weight_dtype == dtype ||
          (is_half(dtype) && p.weight_dtype == at::kFloat),
      op, ": fc1_weight has dtype ", p.weight_dtype, ", expected ", dtype,
      is_half(dtype) ? " or Float" : "", " beside features of ", dtype);
  check_weight(op, "fc2_weight", fc2_weight, p, first);

  const auto fc1 = matrix_sizes(fc1_weight);
  TORCH_CHECK_VALUE(
      (fc1.size() == 2 || (fc1.size() == 3 && fc1[0] == S)) &&
          fc1.end()[-1] == p.C && fc1.end()[-2] >= 1,
      op, ": fc1_weight has shape ", fc1_weight.sizes(),
      ", expected [r, C] or, one for each branch, [S, r, C] (two trailing "
      "dimensions of 1 are accepted) with S = ", S, ", C = ", p.C,
      " and at least one hidden unit r");
  p.shared = fc1.size() == 2;
  p.hidden = fc1.end()[-2];
  const auto fc2 = matrix_sizes(fc2_weight);
  const bool fc2_fits = p.shared
      ? fc2 == at::IntArrayRef({p.C, p.hidden})
      : fc2 == at::IntArrayRef({S, p.C, p.hidden});
  TORCH_CHECK_VALUE(
      fc2_fits, op, ": fc2_weight has shape ", fc2_weight.sizes(),
      ", expected ",
      p.shared ? "[C, r]" : "[S, C, r], since fc1_weight has a leading S axis,",
      " (two trailing dimensions of 1 are accepted) with S = ", S, ", C = ",
      p.C, " and r = ", p.hidden);
  check_bias(op, "fc1_bias", fc1_bias, p.hidden, p, first);
  check_bias(op, "fc2_bias", fc2_bias, p.C, p, first);
  return p;
}

void check_branch_vector(
    const char* op, const char* name, const at::Tensor& t, const Problem& p,
    const at::Tensor& like) {
  check_device(op, name, t, like);
  TORCH_CHECK_TYPE(
      t.scalar_type() == p.acc, op, ": ", name, " has dtype ", t.scalar_type(),
      ", expected ", p.acc, ", the accumulation type of ", p.dtype,
      " features");
  check_sizes(op, name, t, {p.N, p.S, p.C}, "[N, S, C]");
}

Problem check_backward_arguments(
    const char* op, const std::optional<at::Tensor>& grad_out,
    const std::optional<at::Tensor>& grad_attention, at::TensorList feats,
    const at::Tensor& fc1_weight, const std::optional<at::Tensor>& fc1_bias,
    const at::Tensor& fc2_weight, const std::optional<at::Tensor>& fc2_bias,
    const at::Tensor& pooled, const at::Tensor& attention,
    const c10::List<bool>& output_mask) {
  const Problem p =
      check_arguments(op, feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias);
  check_branch_vector(op, "pooled", pooled, p, feats[0]);
  check_branch_vector(op, "attention", attention, p, feats[0]);
  if (grad_out) {
    check_device(op, "grad_out", *grad_out, feats[0]);
    TORCH_CHECK_TYPE(
        grad_out->scalar_type() == p.dtype, op, ": grad_out has dtype ",
        grad_out->scalar_type(), ", expected ", p.dtype,
        ", the dtype of the features");
    check_sizes(
        op, "grad_out", *grad_out, {p.N, p.S * p.C, p.H, p.W},
        "[N, S*C, H, W]");
  }
  if (grad_attention) {
    check_branch_vector(op, "grad_attention", *grad_attention, p, feats[0]);
  }
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(output_mask.size()) == p.S + 4, op,
      ": output_mask has ", output_mask.size(), " entries, expected ", p.S + 4,
      ": one for each of ", p.S, " feats and of four weights");
  return p;
}

bool is_native(const at::Tensor& t, at::MemoryFormat format) {
  const auto size = t.sizes();
  const auto stride = t.strides();
  const int64_t C = size[1], H = size[2], W = size[3];
  if (format == at::MemoryFormat::Contiguous) {
    return (W == 1 || stride[3] == 1) && (H == 1 || stride[2] == W) &&
        (C == 1 || stride[1] == H * W);
  }
  return (C == 1 || stride[1] == 1) &&
      (H == 1 || W == 1 || stride[2] == W * stride[3]);
}

at::MemoryFormat common_layout(at::TensorList feats) {
  int64_t contiguous = 0, channels_last = 0;
  for (const at::Tensor& f : feats) {
    if (is_native(f, at::MemoryFormat::Contiguous)) {
      ++contiguous;
    } else if (is_native(f, at::MemoryFormat::ChannelsLast)) {
      ++channels_last;
    }
  }
  return channels_last > contiguous ? at::MemoryFormat::ChannelsLast
                                    : at::MemoryFormat::Contiguous;
}

}  // namespace epsa
