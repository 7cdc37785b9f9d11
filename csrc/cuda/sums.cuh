// Sums by all threads of a block, in a fixed order: of any terms, and of dense rows.
#pragma once

#include "cuda/elements.cuh"

namespace epsa::cuda {

// Which factors of the terms lie in shared memory; the others come from device memory.
enum class Held { none, x, all };

// The turns of a batch, whose loads are under way together. A multiprocessor needs
// them to keep its share of the memory busy; 64 registers hold no more.
template <int V, bool kDot, Held held>
constexpr int kSumTurns = kDot ? (held != Held::none && V < 8 ? 3 : 2)
    : held != Held::none       ? 2
    : V == 8                   ? 3
                               : 4;

// The sum over `lanes` neighbouring lanes of a warp; `lanes` is a power of two.
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

// The number of turns of a loop from `first` to below `end` by `step`. Loops that
// read device memory count their turns: only then does the compiler issue the loads
// of several turns before it waits for the first.
EPSA_DEVICE int turns_of(int first, int end, int step) {
  // unsigned division takes fewer registers
  const auto count = static_cast<unsigned>(end - first + step - 1);
  return first < end ? static_cast<int>(count / static_cast<unsigned>(step)) : 0;
}

// The sum of term(k) for begin <= k < end, in that order. All terms of a batch are
// loaded before the first is added, in the last batch too. An unrolled loop would
// load its last terms one by one.
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

// The neighbouring lanes of a warp that share an element where there are fewer elements than
// threads; at least `fewest`, a power of two.
EPSA_DEVICE int lanes_of(int elements, int fewest) {
  int lanes = kWarp;
  while (lanes > fewest && elements > block_threads() / lanes) {
    lanes /= 2;
  }
  return lanes;
}

// The terms [begin, end) of `count` that this thread's lane sums.
struct Run {
  int begin, end;

  EPSA_DEVICE Run(int count, int lanes) {
    const int run = (count + lanes - 1) / lanes;
    begin = thread_id() % lanes * run;
    end = begin + run < count ? begin + run : count;
  }
};

// Calls put(i, total) for each i < elements. sum(i, begin, end) adds up the terms
// [begin, end) of an element's `count` terms. With fewer elements than threads,
// neighbouring lanes share an element, and each sums a run of its terms.
template <class A, class Sum, class Put>
EPSA_DEVICE void for_sums(int elements, int count, const Sum& sum, const Put& put) {
  const int lanes = lanes_of(elements, 1);
  const auto [begin, end] = Run(count, lanes);
  const int step = block_threads() / lanes;
  // The shuffles need all lanes of a warp to take the same turns.
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
EPSA_DEVICE void add_terms(const Pack<T, V>& x, const Pack<T, V>& y, Acc<T> (&sum)[V]) {
  constexpr int kPerWord = Pack<T, V>::kPerWord;
  for (int word = 0; word < V / kPerWord; ++word) {
    Acc<T> a[kPerWord], b[kPerWord];
    x.split(word, a);
    y.split(word, b);
    for (int i = 0; i < kPerWord; ++i) {
      sum[word * kPerWord + i] += kDot ? a[i] * b[i] : a[i];
    }
  }
}

// Sums a thread's turns over one row: x, or x * y, every `step` elements.
template <class T, int V, bool kDot, int kTurns>
EPSA_DEVICE Acc<T> sum_turns(const T* x, const T* y, int turns, int step) {
  using A = Acc<T>;
  A sum[V] = {};
#pragma unroll 1
  for (int turn = 0; turn < turns; turn += kTurns) {
    Pack<T, V> packs_x[kTurns] = {}, packs_y[kTurns] = {};
    for (int k = 0; k < kTurns; ++k) {
      if (turn + k < turns) {
        packs_x[k] = load<V>(x + (turn + k) * step);
        if constexpr (kDot) {
          packs_y[k] = load<V>(y + (turn + k) * step);
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
  return total;
}

// Sums dense rows in shared memory where rows outnumber warps. Neighbouring lanes
// share a row: a whole warp would wait longer for its shuffles than for the elements
// of a short row.
template <class T, int V, bool kDot>
EPSA_DEVICE void sum_short_rows(const T* x, const T* y, int rows, int pixels, Acc<T>* sums) {
  // Packs of 128 bytes together meet no bank twice. Rows of single elements may have one lane.
  constexpr int kFewest = V == 1 ? 1 : 128 / static_cast<int>(sizeof(T) * V);
  constexpr int kTurns = V == 1 ? (kDot ? 4 : 8) : kSumTurns<V, kDot, Held::all>;
  const int lanes = lanes_of(rows, kFewest);
  const int lane = thread_id() % lanes;
  const int step = lanes * V;
  const int turns = turns_of(lane * V, pixels, step);
  // The shuffles need all lanes of a warp to take the same turns.
  for (int first = 0; first < rows; first += block_threads() / lanes) {
    const int row = first + thread_id() / lanes;
    const int at = row * pixels + lane * V;
    const Acc<T> total = sum_lanes(
        sum_turns<T, V, kDot, kTurns>(
            x + at, kDot ? y + at : nullptr, row < rows ? turns : 0, step),
        lanes);
    if (row < rows && lane == 0) {
      sums[row] = total;
    }
  }
}

// All threads sum dense rows of `pixels` elements each: sums[row]. With fewer rows
// than warps, several warps share a row and add up their sums in `meet`.
template <class T, int V, bool kDot, Held held>
EPSA_DEVICE void sum_rows(
    const T* x, const T* y, int rows, int pixels, Acc<T>* sums, Acc<T>* meet) {
  using A = Acc<T>;
  const int warps = block_threads() / kWarp;
  if constexpr (held == Held::all) {
    if (rows > warps) {
      sum_short_rows<T, V, kDot>(x, y, rows, pixels, sums);
      return;
    }
  }
  const int warp = thread_id() / kWarp, lane = thread_id() % kWarp;
  const int sharing = rows < warps ? warps / rows : 1;
  const int first = (warp % sharing * kWarp + lane) * V;
  const int step = sharing * kWarp * V;
  const int turns = turns_of(first, pixels, step);
  for (int row = warp / sharing; row < rows; row += warps / sharing) {
    const T* px = x + row * pixels + first;
    const T* py = kDot ? y + row * pixels + first : nullptr;
    const A total = warp_sum(sum_turns<T, V, kDot, kSumTurns<V, kDot, held>>(px, py, turns, step));
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
    const Params& p, const A* from, int64_t step, int count, int64_t stride, A scale, A* to) {
  for_sums<A>(
      p.branches * p.channels, count,
      [&](int i, int begin, int end) {
        const A* term = from + i * step;
        return sum_terms<A, 8>(begin, end, [&](int k) { return term[k * stride]; });
      },
      [&](int i, A sum) { to[i] = sum * scale; });
  barrier();
}

}  // namespace epsa::cuda
