// Argument checks and layouts of spc.h.
#include "ops/attention.h"
#include "ops/conv.h"

#include <c10/util/Exception.h>

#include <limits>

namespace epsa {
namespace {

void check_count(const char* op, const char* name, size_t given, int64_t S) {
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(given) == S, op, ": ", name, " has ", given,
      " entries, expected ", S, ", one for each of the weights");
}

// Beyond this the sizes of an image's padding could not be computed.
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

void check_range(
    const char* op, const char* name, int64_t s, int64_t given, int64_t least) {
  TORCH_CHECK_VALUE(
      given >= least, op, ": ", name, "[", s, "] is ", given,
      ", expected at least ", least);
  TORCH_CHECK_VALUE(
      given <= kMost, op, ": ", name, "[", s, "] is ", given,
      ", expected at most ", kMost);
}

int64_t out_size(
    int64_t size, int64_t kernel, int64_t stride, int64_t padding,
    int64_t dilation) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

}  // namespace

void check_spc_counts(const char* op, int64_t S, const SpcSettings& settings) {
  TORCH_CHECK_VALUE(
      S >= 1 && S <= kMaxBranches, op, ": weights has ", S,
      " branches, expected 1 to ", kMaxBranches);
  check_count(op, "groups", settings.groups.size(), S);
  check_count(op, "padding", settings.padding.size(), S);
  check_count(op, "dilation", settings.dilation.size(), S);
}

void check_spc_backward_counts(
    const char* op, int64_t S, at::TensorList grad_feats,
    const c10::List<bool>& output_mask) {
  check_count(op, "grad_feats", grad_feats.size(), S);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(output_mask.size()) == S + 1, op,
      ": output_mask has ", output_mask.size(), " entries, expected ", S + 1,
      " (x and the weights)");
}

SpcProblem check_spc_arguments(
    const char* op, const at::Tensor& x, at::TensorList weights,
    const SpcSettings& settings) {
  const int64_t S = static_cast<int64_t>(weights.size());
  check_spc_counts(op, S, settings);
  TORCH_CHECK_VALUE(
      x.dim() == 4, op, ": x has shape ", x.sizes(),
      ", expected 4 dimensions [N, C, H, W]");
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
          dtype == at::kHalf,
      op, ": x has dtype ", dtype, ", expected Float, Double, BFloat16 or Half");
  TORCH_CHECK_VALUE(
      x.size(1) >= 1 && x.size(2) >= 1 && x.size(3) >= 1, op, ": x has shape ",
      x.sizes(),
      ", expected at least one channel and a spatial size of at least 1 x 1 "
      "(only the batch may be empty)");
  TORCH_CHECK_VALUE(
      settings.stride >= 1, op, ": stride is ", settings.stride,
      ", expected at least 1");

  SpcProblem p{};
  p.N = x.size(0);
  p.in_channels = x.size(1);
  p.H = x.size(2);
  p.W = x.size(3);
  p.S = S;
  p.dtype = dtype;
  p.acc = accumulation_type(dtype);
  for (int64_t s = 0; s < S; ++s) {
    const at::Tensor& w = weights[s];
    const int64_t groups = settings.groups[s];
    check_range(op, "groups", s, groups, 1);
    check_range(op, "padding", s, settings.padding[s], 0);
    check_range(op, "dilation", s, settings.dilation[s], 1);
    TORCH_CHECK_VALUE(
        w.dim() == 4, op, ": weights[", s, "] has shape ", w.sizes(),
        ", expected 4 dimensions [C, in_channels / groups, kernel_h, kernel_w]");
    TORCH_CHECK(
        w.device() == x.device(), op, ": weights[", s, "] is on ", w.device(),
        ", expected ", x.device(), ", the device of x");
    TORCH_CHECK_TYPE(
        w.scalar_type() == dtype, op, ": weights[", s, "] has dtype ",
        w.scalar_type(), ", expected ", dtype, ", the dtype of x");
    TORCH_CHECK_VALUE(
        w.numel() > 0, op, ": weights[", s, "] has shape ", w.sizes(),
        ", expected no empty dimension");
    TORCH_CHECK_VALUE(
        p.in_channels % groups == 0 && w.size(1) == p.in_channels / groups, op,
        ": weights[", s, "] has shape ", w.sizes(), ", expected ",
        p.in_channels, " / ", groups, " channels in its second dimension: x has ",
        p.in_channels, " channels and groups[", s, "] is ", groups);
    TORCH_CHECK_VALUE(
        w.size(0) % groups == 0, op, ": weights[", s, "] has shape ", w.sizes(),
        ", expected a multiple of groups[", s, "] = ", groups,
        " output channels");
    TORCH_CHECK_VALUE(
        w.size(0) == weights[0].size(0), op, ": weights[", s, "] has shape ",
        w.sizes(), ", expected ", weights[0].size(0),
        " output channels, as weights[0] has");
    const int64_t h = out_size(
        p.H, w.size(2), settings.stride, settings.padding[s],
        settings.dilation[s]);
    const int64_t wide = out_size(
        p.W, w.size(3), settings.stride, settings.padding[s],
        settings.dilation[s]);
    TORCH_CHECK_VALUE(
        h >= 1 && wide >= 1, op, ": the output of branch ", s,
        " would be empty: x is ", p.H, " x ", p.W, " with padding ",
        settings.padding[s], ", the kernel ", w.size(2), " x ", w.size(3),
        " with dilation ", settings.dilation[s],
        "; expected an output of at least 1 x 1");
    if (s == 0) {
      p.C = w.size(0);
      p.out_h = h;
      p.out_w = wide;
    }
    TORCH_CHECK_VALUE(
        h == p.out_h && wide == p.out_w, op, ": the output of branch ", s,
        " is ", h, " x ", wide, ", expected ", p.out_h, " x ", p.out_w,
        ", that of branch 0");
  }
  return p;
}

void check_spc_backward_arguments(
    const char* op, at::TensorList grad_feats, const at::Tensor& x,
    const SpcProblem& p, const c10::List<bool>& output_mask) {
  check_spc_backward_counts(op, p.S, grad_feats, output_mask);
  const std::vector<int64_t> expected{p.N, p.C, p.out_h, p.out_w};
  for (int64_t s = 0; s < p.S; ++s) {
    const at::Tensor& g = grad_feats[s];
    TORCH_CHECK_VALUE(
        g.sizes() == at::IntArrayRef(expected), op, ": grad_feats[", s,
        "] has shape ", g.sizes(), ", expected ", at::IntArrayRef(expected));
    TORCH_CHECK_TYPE(
        g.scalar_type() == p.dtype, op, ": grad_feats[", s, "] has dtype ",
        g.scalar_type(), ", expected ", p.dtype, ", the dtype of x");
    TORCH_CHECK(
        g.device() == x.device(), op, ": grad_feats[", s, "] is on ",
        g.device(), ", expected ", x.device(), ", the device of x");
  }
}

void check_module_backward_arguments(
    const char* op, const at::Tensor& out, const SpcProblem& p,
    const c10::List<bool>& output_mask) {
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(output_mask.size()) == p.S + 5, op,
      ": output_mask has ", output_mask.size(), " entries, expected ", p.S + 5,
      " (x, the weights and the SE's four)");
  const std::vector<int64_t> expected{p.N, p.S * p.C, p.out_h, p.out_w};
  TORCH_CHECK_VALUE(
      out.sizes() == at::IntArrayRef(expected), op, ": out has shape ",
      out.sizes(), ", expected ", at::IntArrayRef(expected));
  TORCH_CHECK_TYPE(
      out.scalar_type() == p.dtype, op, ": out has dtype ", out.scalar_type(),
      ", expected ", p.dtype, ", the dtype of x");
}

at::MemoryFormat spc_layout(const at::Tensor& x) {
  for (const at::MemoryFormat format :
       {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast}) {
    if (is_native(x, format)) {
      return format;
    }
  }
  return x.suggest_memory_format();
}

}  // namespace epsa
