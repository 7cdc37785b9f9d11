// The gradients of the SE weights. The blocks that arrive last sum them over the
// samples.
#pragma once

#include "cuda/sums.cuh"

namespace epsa::cuda {

// One entry of the list of all the SE weights' gradients: fc1 [B, r, C], then fc2
// [B, C, r], fc1's bias [B, r], fc2's bias [B, C].
struct WeightGrad {
  void* tensor;  // the entry's tensor; null: not wanted
  int at;        // index in the tensor

  EPSA_DEVICE static int count(const Params& p) {
    const int sets = p.shared ? 1 : p.branches;
    return sets * (2 * p.hidden * p.channels + p.hidden + p.channels);
  }
  EPSA_DEVICE WeightGrad(const Params& p, int i) {
    const int units = (p.shared ? 1 : p.branches) * p.hidden, matrix = units * p.channels;
    if (i < matrix) {
      at = i;
      tensor = p.grad_fc1;
    } else if (i < 2 * matrix) {
      at = i - matrix;
      tensor = p.grad_fc2;
    } else if (i < 2 * matrix + units) {
      at = i - 2 * matrix;
      tensor = p.grad_fc1_bias;
    } else {
      at = i - 2 * matrix - units;
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

// What a sum over rows needs: the vectors of the group's samples, from sample `begin` on. Where
// branches share the weights, every branch of a sample is a row. Otherwise a sample is one row.
template <class A>
struct GradRows {
  const A* units;     // grad_u for fc1, the hidden units for fc2
  const A* channels;  // pooled for fc1, grad_v for fc2
  int unit_step, channel_step;

  EPSA_DEVICE GradRows(const Params& p, int begin, bool of_fc1) {
    const int vector = p.branches * p.channels, all = p.branches * p.hidden;
    units = row_of<A>(of_fc1 ? p.grad_u : p.hidden_units, begin, all);
    channels = row_of<A>(of_fc1 ? p.pooled : p.grad_v, begin, vector);
    unit_step = p.shared ? p.hidden : all;
    channel_step = p.shared ? p.channels : vector;
  }
};

// The gradient of bias entry i, counted from the first bias on, over the rows [first, last).
template <class A>
EPSA_DEVICE A sum_bias_grad(const Params& p, int begin, int i, int first, int last) {
  const int units = (p.shared ? 1 : p.branches) * p.hidden;
  const bool of_fc1 = i < units;
  if (!(of_fc1 ? p.grad_fc1_bias : p.grad_fc2_bias)) {
    return 0;
  }
  const GradRows<A> rows(p, begin, of_fc1);
  const A* at = of_fc1 ? rows.units + i : rows.channels + (i - units);
  const int64_t step = of_fc1 ? rows.unit_step : rows.channel_step;
  return sum_terms<A, 8>(first, last, [&](int row) { return at[row * step]; });
}

// Adds the products of one channel and of hidden units, `left` of which exist, over the rows
// [first_row, last_row).
template <class A, int kUnits>
EPSA_DEVICE void add_products(
    const GradRows<A>& from, int c, int unit, int left, int first_row, int last_row,
    A (&sum)[kUnits]) {
  constexpr int kRows = 4;
  const A* channel = from.channels + c + int64_t{first_row} * from.channel_step;
  const A* units = from.units + unit + int64_t{first_row} * from.unit_step;
#pragma unroll 1
  for (int row = first_row; row < last_row; row += kRows) {
    A x[kRows], u[kRows][kUnits];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const bool there = row + k < last_row;
      x[k] = there ? channel[k * from.channel_step] : A(0);
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        u[k][j] = there && j < left ? units[k * from.unit_step + j] : A(0);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        sum[j] += x[k] * u[k][j];
      }
    }
    channel += kRows * from.channel_step;
    units += kRows * from.unit_step;
  }
}

// The gradients of the matrices fc1 and fc2 over `rows` rows: put(i, sum) for each entry. A thread
// takes one channel and several hidden units, so that a row costs it few loads.
template <class A, class Put>
EPSA_DEVICE void sum_matrix_grads(const Params& p, int begin, int rows, const Put& put) {
  constexpr int kUnits = 2;
  const int sets = p.shared ? 1 : p.branches;
  const int C = p.channels, r = p.hidden;
  const int chunks = (r + kUnits - 1) / kUnits;
  const int tasks = sets * chunks * C;  // of one matrix
  const int lanes = lanes_of(2 * tasks, 1);
  const auto [first_row, last_row] = Run(rows, lanes);
  const int step = block_threads() / lanes;
  // The shuffles need all lanes of a warp to take the same turns.
  for (int first = 0; first < 2 * tasks; first += step) {
    const int task = first + thread_id() / lanes;
    const bool of_fc1 = task < tasks;
    const int c = task % C, unit = task / C % chunks * kUnits;
    const int set = task / C / chunks % sets;
    A sum[kUnits] = {};
    if (task < 2 * tasks && (of_fc1 ? p.grad_fc1 : p.grad_fc2)) {
      const GradRows<A> from(p, begin, of_fc1);
      add_products(from, set * C + c, set * r + unit, r - unit, first_row, last_row, sum);
    }
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      const A total = sum_lanes(sum[j], lanes);
      if (task < 2 * tasks && unit + j < r && thread_id() % lanes == 0) {
        const int at = of_fc1 ? (set * r + unit + j) * C + c : (set * C + c) * r + unit + j;
        put(of_fc1 ? at : sets * r * C + at, total);
      }
    }
  }
}

// Adds up the groups' sums, several entries at once.
template <class T>
EPSA_DEVICE void sum_groups(const Params& p, int groups, const Acc<T>* all, int64_t row) {
  using A = Acc<T>;
  constexpr int kVector = 16 / sizeof(A), kGroups = 4;
  const int count = WeightGrad::count(p);
  for (int i = thread_id() * kVector; i < count; i += block_threads() * kVector) {
    A sum[kVector] = {};
#pragma unroll 1
    for (int first = 0; first < groups; first += kGroups) {
      Pack<A, kVector> packs[kGroups] = {};
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (first + k < groups) {
          packs[k] = load<kVector>(all + (first + k) * row + i);
        }
      }
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        for (int v = 0; v < kVector; ++v) {
          sum[v] += packs[k].lane[v];
        }
      }
    }
    for (int v = 0; v < kVector; ++v) {
      if (i + v < count) {
        store_weight_grad<T>(p, i + v, sum[v]);
      }
    }
  }
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
  constexpr int kVector = 16 / sizeof(A);
  const int64_t row = (count + kVector - 1) / kVector * kVector;  // whole vectors, see plan.h
  A* all = static_cast<A*>(p.group_sums);
  const auto put = [&](int i, A sum) {
    if (groups == 1) {
      store_weight_grad<T>(p, i, sum);
    } else {
      all[group * row + i] = sum;
    }
  };
  const int rows = (end - begin) * (p.shared ? p.branches : 1);
  sum_matrix_grads<A>(p, begin, rows, put);
  const int sets = p.shared ? 1 : p.branches;
  const int matrices = 2 * sets * p.hidden * p.channels;
  for_sums<A>(
      count - matrices, rows,
      [&](int i, int first, int last) { return sum_bias_grad<A>(p, begin, i, first, last); },
      [&](int i, A sum) { put(matrices + i, sum); });
  if (groups > 1 && thread_id() < row - count) {
    all[group * row + count + thread_id()] = 0;  // the last vector is read whole
  }
  if (groups > 1 && last_to_arrive(&p.groups_arrived[0], groups, message)) {
    sum_groups<T>(p, groups, all, row);
  }
}

}  // namespace epsa::cuda
