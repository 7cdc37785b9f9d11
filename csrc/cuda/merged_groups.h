// Gradients of grouped convolutions in fewer groups.
//
// cuDNN has kernels for tensor cores that a group of few channels leaves nearly empty. Groups are
// merged therefore: their weights are blocks on the diagonal of a wider weight, zeros beside them.
// The gradients differ by the order of sums only. A NaN or an infinity of the gradient may spread
// as NaN to the groups that are merged with its own.
#pragma once

#include "ops/library.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace epsa::cuda {

// How many neighbouring groups become one. Wider ones took longer on an H200, and more of them
// were not measured.
inline int64_t groups_to_merge(int64_t groups, int64_t inputs) {
  constexpr int64_t kMostInputs = 256, kMostGroups = 16;
  int64_t merged = std::min(groups, kMostGroups);
  while (merged > 1 && (groups % merged != 0 || merged * inputs > kMostInputs)) {
    --merged;
  }
  return merged;
}

// The weight's groups [merged groups, outputs, inputs, k, k, groups in each], and the same
// elements of the wider weight.
inline at::Tensor groups_of(const at::Tensor& weight, int64_t groups, int64_t merged) {
  return weight.unflatten(0, {groups / merged, merged, -1}).movedim(1, -1);
}
inline at::Tensor blocks_of(const at::Tensor& wide, int64_t groups, int64_t merged) {
  return wide.unflatten(0, {groups / merged, merged, -1})
      .unflatten(3, {merged, -1})
      .diagonal(0, 1, 3);
}

// library_conv_backward of branch s, in fewer groups.
inline std::pair<at::Tensor, at::Tensor> merged_conv_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const ConvSettings& k,
    int64_t s, bool input_wanted, bool weight_wanted) {
  const int64_t groups = k.groups[s], inputs = weight.size(1);
  const int64_t merged = groups_to_merge(groups, inputs);
  if (merged == 1) {
    return library_conv_backward(grad, x, weight, k, s, input_wanted, weight_wanted);
  }
  const at::Tensor wide = at::zeros(
      {weight.size(0), merged * inputs, weight.size(2), weight.size(3)},
      weight.options().memory_format(x.suggest_memory_format()));
  blocks_of(wide, groups, merged).copy_(groups_of(weight, groups, merged));
  ConvSettings fewer = k;
  std::vector<int64_t> counts = k.groups.vec();
  counts[s] = groups / merged;
  fewer.groups = counts;
  auto [input, grad_wide] =
      library_conv_backward(grad, x, wide, fewer, s, input_wanted, weight_wanted);
  if (!grad_wide.defined()) {
    return {input, grad_wide};
  }
  const at::Tensor own = at::empty_like(weight);
  groups_of(own, groups, merged).copy_(blocks_of(grad_wide, groups, merged));
  return {input, own};
}

}  // namespace epsa::cuda
