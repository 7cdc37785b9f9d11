// The CPU kernels of the grouped convolutions: plain structs and a table of
// functions per element type and instruction set. No torch header.
//
// Direct convolution over a padded copy of one image ("scratch"), which all
// branches of a PSA module share: each image is packed once, and each unit of the
// plan reads it.
#pragma once

#include <cstdint>

#include "cpu/conv_plan.h"
#include "cpu/kernels/attention.h"

namespace epsa::cpu {

// An image, or a part of it, in memory; strides in elements. Of one that is read,
// either the channels of a pixel or the pixels of a row are dense.
struct Image {
  void* data;
  int64_t channel_stride, pixel_stride, row_stride;
};

// Weights [groups][oc][ic][kernel_h * kernel_w] in memory, strides in elements: that
// of the taps or of the tensor's second dimension is 1.
struct ConvWeights {
  void* data;
  int64_t group_stride, out_stride, in_stride, tap_stride;
  bool turned;  // read from the last tap to the first
};

// Where convolve's sums go: [rows][pixels][channels] of float.
struct Sums {
  float* data;  // of the unit's first channel
  int64_t row_stride, pixel_stride;
  bool add;  // to what is there
};

struct ConvKernels {
  int lanes;  // L

  // floats of the scratch memory of a call of convolve
  int64_t (*lane_floats)(const Conv&, const ConvPlan&);
  // source -> the scratch with its padding, blocks of L channels [begin, end)
  void (*pack_image)(
      const Image& source, int64_t channels, int64_t width, const Scratch&,
      int64_t begin, int64_t end);
  // the weights of one unit, in the order in which they are used
  void (*pack_weights)(
      const Conv&, const ConvPlan&, const ConvWeights&, int64_t unit,
      float* packed);
  // The sums of one unit, output rows [begin, end), over the input channels of its
  // group from `channel` on to the one that it returns: ic() at the end. From
  // channels > 0 on it adds to the sums.
  int64_t (*convolve)(
      const Conv&, const ConvPlan&, const Scratch&, const float* packed,
      int64_t unit, int64_t channel, int64_t begin, int64_t end, const Sums&,
      float* lanes);
  // sums -> destination, and where `totals` is not null their sums over the
  // pixels, before any rounding
  void (*unpack)(
      const Sums&, int64_t channels, int64_t rows, int64_t width,
      const Image& destination, float* totals);
  // Adds to one unit's sums [taps][block][L] what one image contributes.
  void (*weight_grad)(
      const Conv&, const WeightGradPlan&, const Scratch& x, const Scratch& grad,
      int64_t unit, float* sums);
  // one unit's sums -> the gradient
  void (*unpack_weight_grad)(
      const Conv&, const WeightGradPlan&, int64_t unit, const float* sums,
      const ConvWeights& destination);
};

// The kernels of one element type in memory (f32, bf16, f16); sums are float.
const ConvKernels& conv_kernels(Dtype dtype, Isa isa);

}  // namespace epsa::cpu
