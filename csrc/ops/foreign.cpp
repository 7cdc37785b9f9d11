#include "ops/foreign.h"

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

}  // namespace

bool is_foreign(const at::Tensor& t) {
  return foreign_kind(t) != nullptr;
}

void refuse_foreign(torch::Library& m, const std::string& name) {
  using c10::DispatchKey;
  for (const DispatchKey key :
       {DispatchKey::SparseCPU, DispatchKey::SparseCUDA, DispatchKey::SparseCsrCPU,
        DispatchKey::SparseCsrCUDA, DispatchKey::MkldnnCPU, DispatchKey::QuantizedCPU,
        DispatchKey::QuantizedCUDA, DispatchKey::NestedTensorCPU, DispatchKey::NestedTensorCUDA,
        // Autograd's kernels would ask a nested tensor for its sizes first.
        DispatchKey::AutogradNestedTensor}) {
    m.impl(
        name.c_str(), torch::dispatch(key, torch::CppFunction::makeFromBoxedFunction<&refuse>()));
  }
}

}  // namespace epsa
