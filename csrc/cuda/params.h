// A kernel's parameters: addresses, strides and sizes. Plain data.
#pragma once

#include "cuda/plan.h"

namespace epsa::cuda {

struct LaunchCounter;  // elements.cuh

// `Acc` is the accumulation type: double for f64, else float.
struct Params {
  int samples;          // N
  int branches;         // S
  int channels;         // C, of one branch
  int pixels;           // M = H * W
  int hidden;           // r
  bool shared;          // one set of SE weights for all branches?
  bool half_weights;    // SE weights of the features' 16-bit type? else of Acc
  bool pooled_given;    // forward: `pooled` is an input
  bool grad_out_given;  // backward
  bool feats_wanted;    // backward
  bool weights_wanted;  // backward
  bool reversed;        // epilogue: are the output's slots in reversed order?
  bool relu;            // epilogue

  int cluster;
  int pieces;
  int lag;
  int group;
  Split split;
  int64_t partials;           // partial sums of one sample, streaming
  unsigned long long launch;  // this launch's number, see launch_number.h

  // SE weights, B = 1 where shared, else S. A null bias is zero.
  const void* fc1;       // [B, r, C]
  const void* fc1_bias;  // [B, r]
  const void* fc2;       // [B, C, r]
  const void* fc2_bias;  // [B, C]

  Maps feats;
  Maps out;         // forward: written
  void* pooled;     // [N, S, C] Acc: written by the forward unless given
  void* attention;  // [N, S, C] Acc: written by the forward
  // epilogue: [S*C] Acc in the order of the output's slots; null: one and zero
  const void* scale;
  const void* shift;

  Maps grad_out;
  const void* grad_attention;  // [N, S, C] Acc, or null
  Maps grad_feats;             // written
  void* grad_fc1;              // gradients of the weights, in their dtype; null: not wanted
  void* grad_fc1_bias;
  void* grad_fc2;
  void* grad_fc2_bias;

  // the workspace, see plan.h
  unsigned long long* ticket;
  unsigned* arrived;
  unsigned* ready;
  LaunchCounter* groups_arrived;
  void* partial;
  void* hidden_units;
  void* scratch;
  void* summands;
  void* grad_v;
  void* grad_u;
  void* grad_pooled;
  void* group_sums;
};

// Fills in the sizes, the pieces of the workspace and a new launch's number.
void set_plan(Params& params, const Problem& problem, const Plan& plan, void* workspace);

}  // namespace epsa::cuda
