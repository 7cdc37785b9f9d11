// Sums by all threads of a block, in a fixed order: of anything, and of dense
// rows.
#pragma once

#include "cuda/elements.cuh"

namespace epsa::cuda {

// Turns of a loop whose loads are under way together: what a multiprocessor needs
// to keep its share of the memory busy, as far as 64 registers hold it. With
// kHeld, x comes from shared memory.
template <int V, bool kDot, bool kHeld>
constexpr int kSumTurns = kDot ? (kHeld && V < 8 ? 3 : 2)
    : kHeld ? 2
    : V == 8 ? 3
             : 4;

// Over `lanes` neighbouring lanes of a warp, a power of two.
template <class A>
EPSA_DEVICE A sum_lanes(A value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    value += simt::shuffle_xor(value, mask);
  }
  return value;
}
template <class A>
EPSA_DEVICE A warp_sum(A value) {
  return sum_lanes(value, kWarp);
}

// How often a loop from `first` on, by `step`, runs below `end`. Loops that read
// device memory count their turns: only then does the compiler issue the loads of
// several turns before it waits for the first.
EPSA_DEVICE int turns_of(int first, int end, int step) {
  // unsigned division takes fewer registers
  const auto count = static_cast<unsigned>(end - first + step - 1);
  return first < end ? static_cast<int>(count / static_cast<unsigned>(step)) : 0;
}

// The sum of term(k) for begin <= k < end, in that order. A batch's terms are
// loaded before the first is added, those of the last batch as well: of a loop
// that is unrolled instead the compiler does the rest one by one.
template <class A, int kTerms, class Term>
EPSA_DEVICE A sum_terms(int begin, int end, const Term& term) {
  A sum = 0;
#pragma unroll 1
  for (int first = begin; first < end; first += kTerms) {
    A terms[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      terms[k] = first + k < end ? term(first + k) : A(0);
    }
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      sum += terms[k];
    }
  }
  return sum;
}

// put(i, sum(i, begin, end)) for each i < elements, where `sum` adds up the terms
// [begin, end) of `count`; by all threads. Where there are fewer elements than
// threads, neighbouring lanes share the terms of one, each a run of them.
template <class A, class Sum, class Put>
EPSA_DEVICE void for_sums(
    int elements, int count, const Sum& sum, const Put& put) {
  int lanes = kWarp;
  while (lanes > 1 && elements > block_threads() / lanes) {
    lanes /= 2;
  }
  const int run = (count + lanes - 1) / lanes;
  const int begin = thread_id() % lanes * run;
  const int end = begin + run < count ? begin + run : count;
  const int step = block_threads() / lanes;
  // all lanes of a warp take the same turns, as the shuffles need
  for (int first = 0; first < elements; first += step) {
    const int i = first + thread_id() / lanes;
    const A total = sum_lanes(i < elements ? sum(i, begin, end) : A(0), lanes);
    if (i < elements && thread_id() % lanes == 0) {
      put(i, total);
    }
  }
}

// Adds a pack's terms: x, or x * y.
template <bool kDot, class T, int V>
EPSA_DEVICE void add_terms(
    const Pack<T, V>& x, const Pack<T, V>& y, Acc<T> (&sum)[V]) {
  for (int v = 0; v < V; ++v) {
    const Acc<T> a = to_acc(x.lane[v]);
    sum[v] += kDot ? a * to_acc(y.lane[v]) : a;
  }
}

// Sums of whole rows of `pixels` elements each, dense, by all threads: sums[row].
// Where there are fewer rows than warps, several warps share one and meet in
// `meet`.
template <class T, int V, bool kDot, bool kHeld>
EPSA_DEVICE void sum_rows(
    const T* x, const T* y, int rows, int pixels, Acc<T>* sums, Acc<T>* meet) {
  using A = Acc<T>;
  const int warps = block_threads() / kWarp;
  const int warp = thread_id() / kWarp, lane = thread_id() % kWarp;
  const int sharing = rows < warps ? warps / rows : 1;
  const int first = (warp % sharing * kWarp + lane) * V;
  const int step = sharing * kWarp * V;
  const int turns = turns_of(first, pixels, step);
  for (int row = warp / sharing; row < rows; row += warps / sharing) {
    const T* px = x + row * pixels + first;
    const T* py = kDot ? y + row * pixels + first : nullptr;
    A sum[V] = {};
    constexpr int kTurns = kSumTurns<V, kDot, kHeld>;
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += kTurns) {
      Pack<T, V> packs_x[kTurns] = {}, packs_y[kTurns] = {};
      for (int k = 0; k < kTurns; ++k) {
        if (turn + k < turns) {
          packs_x[k] = load<V>(px + (turn + k) * step);
          if constexpr (kDot) {
            packs_y[k] = load<V>(py + (turn + k) * step);
          }
        }
      }
      for (int k = 0; k < kTurns; ++k) {
        add_terms<kDot>(packs_x[k], packs_y[k], sum);
      }
    }
    A total = sum[0];
    for (int v = 1; v < V; ++v) {
      total += sum[v];
    }
    total = warp_sum(total);
    if (lane == 0) {
      (sharing == 1 ? sums[row] : meet[warp]) = total;
    }
  }
  if (sharing > 1) {
    barrier();
    if (thread_id() < rows) {
      A total = 0;
      for (int i = 0; i < sharing; ++i) {
        total += meet[thread_id() * sharing + i];
      }
      sums[thread_id()] = total;
    }
    barrier();
  }
}

// to[i] = scale * sum over `count` of from[i * step + k * stride]
template <class A>
EPSA_DEVICE void combine(
    const Params& p, const A* from, int64_t step, int count, int64_t stride,
    A scale, A* to) {
  for_sums<A>(
      p.branches * p.channels, count,
      [&](int i, int begin, int end) {
        const A* term = from + i * step;
        return sum_terms<A, 8>(
            begin, end, [&](int k) { return term[k * stride]; });
      },
      [&](int i, A sum) { to[i] = sum * scale; });
  barrier();
}

}  // namespace epsa::cuda
