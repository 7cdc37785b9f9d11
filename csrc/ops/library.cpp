#include "ops/library.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/convolution_backward.h>

namespace epsa {

LibraryConv::LibraryConv(
    const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k, int64_t s)
    : x(x), stride(k.stride), padding(k.padding[s]) {
  if (stride > 1 && weight.sym_size(2) == 1 && weight.sym_size(3) == 1) {
    if (padding > 0) {
      this->x = at::constant_pad_nd(x, {padding, padding, padding, padding});
      padding = 0;
    }
    for (const int64_t axis : {2, 3}) {
      this->x = this->x.slice(axis, std::nullopt, std::nullopt, stride);
    }
    stride = 1;
  }
}

at::Tensor library_conv(
    const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k, int64_t s,
    const std::optional<at::Tensor>& bias) {
  const LibraryConv conv(x, weight, k, s);
  return at::conv2d(
      conv.x, weight, bias, {conv.stride, conv.stride}, {conv.padding, conv.padding},
      {k.dilation[s], k.dilation[s]}, k.groups[s]);
}

std::pair<at::Tensor, at::Tensor> library_conv_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k,
    int64_t s, bool input_wanted, bool weight_wanted) {
  const auto gradients = [&](const at::Tensor& of, int64_t stride, int64_t padding, bool input,
                             bool weights) {
    return at::convolution_backward(
        grad, of, weight, std::nullopt, {stride, stride}, {padding, padding},
        {k.dilation[s], k.dilation[s]}, /*transposed=*/false, /*output_padding=*/{0, 0},
        k.groups[s], {input, weights, false});
  };
  const LibraryConv conv(x, weight, k, s);
  if (!weight_wanted || conv.stride == k.stride) {
    auto [gx, gw, gb] = gradients(x, k.stride, k.padding[s], input_wanted, weight_wanted);
    return {gx, gw};
  }
  at::Tensor gx;
  if (input_wanted) {
    gx = std::get<0>(gradients(x, k.stride, k.padding[s], true, false));
  }
  return {gx, std::get<1>(gradients(conv.x, conv.stride, conv.padding, false, true))};
}

}  // namespace epsa
