// The parameters of the grouped convolutions' kernels: addresses, strides and sizes.
#pragma once

#include "cuda/conv_plan.h"

namespace epsa::cuda {

struct ConvBranch {
  const void* weight;  // [C', I, k, k]
  int64_t stride[4];   // its strides in elements
  const void* bias;    // [C'], or null
  void* packed;        // [units, chunks, k, steps, wide, 32 lanes] of 8 bytes
  int64_t first;       // of the branch among all packed entries
  void* out;           // [N, C', H, W], channels_last
  ConvUnit unit;
  int inputs, outputs;  // channels of a group
  int units;            // of a slab
  int parts;            // passes of a unit
  int run, hop;
};

struct ConvParams {
  const void* x;  // [N, C, H, W], channels_last
  int samples, height, width, channels, outputs;
  int tile_h, tile_w, images, slab, rows, row, plane, tiles_y, tiles_x;
  int branches;
  int64_t entries;  // of all packed weights
  ConvBranch branch[kMaxBranches];
};

// Fills in what the plan knows. The caller adds addresses and strides.
void set_conv_plan(ConvParams& params, const ConvProblem& problem, const ConvPlan& plan);

}  // namespace epsa::cuda
