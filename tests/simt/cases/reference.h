// The attention step and its gradients in double, straight from the formulas.
#pragma once

#include <cmath>
#include <vector>

#include "cases/case.h"

namespace epsa::cuda {

// A value, and the size that it would have if no terms of its sums cancelled. The
// rounding errors of the accumulation type are in proportion to that size.
struct Number {
  double value = 0;
  double size = std::fabs(value);

  Number() = default;
  Number(double x) : value(x) {}
  Number(double x, double of) : value(x), size(of) {}
};
inline Number operator+(Number x, Number y) {
  return {x.value + y.value, x.size + y.size};
}
inline Number operator-(Number x, Number y) {
  return {x.value - y.value, x.size + y.size};
}
inline Number operator*(Number x, Number y) {
  return {x.value * y.value, x.size * y.size};
}
inline Number operator/(Number x, Number y) {
  return {x.value / y.value, x.size / std::fabs(y.value)};
}
inline void operator+=(Number& x, Number y) {
  x = x + y;
}
using Numbers = std::vector<Number>;

enum Tensor {
  kFeats,
  kPooled,
  kAttention,
  kOut,
  kGradOut,
  kGradAttention,
  kGradFeats,
  kFc1,
  kFc1Bias,
  kFc2,
  kFc2Bias,
  kScale,
  kShift,
  kGradFc1,
  kGradFc1Bias,
  kGradFc2,
  kGradFc2Bias,
  kTensors
};
inline const char* const kNames[] = {
    "feats",      "pooled",   "attention",     "out",      "grad_out",     "grad_attention",
    "grad_feats", "fc1",      "fc1_bias",      "fc2",      "fc2_bias",     "scale",
    "shift",      "grad_fc1", "grad_fc1_bias", "grad_fc2", "grad_fc2_bias"};

// By tensor: [N, S, C, M], [N, S, C] or a weight's shape in params.h. Empty where a
// case has no such tensor.
using Values = std::vector<Numbers>;

Values make_inputs(const Case& k);

// Fills in all results.
void reference(const Case& k, Values& v);

}  // namespace epsa::cuda
