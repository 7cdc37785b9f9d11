#include "ops/calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace epsa {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

// An operator as a function of groups.
template <class Function>
class Operator;

template <class R, class... Args>
class Operator<R(Args...)> {
  template <class... Members>
  static auto find(const char* name, std::tuple<Members...>*) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<R(Members...)>();
  }
  using List = FlatList<Args...>;

  decltype(find(nullptr, static_cast<List*>(nullptr))) op_;

 public:
  explicit Operator(const char* name) : op_(find(name, static_cast<List*>(nullptr))) {}

  R operator()(Args... args) const {
    return std::apply(
        [&](auto&&... members) -> R {
          return op_.call(std::forward<decltype(members)>(members)...);
        },
        flat_list<Args...>(std::forward<Args>(args)...));
  }
};

}  // namespace

Forward call_attention(
    at::TensorList feats, const SEWeights& se, bool reversed, const OptTensor& pooled,
    const Epilogue& epilogue) {
  static const Operator<decltype(call_attention)> op("epsa_fused::psa_attention");
  return op(feats, se, reversed, pooled, epilogue);
}

Backward call_attention_backward(
    const OptTensor& grad_out, const OptTensor& grad_attention, at::TensorList feats,
    const SEWeights& se, const Tensor& pooled, const Tensor& attention, bool reversed,
    c10::List<bool> output_mask) {
  static const Operator<decltype(call_attention_backward)> op("epsa_fused::psa_attention_backward");
  return op(
      grad_out, grad_attention, feats, se, pooled, attention, reversed, std::move(output_mask));
}

ConvForward call_conv(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const ConvBias& bias) {
  static const Operator<decltype(call_conv)> op("epsa_fused::spc_conv");
  return op(x, weights, k, bias);
}

ConvBackward call_conv_backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    c10::List<bool> output_mask) {
  static const Operator<decltype(call_conv_backward)> op("epsa_fused::spc_conv_backward");
  return op(grad_feats, x, weights, k, std::move(output_mask));
}

Tensor call_module(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed, const OptTensor& packed, const Epilogue& epilogue, const ConvBias& bias) {
  static const Operator<decltype(call_module)> op("epsa_fused::psa_forward");
  return op(x, weights, k, se, reversed, packed, epilogue, bias);
}

Forward call_save_output(
    const Tensor& x, at::TensorList weights, const ConvSettings& k, const SEWeights& se,
    bool reversed) {
  static const Operator<decltype(call_save_output)> op("epsa_fused::psa_save_output");
  return op(x, weights, k, se, reversed);
}

ModuleBackward call_save_output_backward(
    const Tensor& grad_out, const Tensor& x, at::TensorList weights, const ConvSettings& k,
    const SEWeights& se, const Tensor& out, const Tensor& pooled, const Tensor& attention,
    bool reversed, c10::List<bool> output_mask) {
  static const Operator<decltype(call_save_output_backward)> op(
      "epsa_fused::psa_save_output_backward");
  return op(grad_out, x, weights, k, se, out, pooled, attention, reversed, std::move(output_mask));
}

}  // namespace epsa
