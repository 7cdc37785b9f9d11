// Tensors without strided memory reach no kernel. Every operator refuses them by its argument's
// name, where the dispatcher would list its backends.
#include <torch/library.h>

#include <string>

namespace epsa {
namespace {

// Null: an ordinary tensor.
const char* foreign_kind(const at::Tensor& t) {
  return !t.defined()              ? nullptr
      : t.is_nested()              ? "nested"
      : t.is_quantized()           ? "quantized"
      : t.is_mkldnn()              ? "mkldnn"
      : t.layout() != at::kStrided ? "sparse"
                                   : nullptr;
}

void refuse(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = op.schema();
  const std::string caller = schema.name().substr(schema.name().find("::") + 2);
  const auto check = [&](const std::string& name, const at::Tensor& t) {
    const char* kind = foreign_kind(t);
    TORCH_CHECK_TYPE(
        !kind, caller, ": ", name, " is a ", kind, " tensor, expected one with strided memory");
  };
  const size_t count = schema.arguments().size();
  for (size_t i = 0; i < count; ++i) {
    const std::string& name = schema.arguments()[i].name();
    const c10::IValue& value = (*stack)[stack->size() - count + i];
    if (value.isTensor()) {
      check(name, value.toTensor());
    } else if (value.isTensorList()) {
      const c10::List<at::Tensor> tensors = value.toTensorList();
      for (size_t k = 0; k < tensors.size(); ++k) {
        check(name + "[" + std::to_string(k) + "]", tensors[k]);
      }
    }
  }
  TORCH_CHECK(false, caller, ": expected tensors with strided memory");
}

void refuse_all(torch::Library& m) {
  for (const char* name :
       {"psa_attention", "psa_attention_backward", "spc_conv", "spc_conv_backward", "spc_prepack",
        "psa_forward", "psa_save_output", "psa_save_output_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, SparseCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, SparseCUDA, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, SparseCsrCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, SparseCsrCUDA, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, MkldnnCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, QuantizedCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, QuantizedCUDA, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, NestedTensorCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(epsa_fused, NestedTensorCUDA, m) {
  refuse_all(m);
}
// Autograd's kernels would ask a nested tensor for its sizes first.
TORCH_LIBRARY_IMPL(epsa_fused, AutogradNestedTensor, m) {
  refuse_all(m);
}

}  // namespace epsa
