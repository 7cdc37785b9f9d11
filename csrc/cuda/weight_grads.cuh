// The gradients of the SE weights. The blocks that arrive last sum them over the
// samples.
#pragma once

#include "cuda/sums.cuh"

namespace epsa::cuda {

// One entry of the list of all the SE weights' gradients: fc1 [B, r, C], then fc2
// [B, C, r], fc1's bias [B, r], fc2's bias [B, C].
struct WeightGrad {
  void* tensor;       // the entry's tensor; null: not wanted
  int at;             // index in the tensor
  int unit, channel;  // in [B, r] and in [B, C]; a bias has one of them, else -1
  bool of_fc1;

  EPSA_DEVICE static int count(const Params& p) {
    const int sets = p.shared ? 1 : p.branches;
    return sets * (2 * p.hidden * p.channels + p.hidden + p.channels);
  }
  EPSA_DEVICE WeightGrad(const Params& p, int i) {
    const int sets = p.shared ? 1 : p.branches;
    const int C = p.channels, r = p.hidden;
    const int units = sets * r, matrix = units * C;
    unit = channel = -1;
    if (i < matrix) {
      at = i;
      unit = at / C;
      channel = unit / r * C + at % C;
      of_fc1 = true;
      tensor = p.grad_fc1;
    } else if (i < 2 * matrix) {
      at = i - matrix;
      channel = at / r;
      unit = channel / C * r + at % r;
      of_fc1 = false;
      tensor = p.grad_fc2;
    } else if (i < 2 * matrix + units) {
      unit = at = i - 2 * matrix;
      of_fc1 = true;
      tensor = p.grad_fc1_bias;
    } else {
      channel = at = i - 2 * matrix - units;
      of_fc1 = false;
      tensor = p.grad_fc2_bias;
    }
  }
};

template <class T>
EPSA_DEVICE void store_weight_grad(const Params& p, int i, Acc<T> sum) {
  const WeightGrad grad(p, i);
  if (grad.tensor) {
    store_weight<T>(p, grad.tensor, grad.at, sum);
  }
}

// The share of the rows [first, last) in gradient i, counted from sample `begin`.
// Where branches share the weights, every branch of a sample is a row. Otherwise a
// sample is one row.
template <class A>
EPSA_DEVICE A sum_weight_grad(const Params& p, int begin, int i, int first, int last) {
  const WeightGrad grad(p, i);
  if (!grad.tensor) {
    return 0;
  }
  const int C = p.channels, r = p.hidden;
  const int vector = p.branches * C, units = p.branches * r;
  const int64_t c_step = p.shared ? C : vector, r_step = p.shared ? r : units;
  const A* in_units = row_of<A>(grad.of_fc1 ? p.grad_u : p.hidden_units, begin, units);
  const A* in_channels = row_of<A>(grad.of_fc1 ? p.pooled : p.grad_v, begin, vector);
  in_units += grad.unit;
  in_channels += grad.channel;
  if (grad.channel < 0) {
    return sum_terms<A, 8>(first, last, [&](int row) { return in_units[row * r_step]; });
  }
  if (grad.unit < 0) {
    return sum_terms<A, 8>(first, last, [&](int row) { return in_channels[row * c_step]; });
  }
  return sum_terms<A, 4>(
      first, last, [&](int row) { return in_units[row * r_step] * in_channels[row * c_step]; });
}

// The block that has written sample n's hidden, grad_v and grad_u calls this. The
// last block of a group of samples sums the group. The last block of all sums the
// groups. No block waits.
template <class T>
EPSA_DEVICE void sum_weight_grads(const Params& p, int n, Message* message) {
  using A = Acc<T>;
  const int group = n / p.group;
  const int groups = (p.samples + p.group - 1) / p.group;
  const int begin = group * p.group;
  const int end = begin + p.group < p.samples ? begin + p.group : p.samples;
  if (!last_to_arrive(&p.groups_arrived[1 + group], end - begin, message)) {
    return;
  }
  const int count = WeightGrad::count(p);
  A* all = static_cast<A*>(p.group_sums);
  for_sums<A>(
      count, (end - begin) * (p.shared ? p.branches : 1),
      [&](int i, int first, int last) { return sum_weight_grad<A>(p, begin, i, first, last); },
      [&](int i, A sum) {
        if (groups == 1) {
          store_weight_grad<T>(p, i, sum);
        } else {
          row_of<A>(all, group, count)[i] = sum;
        }
      });
  if (groups == 1 || !last_to_arrive(&p.groups_arrived[0], groups, message)) {
    return;
  }
  for_sums<A>(
      count, groups,
      [&](int i, int first, int last) {
        return sum_terms<A, 8>(first, last, [&](int k) { return row_of<A>(all, k, count)[i]; });
      },
      [&](int i, A sum) { store_weight_grad<T>(p, i, sum); });
}

}  // namespace epsa::cuda
