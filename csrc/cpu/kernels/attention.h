// The CPU kernels of the PSA attention step: plain structs and a table of
// functions per element type and instruction set. No torch header.
//
// Every function works on one sample n. The maps are cut into units by their
// shape alone (Geometry), so a caller may hand out units to threads as it
// likes: each partial sum is made by one unit and is combined by index.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "types.h"

namespace epsa::cpu {

struct Geometry {
  int branches;  // S
  int64_t channels;  // C, of one branch
  int64_t pixels;  // M = H * W
  int64_t hidden;  // r
  Layout layout;
  // contiguous: a unit is `chunk` pixels of one plane, ordered (s, c, chunk).
  // channels_last: a unit is `chunk` pixels of all branches.
  int64_t chunk;
  int64_t chunks;

  int64_t units() const {
    return layout == Layout::contiguous ? branches * channels * chunks : chunks;
  }
  int64_t partials() const {  // partial sums of one sample
    return branches * channels * chunks;
  }
};

// SE weights in the accumulation type. A branch stride of 0 means that all
// branches share them. A null bias is zero.
struct Weights {
  const void* fc1;  // [B, r, C]
  const void* fc1_bias;  // [B, r]
  const void* fc2t;  // [B, r, C]: fc2 transposed, so that lanes run along C
  const void* fc2_bias;  // [B, C]
  int64_t matrix_stride;  // 0 or r * C
  int64_t hidden_stride;  // 0 or r
  int64_t channel_stride;  // 0 or C
};

// Gradients of the SE weights, in the accumulation type and in the weights' own
// layout; null where not wanted.
struct WeightGrads {
  void* fc1;  // [B, r, C]
  void* fc1_bias;  // [B, r]
  void* fc2;  // [B, C, r]
  void* fc2_bias;  // [B, C]
};

// All `void*` to sums, vectors and weights point to the accumulation type.
struct Kernels {
  // partial sums over pixels of x (y null) or of x * y, for units [begin, end)
  void (*reduce)(
      const Geometry&, const Maps& x, const Maps* y, void* partial, int64_t n,
      int64_t begin, int64_t end);
  // dst = x * mul (+ add), mul and add [S, C] of this sample, units [begin, end)
  void (*scale)(
      const Geometry&, const Maps& x, const void* mul, const void* add,
      const Maps& dst, int64_t n, int64_t begin, int64_t end);
  // partial -> pooled [S, C] (left as it is when partial is null) -> attention
  // [S, C]; hidden [S, r] is scratch
  void (*gate)(
      const Geometry&, const Weights&, const void* partial, void* pooled,
      void* hidden, void* attention);
  // partial sums of grad_out * F (may be null) and grad_attention [S, C] (may be
  // null) -> hidden [S, r], grad_v [S, C], grad_u [S, r], and
  // grad_pooled [S, C], already divided by the number of pixels
  void (*gate_grad)(
      const Geometry&, const Weights&, const void* partial, bool of_output,
      const void* grad_attention, const void* pooled, const void* attention,
      void* hidden, void* grad_v, void* grad_u, void* grad_pooled);
  // sums over N samples (and over the branches that share weights), for hidden
  // units [begin, end) of the B * r there are (the first of each set also does
  // fc2's bias)
  void (*weight_grad)(
      const Geometry&, int64_t samples, bool shared, const void* pooled,
      const void* hidden, const void* grad_v, const void* grad_u,
      const WeightGrads&, int64_t begin, int64_t end);
};

// How the maps are cut into units: by shape alone.
Geometry make_geometry(
    int branches, int64_t channels, int64_t pixels, int64_t hidden,
    Layout layout);

// The kernels of one element type. Throws std::runtime_error where `isa` is not
// built.
const Kernels& kernels(Dtype dtype, Isa isa);

}  // namespace epsa::cpu
