// The attention step's argument checks, for numbers and for symbolic sizes.
#include "ops/attention.h"

#include <c10/util/Exception.h>

#include <iterator>
#include <string>

namespace epsa {
namespace {

// Types below float take float weights too.
bool is_half(at::ScalarType t) {
  return c10::elementSize(t) < sizeof(float);
}

// The sizes of a 1x1 convolution's weight without its two trailing ones.
template <class Int>
at::ArrayRef<Int> matrix_sizes(const at::Tensor& w) {
  const auto sizes = sizes_of<Int>(w);
  if (w.dim() >= 4 && w.dim() <= 5 && sizes.end()[-1] == 1 && sizes.end()[-2] == 1) {
    return sizes.slice(0, w.dim() - 2);
  }
  return sizes;
}

template <class Int>
void check_sizes(
    const Caller& caller, const char* name, const at::Tensor& t, at::ArrayRef<Int> expected,
    const char* meaning) {
  TORCH_CHECK_VALUE(
      sizes_of<Int>(t) == expected, caller.op, ": ", name, " has shape ", sizes_of<Int>(t),
      ", expected ", expected, " (", meaning, ")");
}

void check_weight(
    const Caller& caller, const char* name, const at::Tensor& w, at::ScalarType dtype) {
  check_device(caller, name, w);
  TORCH_CHECK_TYPE(
      w.scalar_type() == dtype, caller.op, ": ", name, " has dtype ", w.scalar_type(),
      ", expected ", dtype, ", the dtype of fc1_weight (all SE weights must be alike)");
}

template <class Int>
void check_bias(
    const Caller& caller, const char* name, const std::optional<at::Tensor>& bias,
    const Int& length, const ProblemOf<Int>& p) {
  if (!bias) {
    return;
  }
  check_weight(caller, name, *bias, p.weight_dtype);
  if (p.shared) {
    check_sizes<Int>(caller, name, *bias, {length}, "SE weights shared by all branches");
  } else {
    check_sizes<Int>(caller, name, *bias, {Int(p.S), length}, "SE weights of each branch");
  }
}

template <class Int>
void check_fc1(const Caller& caller, const at::Tensor& weight, ProblemOf<Int>& p) {
  const auto fc1 = matrix_sizes<Int>(weight);
  TORCH_CHECK_VALUE(
      (fc1.size() == 2 || (fc1.size() == 3 && fc1[0] == p.S)) && fc1.end()[-1] == p.C &&
          fc1.end()[-2] >= 1,
      caller.op, ": fc1_weight has shape ", sizes_of<Int>(weight),
      ", expected [r, C] or, one for each branch, [S, r, C] (two trailing "
      "dimensions of 1 are accepted) with S = ",
      p.S, ", C = ", p.C, " and at least one hidden unit r");
  p.shared = fc1.size() == 2;
  p.hidden = fc1.end()[-2];
}

template <class Int>
void check_fc2(const Caller& caller, const at::Tensor& weight, const ProblemOf<Int>& p) {
  const auto fc2 = matrix_sizes<Int>(weight);
  const Int expected[] = {Int(p.S), p.C, p.hidden};
  TORCH_CHECK_VALUE(
      fc2 == at::ArrayRef<Int>(expected).slice(p.shared ? 1 : 0), caller.op,
      ": fc2_weight has shape ", sizes_of<Int>(weight), ", expected ",
      p.shared ? "[C, r]" : "[S, C, r], since fc1_weight has a leading S axis,",
      " (two trailing dimensions of 1 are accepted) with S = ", p.S, ", C = ", p.C,
      " and r = ", p.hidden);
}

// Checks a [N, S, C] tensor of the accumulation type.
template <class Int>
void check_branch_vector(
    const Caller& caller, const char* name, const at::Tensor& t, const ProblemOf<Int>& p) {
  check_device(caller, name, t);
  TORCH_CHECK_TYPE(
      t.scalar_type() == p.acc, caller.op, ": ", name, " has dtype ", t.scalar_type(),
      ", expected ", p.acc, ", the accumulation type of ", p.dtype, " features");
  check_sizes<Int>(caller, name, t, {p.N, Int(p.S), p.C}, "[N, S, C]");
}

// The branches' maps alone.
template <class Int>
ProblemOf<Int> check_feats(const char* op, at::TensorList feats) {
  check_branches(op, "feats", static_cast<int64_t>(feats.size()));
  const at::Tensor& first = feats[0];
  const auto sizes = sizes_of<Int>(first);
  const at::ScalarType dtype = first.scalar_type();
  TORCH_CHECK_VALUE(
      first.dim() == 4, op, ": feats[0] has shape ", sizes, ", expected 4 dimensions [N, C, H, W]");
  TORCH_CHECK_TYPE(
      is_supported(dtype), op, ": feats[0] has dtype ", dtype, ", expected ", supported_dtypes());
  for (size_t s = 1; s < feats.size(); ++s) {
    TORCH_CHECK_VALUE(
        sizes_of<Int>(feats[s]) == sizes, op, ": feats[", s, "] has shape ",
        sizes_of<Int>(feats[s]), ", expected ", sizes, ", the shape of feats[0]");
    TORCH_CHECK_TYPE(
        feats[s].scalar_type() == dtype, op, ": feats[", s, "] has dtype ", feats[s].scalar_type(),
        ", expected ", dtype, ", the dtype of feats[0]");
    TORCH_CHECK(
        feats[s].device() == first.device(), op, ": feats[", s, "] is on ", feats[s].device(),
        ", expected ", first.device(), ", the device of feats[0]");
  }
  TORCH_CHECK_VALUE(
      sizes[1] >= 1 && sizes[2] >= 1 && sizes[3] >= 1, op, ": feats[0] has shape ", sizes,
      ", expected at least one channel and a spatial size of at least 1 x 1 "
      "(only the batch may be empty)");
  ProblemOf<Int> p;
  p.N = sizes[0];
  p.S = static_cast<int64_t>(feats.size());
  p.C = sizes[1];
  p.H = sizes[2];
  p.W = sizes[3];
  p.dtype = dtype;
  p.acc = accumulation_type(dtype);
  return p;
}

Caller caller_of(const char* op, at::TensorList feats) {
  return {op, feats[0].device(), "feats[0]"};
}

}  // namespace

bool is_supported(at::ScalarType dtype) {
  switch (dtype) {
#define EPSA_ENTRY(entry, type, torch_name, python_name) case at::ScalarType::torch_name:
    EPSA_DTYPES(EPSA_ENTRY)
#undef EPSA_ENTRY
    return true;
    default:
      return false;
  }
}

std::string supported_dtypes() {
#define EPSA_ENTRY(entry, type, torch_name, python_name) #torch_name,
  const char* const names[] = {EPSA_DTYPES(EPSA_ENTRY)};
#undef EPSA_ENTRY
  std::string all;
  for (const char* const& name : names) {
    all += &name == std::begin(names) ? "" : &name == std::end(names) - 1 ? " or " : ", ";
    all += name;
  }
  return all;
}

void check_device(const Caller& caller, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), caller.op, ": ", name, " is None, expected a Tensor");
  TORCH_CHECK(
      t.device() == caller.device, caller.op, ": ", name, " is on ", t.device(), ", expected ",
      caller.device, ", the device of ", caller.owner);
}

void check_branches(const char* op, const char* name, int64_t given) {
  TORCH_CHECK_VALUE(
      given >= kMinBranches && given <= kMaxBranches, op, ": ", name, " has ", given,
      " branches, expected ", kMinBranches, " to ", kMaxBranches);
}

template <class Int>
void check_weights(const Caller& caller, const SEWeights& se, ProblemOf<Int>& p) {
  check_device(caller, "fc1_weight", se.fc1_weight);
  p.weight_dtype = se.fc1_weight.scalar_type();
  TORCH_CHECK_TYPE(
      p.weight_dtype == p.dtype || (is_half(p.dtype) && p.weight_dtype == at::kFloat), caller.op,
      ": fc1_weight has dtype ", p.weight_dtype, ", expected ", p.dtype,
      is_half(p.dtype) ? " or Float" : "", " beside features of ", p.dtype);
  check_weight(caller, "fc2_weight", se.fc2_weight, p.weight_dtype);
  check_fc1(caller, se.fc1_weight, p);
  check_fc2(caller, se.fc2_weight, p);
  check_bias(caller, "fc1_bias", se.fc1_bias, p.hidden, p);
  check_bias(caller, "fc2_bias", se.fc2_bias, p.C, p);
}

template <class Int>
void check_grads(const Caller& caller, const GradArguments& grads, const ProblemOf<Int>& p) {
  check_branch_vector(caller, "pooled", grads.pooled, p);
  check_branch_vector(caller, "attention", grads.attention, p);
  if (grads.grad_out) {
    check_device(caller, "grad_out", *grads.grad_out);
    TORCH_CHECK_TYPE(
        grads.grad_out->scalar_type() == p.dtype, caller.op, ": grad_out has dtype ",
        grads.grad_out->scalar_type(), ", expected ", p.dtype, ", the dtype of the features");
    check_sizes<Int>(
        caller, "grad_out", *grads.grad_out, {p.N, p.C * p.S, p.H, p.W}, "[N, S*C, H, W]");
  }
  if (grads.grad_attention) {
    check_branch_vector(caller, "grad_attention", *grads.grad_attention, p);
  }
}

template <class Int>
void check_epilogue(const Caller& caller, const Epilogue& epilogue, const ProblemOf<Int>& p) {
  TORCH_CHECK_VALUE(
      epilogue.scale.has_value() == epilogue.shift.has_value(), caller.op, ": ",
      epilogue.scale ? "scale is given and shift is not" : "shift is given and scale is not",
      ", expected both or none");
  for (const auto& [name, t] : {std::pair("scale", &epilogue.scale), {"shift", &epilogue.shift}}) {
    if (!*t) {
      continue;
    }
    check_device(caller, name, **t);
    TORCH_CHECK_TYPE(
        (*t)->scalar_type() == p.acc, caller.op, ": ", name, " has dtype ", (*t)->scalar_type(),
        ", expected ", p.acc, ", the accumulation type of ", p.dtype, " features");
    check_sizes<Int>(caller, name, **t, {p.C * p.S}, "[S*C]");
  }
}

template <class Int>
ProblemOf<Int> check_arguments(
    const char* op, at::TensorList feats, const SEWeights& se,
    const std::optional<at::Tensor>& pooled, const Epilogue& epilogue) {
  ProblemOf<Int> p = check_feats<Int>(op, feats);
  const Caller caller = caller_of(op, feats);
  check_weights(caller, se, p);
  if (pooled) {
    check_branch_vector(caller, "pooled", *pooled, p);
  }
  check_epilogue(caller, epilogue, p);
  return p;
}

template <class Int>
ProblemOf<Int> check_backward_arguments(
    const char* op, at::TensorList feats, const SEWeights& se, const GradArguments& grads,
    const c10::List<bool>& output_mask) {
  ProblemOf<Int> p = check_feats<Int>(op, feats);
  const Caller caller = caller_of(op, feats);
  check_weights(caller, se, p);
  check_grads(caller, grads, p);
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(output_mask.size()) == p.S + 4, op, ": output_mask has ",
      output_mask.size(), " entries, expected ", p.S + 4, ": one for each of ", p.S,
      " feats and of four weights");
  return p;
}

#define EPSA_INSTANTIATE(Int)                                                            \
  template void check_weights(const Caller&, const SEWeights&, ProblemOf<Int>&);         \
  template void check_grads(const Caller&, const GradArguments&, const ProblemOf<Int>&); \
  template ProblemOf<Int> check_arguments(                                               \
      const char*, at::TensorList, const SEWeights&, const std::optional<at::Tensor>&,   \
      const Epilogue&);                                                                  \
  template void check_epilogue(const Caller&, const Epilogue&, const ProblemOf<Int>&);   \
  template ProblemOf<Int> check_backward_arguments(                                      \
      const char*, at::TensorList, const SEWeights&, const GradArguments&,               \
      const c10::List<bool>&);
EPSA_INSTANTIATE(int64_t)
EPSA_INSTANTIATE(c10::SymInt)
#undef EPSA_INSTANTIATE

}  // namespace epsa
