// The convolutions' argument checks, for numbers and for symbolic sizes.
#include "ops/conv.h"

#include <c10/util/Exception.h>

#include <limits>

namespace epsa {
namespace {

void check_count(const char* op, const char* name, size_t given, int64_t S) {
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(given) == S, op, ": ", name, " has ", given, " entries, expected ", S,
      ", one for each of the weights");
}

// Sums of larger settings could overflow.
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

void check_range(const char* op, const char* name, int64_t s, int64_t given, int64_t least) {
  TORCH_CHECK_VALUE(
      given >= least, op, ": ", name, "[", s, "] is ", given, ", expected at least ", least);
  TORCH_CHECK_VALUE(
      given <= kMost, op, ": ", name, "[", s, "] is ", given, ", expected at most ", kMost);
}

void check_settings(const char* op, int64_t S, const ConvSettings& settings) {
  TORCH_CHECK_VALUE(
      S >= 1 && S <= kMaxBranches, op, ": weights has ", S, " branches, expected 1 to ",
      kMaxBranches);
  check_count(op, "groups", settings.groups.size(), S);
  check_count(op, "padding", settings.padding.size(), S);
  check_count(op, "dilation", settings.dilation.size(), S);
}

// Checks x alone.
template <class Int>
ConvProblemOf<Int> check_x(const char* op, const at::Tensor& x) {
  const auto sizes = sizes_of<Int>(x);
  TORCH_CHECK_VALUE(
      x.dim() == 4, op, ": x has shape ", sizes, ", expected 4 dimensions [N, C, H, W]");
  TORCH_CHECK_TYPE(
      is_supported(x.scalar_type()), op, ": x has dtype ", x.scalar_type(), ", expected ",
      supported_dtypes());
  TORCH_CHECK_VALUE(
      sizes[1] >= 1 && sizes[2] >= 1 && sizes[3] >= 1, op, ": x has shape ", sizes,
      ", expected at least one channel and a spatial size of at least 1 x 1 "
      "(only the batch may be empty)");
  ConvProblemOf<Int> p;
  p.N = sizes[0];
  p.in_channels = sizes[1];
  p.H = sizes[2];
  p.W = sizes[3];
  p.dtype = x.scalar_type();
  p.acc = accumulation_type(p.dtype);
  return p;
}

// Checks weights[s] beside x and weights[0].
template <class Int>
void check_weight(
    const char* op, const at::Tensor& x, at::TensorList weights, int64_t s, int64_t groups,
    const ConvProblemOf<Int>& p) {
  const at::Tensor& w = weights[s];
  const auto sizes = sizes_of<Int>(w);
  TORCH_CHECK_VALUE(
      w.dim() == 4, op, ": weights[", s, "] has shape ", sizes,
      ", expected 4 dimensions [C, in_channels / groups, kernel_h, kernel_w]");
  TORCH_CHECK(
      w.device() == x.device(), op, ": weights[", s, "] is on ", w.device(), ", expected ",
      x.device(), ", the device of x");
  TORCH_CHECK_TYPE(
      w.scalar_type() == p.dtype, op, ": weights[", s, "] has dtype ", w.scalar_type(),
      ", expected ", p.dtype, ", the dtype of x");
  for (const Int& size : sizes) {
    TORCH_CHECK_VALUE(
        size > 0, op, ": weights[", s, "] has shape ", sizes, ", expected no empty dimension");
  }
  TORCH_CHECK_VALUE(
      p.in_channels % groups == 0 && sizes[1] == p.in_channels / groups, op, ": weights[", s,
      "] has shape ", sizes, ", expected ", p.in_channels, " / ", groups,
      " channels in its second dimension: x has ", p.in_channels, " channels and groups[", s,
      "] is ", groups);
  TORCH_CHECK_VALUE(
      sizes[0] % groups == 0, op, ": weights[", s, "] has shape ", sizes,
      ", expected a multiple of groups[", s, "] = ", groups, " output channels");
  const Int& channels = sizes_of<Int>(weights[0])[0];
  TORCH_CHECK_VALUE(
      sizes[0] == channels, op, ": weights[", s, "] has shape ", sizes, ", expected ", channels,
      " output channels, as weights[0] has");
}

// Checks the output of branch s; the first branch's sizes become p's.
template <class Int>
void check_output(
    const char* op, const at::Tensor& weight, const ConvSettings& settings, int64_t s,
    ConvProblemOf<Int>& p) {
  const auto sizes = sizes_of<Int>(weight);
  const int64_t padding = settings.padding[s], dilation = settings.dilation[s];
  const Int h = conv_out_size(p.H, sizes[2], settings.stride, padding, dilation);
  const Int w = conv_out_size(p.W, sizes[3], settings.stride, padding, dilation);
  TORCH_CHECK_VALUE(
      h >= 1 && w >= 1, op, ": the output of branch ", s, " would be empty: x is ", p.H, " x ", p.W,
      " with padding ", padding, ", the kernel ", sizes[2], " x ", sizes[3], " with dilation ",
      dilation, "; expected an output of at least 1 x 1");
  if (s == 0) {
    p.C = sizes[0];
    p.out_h = h;
    p.out_w = w;
  }
  TORCH_CHECK_VALUE(
      h == p.out_h && w == p.out_w, op, ": the output of branch ", s, " is ", h, " x ", w,
      ", expected ", p.out_h, " x ", p.out_w, ", that of branch 0");
}

}  // namespace

template <class Int>
ConvProblemOf<Int> check_conv_arguments(
    const char* op, const at::Tensor& x, at::TensorList weights, const ConvSettings& settings) {
  const int64_t S = static_cast<int64_t>(weights.size());
  check_settings(op, S, settings);
  ConvProblemOf<Int> p = check_x<Int>(op, x);
  TORCH_CHECK_VALUE(
      settings.stride >= 1, op, ": stride is ", settings.stride, ", expected at least 1");
  p.S = S;
  for (int64_t s = 0; s < S; ++s) {
    check_range(op, "groups", s, settings.groups[s], 1);
    check_range(op, "padding", s, settings.padding[s], 0);
    check_range(op, "dilation", s, settings.dilation[s], 1);
    check_weight(op, x, weights, s, settings.groups[s], p);
    check_output(op, weights[s], settings, s, p);
  }
  return p;
}

template <class Int>
void check_bias(
    const char* op, const at::Tensor& x, const ConvBias& bias, const ConvProblemOf<Int>& p) {
  if (!bias.value) {
    return;
  }
  const at::Tensor& b = *bias.value;
  const Int sizes[] = {p.S * p.C};
  const at::ArrayRef<Int> expected(sizes);
  check_device({op, x.device(), "x"}, "bias", b);
  TORCH_CHECK_TYPE(
      b.scalar_type() == p.dtype, op, ": bias has dtype ", b.scalar_type(), ", expected ", p.dtype,
      ", the dtype of x");
  TORCH_CHECK_VALUE(
      sizes_of<Int>(b) == expected, op, ": bias has shape ", sizes_of<Int>(b), ", expected ",
      expected, ", one entry for each output channel of each branch");
}

template <class Int>
void check_conv_backward_arguments(
    const char* op, at::TensorList grad_feats, const at::Tensor& x, const ConvProblemOf<Int>& p,
    const c10::List<bool>& output_mask) {
  check_count(op, "grad_feats", grad_feats.size(), p.S);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(output_mask.size()) == p.S + 1, op, ": output_mask has ",
      output_mask.size(), " entries, expected ", p.S + 1, " (x and the weights)");
  const Int sizes[] = {p.N, p.C, p.out_h, p.out_w};
  const at::ArrayRef<Int> expected(sizes);
  for (int64_t s = 0; s < p.S; ++s) {
    const at::Tensor& g = grad_feats[s];
    TORCH_CHECK_VALUE(
        sizes_of<Int>(g) == expected, op, ": grad_feats[", s, "] has shape ", sizes_of<Int>(g),
        ", expected ", expected);
    TORCH_CHECK_TYPE(
        g.scalar_type() == p.dtype, op, ": grad_feats[", s, "] has dtype ", g.scalar_type(),
        ", expected ", p.dtype, ", the dtype of x");
    TORCH_CHECK(
        g.device() == x.device(), op, ": grad_feats[", s, "] is on ", g.device(), ", expected ",
        x.device(), ", the device of x");
  }
}

#define EPSA_INSTANTIATE(Int)                                                      \
  template ConvProblemOf<Int> check_conv_arguments(                                \
      const char*, const at::Tensor&, at::TensorList, const ConvSettings&);        \
  template void check_bias(                                                        \
      const char*, const at::Tensor&, const ConvBias&, const ConvProblemOf<Int>&); \
  template void check_conv_backward_arguments(                                     \
      const char*, at::TensorList, const at::Tensor&, const ConvProblemOf<Int>&,   \
      const c10::List<bool>&);
EPSA_INSTANTIATE(int64_t)
EPSA_INSTANTIATE(c10::SymInt)
#undef EPSA_INSTANTIATE

}  // namespace epsa
