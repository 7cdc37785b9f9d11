// The CPU kernels of the grouped convolutions: plain structs and a table of functions per
// dtype and instruction set. No torch header.
//
// The kernels convolve directly over a padded copy of one image, the scratch. All
// branches of a PSA module share it: each image is packed once, and each unit of the
// plans reads it.
#pragma once

#include <cstdint>

#include "cpu/conv_plan.h"
#include "types.h"

namespace epsa::cpu {

// An image, or a part of it, in memory; strides in elements. An image that is read has
// dense channels in a pixel, or dense pixels in a row.
struct Image {
  void* data;
  int64_t channel_stride, pixel_stride, row_stride;
};

// Weights [groups][oc][ic][kernel_h * kernel_w] in memory, strides in elements. At least
// one of tap_stride, in_stride and out_stride is 1, or dot's lanes are read one by one.
struct ConvWeights {
  void* data;
  int64_t group_stride, out_stride, in_stride, tap_stride;
  bool turned;  // read from the last tap to the first
  // Pairs: from a pair's first channel to its second. in_stride is from pair to pair.
  int64_t second = 0;
};

// Where convolve puts its sums: [rows][pixels][channels] of float.
struct Sums {
  float* data;  // of the unit's first channel
  int64_t row_stride, pixel_stride;
  bool add;  // to the sums that are there
};

// The kernels of one ConvMethod.
struct ConvMethodKernels {
  // Floats of scratch memory that a call of convolve needs.
  int64_t (*lane_floats)(const Conv&, const ConvPlan&);
  // Puts the weights of one unit into the order in which convolve reads them.
  void (*pack_weights)(
      const Conv&, const ConvPlan&, const ConvWeights&, int64_t unit, float* packed);
  // Sums one unit's output rows [begin, end) over the input channels of its group, from
  // `channel` on. Returns the first channel that it left out, or ic() at the end. It adds
  // to the sums where channel > 0.
  int64_t (*convolve)(
      const Conv&, const ConvPlan&, const Scratch&, const float* packed, int64_t unit,
      int64_t channel, int64_t begin, int64_t end, const Sums&, float* lanes);
};

struct ConvKernels {
  int lanes;  // L

  // Null functions for ConvMethod::library.
  ConvMethodKernels (*method)(ConvMethod);
  // Copies an image to the scratch with its padding: blocks [begin, end) of L channels, or
  // of L pairs. Returns false where it saw a value that is not finite; only the kernels of
  // pairs look.
  bool (*pack_image)(
      const Image& source, int64_t channels, int64_t width, const Scratch&, int64_t begin,
      int64_t end);
  // Copies sums, plus the channels' `bias` if it is not null, to the destination. If `totals`
  // is not null, it receives the sums over the pixels, which are not rounded to the dtype.
  void (*unpack)(
      const Sums&, int64_t channels, int64_t rows, int64_t width, const Image& destination,
      const float* bias, float* totals);
  // Adds one image's contribution to one unit's sums [taps][block][L].
  void (*weight_grad)(
      const Conv&, const WeightGradPlan&, const Scratch& x, const Scratch& grad, int64_t unit,
      float* sums);
  // Copies one unit's sums to the gradient.
  void (*unpack_weight_grad)(
      const Conv&, const WeightGradPlan&, int64_t unit, const float* sums,
      const ConvWeights& destination);
};

// The gradients of the weights by pairs of bfloat16 pixels. Plans, units and sums are those of
// ConvKernels. Both packings return what pack_image does. Denormal numbers are zeros, as in
// pair_kernels.
struct PixelPairKernels {
  // As pack_image, for a scratch as wide. A column holds its pixel of x beside the one `stride`
  // columns further.
  bool (*pack_x)(
      const Image& source, int64_t channels, int64_t width, int64_t stride, const Scratch&,
      int64_t begin, int64_t end);
  // As pack_image, for the output's gradient. A column holds two pixels, side by side.
  decltype(ConvKernels::pack_image) pack_grad;
  decltype(ConvKernels::weight_grad) weight_grad;
  decltype(ConvKernels::unpack_weight_grad) unpack_weight_grad;
};

// The gradients of the weights by matrix. pack_x and pack_grad pack blocks [begin, end) of
// L channels of one sample: x to `to`, the output's gradient to planes from `to` on, of
// which each channel has `moved`. They return what pack_image does.
struct MatrixGradKernels {
  bool (*pack_x)(
      const Image& source, int64_t channels, int64_t height, int64_t width, const PixelRuns&,
      int64_t begin, int64_t end, float* to);
  bool (*pack_grad)(
      const Image& source, int64_t channels, int64_t height, int64_t width, const PixelRuns&,
      int64_t moved, int64_t begin, int64_t end, float* to);
  // Adds the samples' contributions to one unit's sums [tiles][columns][L rows][L inputs]. x_step
  // and grad_step: floats from sample to sample.
  void (*multiply)(
      const Conv&, const PixelRuns&, const float* x, int64_t x_step, const float* grad,
      int64_t grad_step, int64_t samples, int64_t unit, float* sums);
  void (*unpack)(const Conv&, int64_t unit, const float* sums, const ConvWeights& destination);
};

// The kernels of one dtype in memory (f32, bf16 or f16); sums are float. Throws
// std::runtime_error for another dtype, and where `isa` is not built.
const ConvKernels& conv_kernels(Dtype dtype, Isa isa);

// The kernels of bfloat16 pairs. Where the others have a float of an input channel or
// weight, these have two bfloat16 channels; sums are float. They have no gradients of the
// weights, which pair pixels instead (below). Their products flush denormal numbers to zero.
// Throws std::runtime_error where `isa` has none.
const ConvKernels& pair_kernels(Isa isa);

// Throws std::runtime_error where `isa` has none.
const PixelPairKernels& pixel_pair_kernels(Isa isa);

// For amx_bf16 alone. Throws std::runtime_error for others.
const MatrixGradKernels& matrix_grad_kernels(Isa isa);

}  // namespace epsa::cpu
