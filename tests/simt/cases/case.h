// The table of cases: small problems that reach every branch of the kernels.
#pragma once

#include <string>
#include <vector>

#include "cuda/plan.h"

namespace epsa::cuda {

// How maps lie in memory.
enum class Storage {
  dense,   // each map by itself
  chunks,  // slices of one tensor
  gaps,    // slices of larger tensors that keep the alignment
  sliced,  // slices of larger tensors that begin at an odd element
};

struct Case {
  std::string name;
  int N, S, C, M, r;
  Dtype dtype = Dtype::f32;
  Layout layout = Layout::contiguous;
  bool half_weights = false;
  bool shared = true;
  bool fc1_bias = true, fc2_bias = true;
  bool reversed = true;
  Storage storage = Storage::dense;
  bool pooled_given = false;
  bool affine = false, relu = false;  // of the epilogue
  bool grad_out = true, grad_attention = true;
  unsigned feats_mask = ~0u, weights_mask = ~0u;  // the gradients asked for

  Dtype acc() const { return dtype == Dtype::f64 ? dtype : Dtype::f32; }
  Dtype weights() const { return half_weights ? dtype : acc(); }
  int sets() const { return shared ? 1 : S; }
};

std::vector<Case> all_cases();

// Does the case belong to the few that reach every branch between them?
bool is_quick(const Case& k);

// Is any of the parts in the text? No parts: true.
bool contains(const std::string& text, const std::vector<std::string>& parts);

}  // namespace epsa::cuda
