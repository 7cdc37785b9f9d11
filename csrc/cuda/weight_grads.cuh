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

// The vectors of a group's samples, of which the gradients are sums: each [samples, S, C] or
// [samples, S, r]. Addresses are computed where they are used: they would occupy registers.
template <class A>
struct GroupVectors {
  const Params& p;
  int begin, samples;
  const A* held;  // all four in shared memory, one after another; null: in device memory

  EPSA_DEVICE int vector() const { return p.branches * p.channels; }
  EPSA_DEVICE int units() const { return p.branches * p.hidden; }
  EPSA_DEVICE const A* pooled() const { return held ? held : row_of<A>(p.pooled, begin, vector()); }
  EPSA_DEVICE const A* grad_v() const {
    return held ? held + samples * vector() : row_of<A>(p.grad_v, begin, vector());
  }
  EPSA_DEVICE const A* hidden() const {
    return held ? held + 2 * samples * vector() : row_of<A>(p.hidden_units, begin, units());
  }
  EPSA_DEVICE const A* grad_u() const {
    return held ? held + samples * (2 * vector() + units()) : row_of<A>(p.grad_u, begin, units());
  }
};

// What a sum over rows needs. Where branches share the weights, every branch of a sample is a row.
// Otherwise a sample is one row.
template <class A>
struct GradRows {
  const A* units;     // grad_u for fc1, the hidden units for fc2
  const A* channels;  // pooled for fc1, grad_v for fc2
  int unit_step, channel_step;

  EPSA_DEVICE GradRows(const GroupVectors<A>& group, bool of_fc1) {
    const Params& p = group.p;
    units = of_fc1 ? group.grad_u() : group.hidden();
    channels = of_fc1 ? group.pooled() : group.grad_v();
    unit_step = p.shared ? p.hidden : p.branches * p.hidden;
    channel_step = p.shared ? p.channels : p.branches * p.channels;
  }
};

// The gradient of bias entry i, counted from the first bias on, over the rows [first, last).
template <class A>
EPSA_DEVICE A sum_bias_grad(const GroupVectors<A>& group, int i, int first, int last) {
  const Params& p = group.p;
  const int units = (p.shared ? 1 : p.branches) * p.hidden;
  const bool of_fc1 = i < units;
  if (!(of_fc1 ? p.grad_fc1_bias : p.grad_fc2_bias)) {
    return 0;
  }
  const GradRows<A> rows(group, of_fc1);
  const A* at = of_fc1 ? rows.units + i : rows.channels + (i - units);
  const int64_t step = of_fc1 ? rows.unit_step : rows.channel_step;
  return sum_terms<A, 8>(first, last, [&](int row) { return at[row * step]; });
}

// Adds the products of one channel and of hidden units, `left` of which exist, over the rows
// [first_row, last_row).
template <int kRows, class A, int kUnits>
EPSA_DEVICE void add_products(
    const GradRows<A>& from, int c, int unit, int left, int first_row, int last_row,
    A (&sum)[kUnits]) {
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
template <class A, int kRows, class Put>
EPSA_DEVICE void sum_matrix_grads(const GroupVectors<A>& group, int rows, const Put& put) {
  const Params& p = group.p;
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
      const GradRows<A> from(group, of_fc1);
      add_products<kRows>(from, set * C + c, set * r + unit, r - unit, first_row, last_row, sum);
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

// Copies the vectors of a group to `room` elements of shared memory, if they fit: each of them is
// read many times.
template <class A>
EPSA_DEVICE GroupVectors<A> vectors_of(
    const Params& p, int begin, int samples, A* shared, int room) {
  constexpr int kVector = 16 / sizeof(A);
  const GroupVectors<A> given{p, begin, samples, nullptr};
  const int vector = given.vector(), units = given.units();
  if (room == 0 || int64_t{2} * samples * (vector + units) > room || vector % kVector != 0 ||
      units % kVector != 0 || reinterpret_cast<uintptr_t>(p.pooled) % 16 != 0) {
    return given;
  }
  const auto copy = [&](const A* from, A* to, int elements) {
    for (int i = thread_id() * kVector; i < elements; i += block_threads() * kVector) {
      simt::copy_async16(to + i, from + i);
    }
  };
  copy(given.pooled(), shared, samples * vector);
  copy(given.grad_v(), shared + samples * vector, samples * vector);
  copy(given.hidden(), shared + 2 * samples * vector, samples * units);
  copy(given.grad_u(), shared + samples * (2 * vector + units), samples * units);
  simt::copy_async_wait();
  barrier();
  return {p, begin, samples, shared};
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
          sum[v] += packs[k].words[v];
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

// The block that will call sum_weight_grads for sample n calls this before. Best while other
// memory is under way: it waits for the group's counter.
EPSA_DEVICE void begin_weight_grads(const Params& p, int n) {
  if (p.samples > 1) {
    p.groups_arrived[1 + n / p.group].begin(p.launch);
  }
}

// The block that has written sample n's hidden, grad_v and grad_u calls this. The
// last block of a group of samples sums the group. The last block of all sums the
// groups. No block waits. `shared` is free memory of the block, of `room` elements.
// A thread has the loads of kRows rows under way.
template <class T, int kRows>
EPSA_DEVICE void sum_weight_grads(
    const Params& p, int n, Message* message, Acc<T>* shared, int room) {
  using A = Acc<T>;
  const int index = n / p.group;
  const int groups = (p.samples + p.group - 1) / p.group;
  const int begin = index * p.group;
  const int samples = (begin + p.group < p.samples ? begin + p.group : p.samples) - begin;
  if (p.samples == 1) {
    barrier();  // nothing else to wait for
  } else if (!p.groups_arrived[1 + index].last_to_arrive(samples, message)) {
    return;
  }
  if (groups > 1) {  // only the last block of a group arrives there; its group's vectors come next
    p.groups_arrived[0].begin(p.launch);
  }
  const int count = WeightGrad::count(p);
  constexpr int kVector = 16 / sizeof(A);
  const int64_t row = (count + kVector - 1) / kVector * kVector;  // whole vectors, see plan.h
  A* all = static_cast<A*>(p.group_sums);
  A* own = all + index * row;
  const auto put = [&](int i, A sum) {
    if (groups == 1) {
      store_weight_grad<T>(p, i, sum);
    } else {
      own[i] = sum;
    }
  };
  const GroupVectors<A> group = vectors_of(p, begin, samples, shared, room);
  const int rows = samples * (p.shared ? p.branches : 1);
  sum_matrix_grads<A, kRows>(group, rows, put);
  const int sets = p.shared ? 1 : p.branches;
  const int matrices = 2 * sets * p.hidden * p.channels;
  for_sums<A>(
      count - matrices, rows,
      [&](int i, int first, int last) { return sum_bias_grad<A>(group, i, first, last); },
      [&](int i, A sum) { put(matrices + i, sum); });
  if (groups > 1 && thread_id() < row - count) {
    own[count + thread_id()] = 0;  // the last vector is read whole
  }
  if (groups > 1 && p.groups_arrived[0].last_to_arrive(groups, message)) {
    sum_groups<T>(p, groups, all, row);
  }
}

}  // namespace epsa::cuda
