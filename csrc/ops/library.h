// One branch's convolution and its gradients by torch's own convolution, in forms that
// are safe.
#pragma once

#include "ops/conv.h"

namespace epsa {

// The same convolution with stride 1 where the kernel is 1x1: of every stride-th pixel.
//
// torch's weight gradient of strided 1x1 convolutions reads and writes beyond its memory
// for channels_last images of few channels (torch 2.13 with oneDNN 3.12, AVX2, seen as wrong
// gradients and a corrupted heap). Its forward pass and input gradient are right.
struct LibraryConv {
  at::Tensor x;
  int64_t stride, padding;

  LibraryConv(const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k, int64_t s);
};

// Branch s, differentiable. `bias`: its own, [C].
at::Tensor library_conv(
    const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k, int64_t s,
    const std::optional<at::Tensor>& bias = std::nullopt);

// The gradients of x and of branch s's weight; undefined where they are not wanted.
std::pair<at::Tensor, at::Tensor> library_conv_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k,
    int64_t s, bool input_wanted, bool weight_wanted);

}  // namespace epsa
