// A whole module's argument checks, for numbers and for symbolic sizes.
#include "ops/module.h"

#include <c10/util/Exception.h>

namespace epsa {

template <class Int>
ModuleProblemOf<Int> check_module_arguments(
    const char* op, const at::Tensor& x, at::TensorList weights, const ConvSettings& settings,
    const SEWeights& se) {
  check_branches(op, "weights", static_cast<int64_t>(weights.size()));
  ModuleProblemOf<Int> p;
  p.conv = check_conv_arguments<Int>(op, x, weights, settings);
  p.attention.N = p.conv.N;
  p.attention.S = p.conv.S;
  p.attention.C = p.conv.C;
  p.attention.H = p.conv.out_h;
  p.attention.W = p.conv.out_w;
  p.attention.dtype = p.conv.dtype;
  p.attention.acc = p.conv.acc;
  check_weights({op, x.device(), "x"}, se, p.attention);
  return p;
}

void check_packed(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& packed) {
  if (packed) {
    check_device({op, x.device(), "x"}, "packed", *packed);
    TORCH_CHECK_VALUE(
        packed->scalar_type() == at::kByte && packed->dim() == 1, op, ": packed has dtype ",
        packed->scalar_type(), " and shape ", packed->sym_sizes(),
        ", expected the bytes that spc_prepack returned");
  }
}

template <class Int>
ModuleProblemOf<Int> check_module_backward_arguments(
    const char* op, const at::Tensor& x, at::TensorList weights, const ConvSettings& settings,
    const SEWeights& se, const GradArguments& grads, const at::Tensor& out,
    const c10::List<bool>& output_mask) {
  const auto p = check_module_arguments<Int>(op, x, weights, settings, se);
  const auto& conv = p.conv;
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(output_mask.size()) == conv.S + 5, op, ": output_mask has ",
      output_mask.size(), " entries, expected ", conv.S + 5, " (x, the weights and the SE's four)");
  const Int sizes[] = {conv.N, conv.C * conv.S, conv.out_h, conv.out_w};
  const at::ArrayRef<Int> expected(sizes);
  const Caller caller{op, x.device(), "x"};
  check_device(caller, "out", out);
  TORCH_CHECK_VALUE(
      sizes_of<Int>(out) == expected, op, ": out has shape ", sizes_of<Int>(out), ", expected ",
      expected);
  TORCH_CHECK_TYPE(
      out.scalar_type() == conv.dtype, op, ": out has dtype ", out.scalar_type(), ", expected ",
      conv.dtype, ", the dtype of x");
  check_grads(caller, grads, p.attention);
  return p;
}

#define EPSA_INSTANTIATE(Int)                                                                 \
  template ModuleProblemOf<Int> check_module_arguments(                                       \
      const char*, const at::Tensor&, at::TensorList, const ConvSettings&, const SEWeights&); \
  template ModuleProblemOf<Int> check_module_backward_arguments(                              \
      const char*, const at::Tensor&, at::TensorList, const ConvSettings&, const SEWeights&,  \
      const GradArguments&, const at::Tensor&, const c10::List<bool>&);
EPSA_INSTANTIATE(int64_t)
EPSA_INSTANTIATE(c10::SymInt)
#undef EPSA_INSTANTIATE

}  // namespace epsa
