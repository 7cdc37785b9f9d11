// The CPU kernels of the PSA attention step: plain structs and a table of functions per
// dtype and instruction set. No torch header.
//
// Every function works on one sample n. A caller may hand out the plan's units to threads
// as it likes: one unit makes each partial sum, and sums are combined by index.
#pragma once

#include <cstdint>

#include "cpu/attention_plan.h"
#include "cpu/isa.h"
#include "types.h"

namespace epsa::cpu {

// SE weights in the accumulation type. B is S, or 1 where all branches share them; a
// branch's stride is then 0. A null bias is zero.
struct Weights {
  const void* fc1;         // [B, r, C]
  const void* fc1_bias;    // [B, r]
  const void* fc2t;        // [B, r, C]: fc2 transposed, so that lanes run along C
  const void* fc2_bias;    // [B, C]
  int64_t matrix_stride;   // 0 or r * C
  int64_t hidden_stride;   // 0 or r
  int64_t channel_stride;  // 0 or C
};

// Gradients of the SE weights, in the accumulation type and the weights' own layout. Null:
// not wanted.
struct WeightGrads {
  void* fc1;       // [B, r, C]
  void* fc1_bias;  // [B, r]
  void* fc2;       // [B, C, r]
  void* fc2_bias;  // [B, C]
};

// Each `void*` to sums, vectors and weights points to the accumulation type.
struct Kernels {
  // Sums x, or x * y where y is not null, over the pixels of each unit in [begin, end).
  void (*reduce)(
      const Geometry&, const Maps& x, const Maps* y, void* partial, int64_t n, int64_t begin,
      int64_t end);
  // dst = x * mul + add for units [begin, end), or relu of it. mul and add are this sample's
  // [S, C]. A null add is zero; relu needs one.
  void (*scale)(
      const Geometry&, const Maps& x, const void* mul, const void* add, bool relu, const Maps& dst,
      int64_t n, int64_t begin, int64_t end);
  // Writes the means of the partial sums to pooled [S, C], then attention [S, C]. Where
  // partial is null, pooled is read only. hidden [S, r] is scratch.
  void (*gate)(
      const Geometry&, const Weights&, const void* partial, void* pooled, void* hidden,
      void* attention);
  // Reads the partial sums of grad_out * F, and grad_attention [S, C]; either may be null.
  // of_output: they are sums of grad_out * out instead. Writes hidden [S, r],
  // grad_v [S, C], grad_u [S, r], and grad_pooled [S, C] divided by the number of pixels.
  void (*gate_grad)(
      const Geometry&, const Weights&, const void* partial, bool of_output,
      const void* grad_attention, const void* pooled, const void* attention, void* hidden,
      void* grad_v, void* grad_u, void* grad_pooled);
  // Sums over N samples, and over the branches that share weights, for hidden units
  // [begin, end) of all B * r. A set's first hidden unit also does fc2's bias.
  void (*weight_grad)(
      const Geometry&, int64_t samples, bool shared, const void* pooled, const void* hidden,
      const void* grad_v, const void* grad_u, const WeightGrads&, int64_t begin, int64_t end);
};

// The kernels of one dtype. Throws std::runtime_error for an unknown dtype, and where `isa`
// is not built.
const Kernels& kernels(Dtype dtype, Isa isa);

}  // namespace epsa::cpu
