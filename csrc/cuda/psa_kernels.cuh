// The CUDA kernels of the PSA attention step: one launch forward, one backward.
//
// resident: a cluster of blocks (or a single one) holds one sample in shared
// memory, so that device memory is read once and written once.
// streaming: blocks take tickets, in order, from a counter. A pool ticket sums
// one part of a sample and never waits; the block whose part arrives last also
// runs the sample's SE MLP. A reweight ticket waits for that, and for nothing
// but tickets with lower numbers: a single resident block makes progress.
//
// All sums have a fixed order: within a block by thread number, across blocks by
// part, never by who arrives first.
#pragma once

#include <type_traits>

#include "psa_params.h"
#include "simt.cuh"

namespace epsa::cuda {

#define EPSA_FN EPSA_DEVICE
#include "../psa_math.h"
#undef EPSA_FN

using simt::barrier;
using simt::block_threads;
using simt::kWarp;
using simt::thread_id;

constexpr int kMaxThreads = 512;
// Registers are given out for two such blocks on a multiprocessor (64 each);
// double, which serves gradient checks, may have twice as many.
template <class T>
constexpr int kMinBlocks = std::is_same_v<T, double> ? 1 : 2;

// ---- elements: T in memory, the accumulation type in registers ----

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
EPSA_DEVICE Acc<T> to_acc(T x) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return x;
  } else {
    return simt::to_float(x);
  }
}

template <class T>
EPSA_DEVICE void from_acc(Acc<T> x, T& to) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    to = x;
  } else {
    simt::from_float(x, to);
  }
}

// V elements that are read or written at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
};

template <int V, class T>
EPSA_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
EPSA_DEVICE void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Row n of a dense array [N, size] of A.
template <class A>
EPSA_DEVICE A* row_of(void* p, int n, int64_t size) {
  return static_cast<A*>(p) + n * size;
}
template <class A>
EPSA_DEVICE const A* row_of(const void* p, int n, int64_t size) {
  return static_cast<const A*>(p) + n * size;
}

// An SE weight, which has the accumulation type or the features' 16-bit type.
template <class T>
EPSA_DEVICE Acc<T> weight(const Params& p, const void* w, int i) {
  if constexpr (sizeof(T) == 2) {
    if (p.half_weights) {
      return to_acc(static_cast<const T*>(w)[i]);
    }
  }
  return static_cast<const Acc<T>*>(w)[i];
}

template <class T>
EPSA_DEVICE void store_weight(const Params& p, void* w, int i, Acc<T> x) {
  if constexpr (sizeof(T) == 2) {
    if (p.half_weights) {
      from_acc<T>(x, static_cast<T*>(w)[i]);
      return;
    }
  }
  static_cast<Acc<T>*>(w)[i] = x;
}

// ---- a block's shared memory, cut into pieces of whole 16 bytes ----

struct Shared {
  unsigned char* next = simt::shared_memory();

  template <class A>
  EPSA_DEVICE A* take(int64_t elements) {
    A* piece = reinterpret_cast<A*>(next);
    next += (elements * static_cast<int64_t>(sizeof(A)) + 15) / 16 * 16;
    return piece;
  }
};

// What thread 0 tells the others.
struct alignas(16) Message {
  unsigned long long ticket;
  bool last;
};

// ---- sums ----

template <class A>
EPSA_DEVICE A warp_sum(A value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    value += simt::shuffle_xor(value, mask);
  }
  return value;
}

// The terms from x + i on: x, or x * y.
template <class T, int V, bool kDot>
EPSA_DEVICE void add_terms(const T* x, const T* y, Acc<T> (&sum)[V]) {
  const Pack<T, V> px = load<V>(x);
  if constexpr (kDot) {
    const Pack<T, V> py = load<V>(y);
    for (int v = 0; v < V; ++v) {
      sum[v] += to_acc(px.lane[v]) * to_acc(py.lane[v]);
    }
  } else {
    for (int v = 0; v < V; ++v) {
      sum[v] += to_acc(px.lane[v]);
    }
  }
}

// Sums of whole rows of `pixels` elements each, dense, by all threads: sums[row].
// Where there are fewer rows than warps, several warps share one and meet in
// `meet`.
template <class T, int V, bool kDot>
EPSA_DEVICE void sum_rows(
    const T* x, const T* y, int rows, int pixels, Acc<T>* sums, Acc<T>* meet) {
  using A = Acc<T>;
  const int warps = block_threads() / kWarp;
  const int warp = thread_id() / kWarp, lane = thread_id() % kWarp;
  const int sharing = rows < warps ? warps / rows : 1;
  const int first = (warp % sharing * kWarp + lane) * V;
  for (int row = warp / sharing; row < rows; row += warps / sharing) {
    const T* px = x + row * pixels;
    const T* py = kDot ? y + row * pixels : nullptr;
    A sum[V] = {};
    // as many as the registers hold on every architecture: see the compile test
#pragma unroll (kDot ? 2 : 3)
    for (int i = first; i < pixels; i += sharing * kWarp * V) {
      add_terms<T, V, kDot>(px + i, kDot ? py + i : nullptr, sum);
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

// ---- how one sample is cut (Split) ----

EPSA_DEVICE int part_begin(const Split& split, int part) {
  const int more = split.units % split.parts;
  return part * (split.units / split.parts) + (part < more ? part : more);
}

// The part that holds a unit.
EPSA_DEVICE int part_of(const Split& split, int unit) {
  const int least = split.units / split.parts;
  const int more = split.units % split.parts;
  return unit < more * (least + 1) ? unit / (least + 1)
                                   : (unit - more) / least;
}

// A dense piece of one contiguous branch: `rows` rows of `pixels` pixels, the
// first of them in channel c from pixel m on. More than one row only where rows
// are whole planes.
struct Segment {
  int s;
  int c, m;
  int rows, pixels;
};

template <class Visit>
EPSA_DEVICE void for_segments(
    const Params& p, int part, const Visit& visit) {
  const Split& split = p.split;
  if (split.chunks > 1) {
    const int plane = part / split.chunks;
    const int m = part % split.chunks * split.chunk;
    const int rest = p.pixels - m;
    visit(Segment{
        static_cast<int>(plane / p.channels), plane % p.channels, m, 1,
        static_cast<int>(rest < split.chunk ? rest : split.chunk)});
    return;
  }
  const int begin = part_begin(split, part);
  const int end = part_begin(split, part + 1);
  const int per_branch = p.channels / split.planes;
  for (int s = 0; s < p.branches; ++s) {
    const int first = s * per_branch, last = first + per_branch;
    const int from = begin > first ? begin : first;
    const int to = end < last ? end : last;
    if (from < to) {
      visit(Segment{
          s, (from - first) * split.planes, 0,
          static_cast<int>((to - from) * split.planes),
          static_cast<int>(p.pixels)});
    }
  }
}

// Sample n of a map, from an element on; null where there is no map.
template <class T>
EPSA_DEVICE T* map_of(const Maps& maps, int s, int n, int64_t offset) {
  T* data = static_cast<T*>(maps.data[s]);
  return data ? data + n * maps.batch_stride[s] + offset : nullptr;
}

template <class T>
EPSA_DEVICE T* segment_of(
    const Params& p, const Maps& maps, int n, const Segment& g) {
  return map_of<T>(maps, g.s, n, int64_t{g.c} * p.pixels + g.m);
}

// The channels_last deal: each branch has its share of the threads, a thread
// keeps to one column of V channels and walks down the pixels. Neighbours read
// neighbouring addresses.
template <int V>
struct Columns {
  int s, column, row;  // of this thread
  int per_branch, columns, rows;
  int vectors;  // of V channels, in one branch
  bool active;

  EPSA_DEVICE explicit Columns(const Params& p)
      : per_branch(block_threads() / p.branches), vectors(p.channels / V) {
    columns = vectors < per_branch ? static_cast<int>(vectors) : per_branch;
    rows = per_branch / columns;
    s = thread_id() / per_branch;
    column = thread_id() % per_branch % columns;
    row = thread_id() % per_branch / columns;
    active = s < p.branches && row < rows;
  }
};

// `pixels` pixels of all branches, wherever they lie.
template <class T>
struct Pixels {
  T* data;  // of this thread's branch
  int64_t stride;

  EPSA_DEVICE Pixels(const Maps& maps, int s, int n, int first)
      : data(map_of<T>(maps, s, n, first * maps.pixel_stride[s])),
        stride(maps.pixel_stride[s]) {}
  EPSA_DEVICE Pixels(T* dense, int s, int pixels, int channels)
      : data(dense + s * pixels * channels), stride(channels) {}
};

// Sums over `pixels` pixels of each branch's channels: sums[s * C + c].
// `meet` holds V values for each thread.
template <class T, int V, bool kDot>
EPSA_DEVICE void sum_pixels(
    const Params& p, const Columns<V>& deal, const Pixels<const T>& x,
    const Pixels<const T>& y, int pixels, Acc<T>* sums, Acc<T>* meet) {
  using A = Acc<T>;
  const int width = deal.columns * V;
  for (int first = 0; first < deal.vectors; first += deal.columns) {
    const int at = (first + deal.column) * V;
    A sum[V] = {};
    if (deal.active && at < p.channels) {
#pragma unroll (V == 1 ? 2 : kDot ? 8 / V : 4)
      for (int m = deal.row; m < pixels; m += deal.rows) {
        add_terms<T, V, kDot>(
            x.data + m * x.stride + at,
            kDot ? y.data + m * y.stride + at : nullptr, sum);
      }
    }
    for (int v = 0; v < V; ++v) {
      meet[thread_id() * V + v] = sum[v];
    }
    barrier();
    for (int i = thread_id(); i < p.branches * width; i += block_threads()) {
      const int s = i / width, k = i % width;
      const int c = first * V + k;
      if (c < p.channels) {
        const A* column = meet + s * deal.per_branch * V + k;
        A total = 0;
        for (int row = 0; row < deal.rows; ++row) {
          total += column[row * width];
        }
        sums[s * p.channels + c] = total;
      }
    }
    barrier();
  }
}

// ---- the second pass: out = F * a, dF = G * a + dp / M ----

template <bool kAdd, class A>
EPSA_DEVICE A scaled(A x, A mul, A add) {
  return kAdd ? reweight_grad(x, mul, add) : reweight(x, mul);
}

// Rows of `pixels` elements; row i has the factor mul[i]. x null: zeros.
template <class T, int V, bool kAdd>
EPSA_DEVICE void scale_rows(
    const T* x, T* to, int rows, int pixels, const Acc<T>* mul,
    const Acc<T>* add) {
  using A = Acc<T>;
  const unsigned length = pixels;
  const bool whole = length % V == 0;  // no pack holds parts of two rows
#pragma unroll 2
  for (int i = thread_id() * V; i < rows * pixels; i += block_threads() * V) {
    unsigned row = i / length, m = i % length;
    Pack<T, V> pack{};
    if (x) {
      pack = load<V>(x + i);
    }
    A a = mul[row], d = kAdd ? add[row] : A(0);
    for (int v = 0; v < V; ++v) {
      from_acc<T>(scaled<kAdd>(to_acc(pack.lane[v]), a, d), pack.lane[v]);
      if (!whole && v + 1 < V && ++m == length) {
        m = 0;
        ++row;
        a = mul[row];
        d = kAdd ? add[row] : A(0);
      }
    }
    store<V>(to + i, pack);
  }
}

template <class T, int V, bool kAdd>
EPSA_DEVICE void scale_pixels(
    const Params& p, const Columns<V>& deal, const Pixels<const T>& x,
    const Pixels<T>& to, int pixels, const Acc<T>* mul, const Acc<T>* add) {
  using A = Acc<T>;
  if (!deal.active || !to.data) {
    return;
  }
  for (int at = deal.column * V; at < p.channels; at += deal.columns * V) {
    A a[V], d[V];
    for (int v = 0; v < V; ++v) {
      a[v] = mul[deal.s * p.channels + at + v];
      d[v] = kAdd ? add[deal.s * p.channels + at + v] : A(0);
    }
#pragma unroll 2
    for (int m = deal.row; m < pixels; m += deal.rows) {
      Pack<T, V> pack{};
      if (x.data) {
        pack = load<V>(x.data + m * x.stride + at);
      }
      for (int v = 0; v < V; ++v) {
        from_acc<T>(
            scaled<kAdd>(to_acc(pack.lane[v]), a[v], d[v]), pack.lane[v]);
      }
      store<V>(to.data + m * to.stride + at, pack);
    }
  }
}

// ---- the SE MLP and the softmax, by one block ----
// Vectors lie in shared or in global memory; each function ends in a barrier.

EPSA_DEVICE int weight_set(const Params& p, int s) {
  return p.shared ? 0 : s;
}

// to[i] = scale * sum over `count` of from[i * step + k * stride]
template <class A>
EPSA_DEVICE void combine(
    const Params& p, const A* from, int64_t step, int count, int64_t stride,
    A scale, A* to) {
  const int vector = p.branches * p.channels;
  for (int i = thread_id(); i < vector; i += block_threads()) {
    A sum = 0;
    for (int k = 0; k < count; ++k) {
      sum += from[i * step + k * stride];
    }
    to[i] = sum * scale;
  }
  barrier();
}

// h = relu(W1 p + b1)
template <class T>
EPSA_DEVICE void hidden_units(
    const Params& p, const Acc<T>* pooled, Acc<T>* hidden) {
  using A = Acc<T>;
  const int lane = thread_id() % kWarp, warps = block_threads() / kWarp;
  const int units = p.branches * p.hidden;
  for (int k = thread_id() / kWarp; k < units; k += warps) {
    const int s = k / p.hidden, j = k % p.hidden;
    const int unit = weight_set(p, s) * p.hidden + j;
    A sum = 0;
    for (int c = lane; c < p.channels; c += kWarp) {
      sum += weight<T>(p, p.fc1, unit * p.channels + c) *
          pooled[s * p.channels + c];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const A bias = p.fc1_bias ? weight<T>(p, p.fc1_bias, unit) : A(0);
      hidden[k] = relu(sum + bias);
    }
  }
  barrier();
}

// z = sigmoid(W2 h + b2) of one channel
template <class T>
EPSA_DEVICE Acc<T> excitation(
    const Params& p, const Acc<T>* hidden, int s, int c) {
  using A = Acc<T>;
  const int channel = weight_set(p, s) * p.channels + c;
  A v = p.fc2_bias ? weight<T>(p, p.fc2_bias, channel) : A(0);
  for (int j = 0; j < p.hidden; ++j) {
    v += weight<T>(p, p.fc2, channel * p.hidden + j) *
        hidden[s * p.hidden + j];
  }
  return sigmoid_from_exp(simt::exponential(-v));
}

// pooled [S, C] -> attention [S, C]; hidden [S, r] and scores [S, C] are scratch
template <class T>
EPSA_DEVICE void gate(
    const Params& p, const Acc<T>* pooled, Acc<T>* hidden, Acc<T>* scores,
    Acc<T>* attention) {
  using A = Acc<T>;
  hidden_units<T>(p, pooled, hidden);
  const int vector = p.branches * p.channels;
  for (int i = thread_id(); i < vector; i += block_threads()) {
    // z lies in (0, 1), so exp needs no shift by the maximum
    scores[i] = simt::exponential(
        excitation<T>(p, hidden, i / p.channels, i % p.channels));
  }
  barrier();
  for (int i = thread_id(); i < vector; i += block_threads()) {
    A sum = 0;
    for (int k = i % p.channels; k < vector; k += p.channels) {
      sum += scores[k];
    }
    attention[i] = scores[i] / sum;
  }
  barrier();
}

// da [S, C] (of this sample, through the output alone) -> hidden [S, r],
// grad_v [S, C], grad_u [S, r], grad_pooled [S, C] / M
template <class T>
EPSA_DEVICE void gate_grad(
    const Params& p, const Acc<T>* grad_attention, const Acc<T>* pooled,
    const Acc<T>* attention, Acc<T>* da, Acc<T>* hidden, Acc<T>* grad_v,
    Acc<T>* grad_u, Acc<T>* grad_pooled) {
  using A = Acc<T>;
  const int vector = p.branches * p.channels;
  if (grad_attention) {
    for (int i = thread_id(); i < vector; i += block_threads()) {
      da[i] += grad_attention[i];
    }
  }
  hidden_units<T>(p, pooled, hidden);  // its barrier serves da as well
  for (int i = thread_id(); i < vector; i += block_threads()) {
    A dot = 0;
    for (int k = i % p.channels; k < vector; k += p.channels) {
      dot += attention[k] * da[k];
    }
    const A dz = softmax_grad(attention[i], da[i], dot);
    const A z = excitation<T>(p, hidden, i / p.channels, i % p.channels);
    grad_v[i] = sigmoid_grad(dz, z);
  }
  barrier();
  const int lane = thread_id() % kWarp, warps = block_threads() / kWarp;
  const int units = p.branches * p.hidden;
  for (int k = thread_id() / kWarp; k < units; k += warps) {
    const int s = k / p.hidden, j = k % p.hidden;
    const int first = weight_set(p, s) * p.channels;
    A sum = 0;
    for (int c = lane; c < p.channels; c += kWarp) {
      sum += grad_v[s * p.channels + c] *
          weight<T>(p, p.fc2, (first + c) * p.hidden + j);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      grad_u[k] = relu_grad(sum, hidden[k]);
    }
  }
  barrier();
  for (int i = thread_id(); i < vector; i += block_threads()) {
    const int s = i / p.channels, c = i % p.channels;
    const int first = weight_set(p, s) * p.hidden;
    A sum = 0;
    for (int j = 0; j < p.hidden; ++j) {
      sum += weight<T>(p, p.fc1, (first + j) * p.channels + c) *
          grad_u[s * p.hidden + j];
    }
    grad_pooled[i] = sum / static_cast<A>(p.pixels);
  }
  barrier();
}

// ---- gradients of the SE weights ----

// For all threads: is this block the last of `expected` to arrive? Then it sees
// what the others wrote before they did.
EPSA_DEVICE bool last_to_arrive(
    unsigned* counter, int expected, Message* message) {
  barrier();
  if (thread_id() == 0) {
    message->last = static_cast<int>(simt::arrive(counter)) == expected - 1;
  }
  barrier();
  return message->last;
}

// Where the sums of a group of samples, or of all, go: dense in one array, or
// into the gradients themselves.
template <class T>
struct WeightSums {
  const Params& p;
  Acc<T>* group;  // [B * (r * C + r + C * r + C)]; null: the gradients

  EPSA_DEVICE int sets() const { return p.shared ? 1 : p.branches; }
  EPSA_DEVICE int matrix() const {
    return sets() * p.hidden * p.channels;
  }
  EPSA_DEVICE int elements() const {
    return 2 * matrix() + sets() * (p.hidden + p.channels);
  }
  EPSA_DEVICE void put(
      void* grad, int group_offset, int i, Acc<T> sum) const {
    if (group) {
      group[group_offset + i] = sum;
    } else if (grad) {
      store_weight<T>(p, grad, i, sum);
    }
  }
  EPSA_DEVICE void fc1(int i, Acc<T> sum) const {
    put(p.grad_fc1, 0, i, sum);
  }
  EPSA_DEVICE void fc2(int i, Acc<T> sum) const {
    put(p.grad_fc2, matrix(), i, sum);
  }
  EPSA_DEVICE void fc1_bias(int i, Acc<T> sum) const {
    put(p.grad_fc1_bias, 2 * matrix(), i, sum);
  }
  EPSA_DEVICE void fc2_bias(int i, Acc<T> sum) const {
    put(p.grad_fc2_bias, 2 * matrix() + sets() * p.hidden, i, sum);
  }
};

// sum over `rows` rows of x[row] * y[row]; y null: of x
template <class A>
EPSA_DEVICE A sum_products(
    int rows, const A* x, int64_t x_step, const A* y, int64_t y_step) {
  A sum = 0;
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    sum += y ? x[row * x_step] * y[row * y_step] : x[row * x_step];
  }
  return sum;
}

// Over samples [begin, end) and the branches that share weights.
template <class T>
EPSA_DEVICE void sum_group(
    const Params& p, int begin, int end, const WeightSums<T>& to) {
  using A = Acc<T>;
  const int C = p.channels, r = p.hidden;
  const int vector = p.branches * C, units = p.branches * r;
  const A* pooled = row_of<A>(p.pooled, begin, vector);
  const A* hidden = row_of<A>(p.hidden_units, begin, units);
  const A* grad_v = row_of<A>(p.grad_v, begin, vector);
  const A* grad_u = row_of<A>(p.grad_u, begin, units);
  const A* none = nullptr;
  // rows of all branches, or of one branch with the others between them
  const int rows = (end - begin) * (p.shared ? p.branches : 1);
  const int64_t c_step = p.shared ? C : vector, r_step = p.shared ? r : units;
  for (int i = thread_id(); i < to.matrix(); i += block_threads()) {
    const int c = i % C, j = i / C % r, b = i / C / r;
    const int at_c = b * C + c, at_j = b * r + j;
    if (p.grad_fc1) {
      to.fc1(
          i, sum_products(rows, grad_u + at_j, r_step, pooled + at_c, c_step));
    }
    if (p.grad_fc2) {
      to.fc2(
          at_c * r + j,
          sum_products(rows, grad_v + at_c, c_step, hidden + at_j, r_step));
    }
  }
  if (p.grad_fc1_bias) {
    for (int i = thread_id(); i < to.sets() * r; i += block_threads()) {
      to.fc1_bias(
          i, sum_products(rows, grad_u + i, r_step, none, int64_t{0}));
    }
  }
  if (p.grad_fc2_bias) {
    for (int i = thread_id(); i < to.sets() * C; i += block_threads()) {
      to.fc2_bias(
          i, sum_products(rows, grad_v + i, c_step, none, int64_t{0}));
    }
  }
}

// Called by the block that has written sample n's hidden, grad_v and grad_u. The
// last block of a group of samples sums the group, the last of all the groups:
// nobody waits.
template <class T>
EPSA_DEVICE void sum_weight_grads(
    const Params& p, int n, Message* message) {
  const int group = n / p.group;
  const int groups = (p.samples + p.group - 1) / p.group;
  const int begin = group * p.group;
  const int end =
      begin + p.group < p.samples ? begin + p.group : p.samples;
  if (!last_to_arrive(&p.groups_arrived[1 + group], end - begin, message)) {
    return;
  }
  const WeightSums<T> grads{p, nullptr};
  if (groups == 1) {
    sum_group<T>(p, begin, end, grads);
    return;
  }
  const int elements = grads.elements();
  Acc<T>* all = static_cast<Acc<T>*>(p.group_sums);
  sum_group<T>(p, begin, end, {p, row_of<Acc<T>>(all, group, elements)});
  if (!last_to_arrive(&p.groups_arrived[0], groups, message)) {
    return;
  }
  const int matrix = grads.matrix();
  const int units = grads.sets() * p.hidden;
  for (int i = thread_id(); i < elements; i += block_threads()) {
    Acc<T> sum = 0;
    for (int k = 0; k < groups; ++k) {
      sum += row_of<Acc<T>>(all, k, elements)[i];
    }
    if (i < matrix) {
      grads.fc1(i, sum);
    } else if (i < 2 * matrix) {
      grads.fc2(i - matrix, sum);
    } else if (i < 2 * matrix + units) {
      grads.fc1_bias(i - 2 * matrix, sum);
    } else {
      grads.fc2_bias(i - 2 * matrix - units, sum);
    }
  }
}

// ---- both passes over one part of a sample ----

// Sums over the part, of x or of x * y: contiguous, one for each row of a
// segment, at sums[first row]; channels_last, [S, C].
template <class T, int V, bool kDot>
EPSA_DEVICE void sum_segment(
    const Params& p, const T* x, const T* y, const Segment& g, Acc<T>* sums,
    Acc<T>* meet) {
  // Planes of 49 or 196 pixels do not all begin at a multiple of V.
  if (p.pixels % V == 0) {
    sum_rows<T, V, kDot>(x, y, g.rows, g.pixels, sums, meet);
    return;
  }
  if constexpr (V == 8) {
    if (p.pixels % 4 == 0) {
      sum_rows<T, 4, kDot>(x, y, g.rows, g.pixels, sums, meet);
      return;
    }
  }
  sum_rows<T, 1, kDot>(x, y, g.rows, g.pixels, sums, meet);
}

template <class T, int V, bool kLast, bool kDot>
EPSA_DEVICE void sum_part(
    const Params& p, int n, int part, const Maps& x, const Maps& y,
    Acc<T>* sums, Acc<T>* meet) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const int first = part_begin(p.split, part);
    const int pixels =
        static_cast<int>(part_begin(p.split, part + 1) - first);
    const Pixels<const T> px(x, deal.s, n, first), py(y, deal.s, n, first);
    sum_pixels<T, V, kDot>(p, deal, px, py, pixels, sums, meet);
  } else {
    for_segments(p, part, [&](const Segment& g) {
      const int row = (g.s * p.channels + g.c) * p.split.chunks +
          (p.split.chunks > 1 ? g.m / p.split.chunk : 0);
      sum_segment<T, V, kDot>(
          p, segment_of<const T>(p, x, n, g),
          kDot ? segment_of<const T>(p, y, n, g) : nullptr, g, sums + row,
          meet);
    });
  }
}

template <class T, int V, bool kLast, bool kAdd>
EPSA_DEVICE void scale_part(
    const Params& p, int n, int part, const Maps& x, const Maps& to,
    const Acc<T>* mul, const Acc<T>* add) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const int first = part_begin(p.split, part);
    const int pixels =
        static_cast<int>(part_begin(p.split, part + 1) - first);
    scale_pixels<T, V, kAdd>(
        p, deal, Pixels<const T>(x, deal.s, n, first),
        Pixels<T>(to, deal.s, n, first), pixels, mul, add);
  } else {
    for_segments(p, part, [&](const Segment& g) {
      if (T* dst = segment_of<T>(p, to, n, g)) {
        const int row = g.s * p.channels + g.c;
        scale_rows<T, V, kAdd>(
            segment_of<const T>(p, x, n, g), dst, g.rows, g.pixels, mul + row,
            kAdd ? add + row : nullptr);
      }
    });
  }
}

// ---- streaming ----

// Hands out tickets until all are done. With P pool and R reweight tickets a
// sample: the pools of the first `lag` samples; then sample by sample the pools
// of one and the reweights of the one `lag` before it; then the last reweights.
template <class PoolTicket, class ReweightTicket>
EPSA_DEVICE void for_tickets(
    const Params& p, int pools, int reweights, Message* message,
    const PoolTicket& pool, const ReweightTicket& reweight) {
  const int head = p.lag * pools;
  const int both = pools + reweights;
  const int body = (p.samples - p.lag) * both;
  const int tickets = p.samples * both;
  for (;;) {
    if (thread_id() == 0) {
      message->ticket = simt::next_ticket(p.ticket);
    }
    barrier();
    const unsigned long long ticket = message->ticket;
    barrier();
    if (ticket >= static_cast<unsigned long long>(tickets)) {
      return;
    }
    int t = static_cast<int>(ticket);
    if (t < head) {
      pool(t / pools, t % pools);
      continue;
    }
    t -= head;
    if (t < body) {
      const int n = t / both, j = t % both;
      if (j < pools) {
        pool(p.lag + n, j);
      } else {
        reweight(n, j - pools);
      }
      continue;
    }
    t -= body;
    reweight(p.samples - p.lag + t / reweights, t % reweights);
  }
}

// The sample's partial sums are complete for the last of its parts to arrive.
template <class T, bool kLast>
EPSA_DEVICE void combine_parts(
    const Params& p, const Acc<T>* partial, Acc<T> scale, Acc<T>* to) {
  if constexpr (kLast) {  // [parts, S, C]
    combine(p, partial, 1, p.split.parts, p.branches * p.channels, scale, to);
  } else {  // [S, C, chunks]
    combine(p, partial, p.split.chunks, p.split.chunks, 1, scale, to);
  }
}

EPSA_DEVICE void set_ready(const Params& p, int n) {
  barrier();
  if (thread_id() == 0) {
    simt::publish(&p.ready[n]);
  }
}

EPSA_DEVICE void wait_ready(const Params& p, int n) {
  if (thread_id() == 0) {
    while (!simt::is_published(&p.ready[n])) {
      simt::pause();
    }
  }
  barrier();
}

template <class T, int V, bool kLast>
EPSA_KERNEL(kMaxThreads, kMinBlocks<T>)
forward_streaming(EPSA_PARAMETER Params p) {
  using A = Acc<T>;
  Shared shared;
  Message* message = shared.take<Message>(1);
  A* meet = shared.take<A>(block_threads() * (kLast ? V : 1));
  const int vector = p.branches * p.channels;
  const int parts = p.split.parts;
  const int pools = p.pooled_given ? 1 : parts;
  for_tickets(
      p, pools, parts, message,
      [&](int n, int part) {
        A* pooled = row_of<A>(p.pooled, n, vector);
        if (!p.pooled_given) {
          A* partial = row_of<A>(p.partial, n, p.partials);
          sum_part<T, V, kLast, false>(
              p, n, part, p.feats, p.feats,
              kLast ? partial + int64_t{part} * vector : partial, meet);
          if (!last_to_arrive(&p.arrived[n], parts, message)) {
            return;
          }
          combine_parts<T, kLast>(
              p, partial, 1 / static_cast<A>(p.pixels), pooled);
        }
        gate<T>(
            p, pooled, row_of<A>(p.hidden_units, n, p.branches * p.hidden),
            row_of<A>(p.scratch, n, vector), row_of<A>(p.attention, n, vector));
        set_ready(p, n);
      },
      [&](int n, int part) {
        wait_ready(p, n);
        scale_part<T, V, kLast, false>(
            p, n, part, p.feats, p.out, row_of<A>(p.attention, n, vector),
            nullptr);
      });
}

template <class T, int V, bool kLast>
EPSA_KERNEL(kMaxThreads, kMinBlocks<T>)
backward_streaming(EPSA_PARAMETER Params p) {
  using A = Acc<T>;
  Shared shared;
  Message* message = shared.take<Message>(1);
  A* meet = shared.take<A>(block_threads() * (kLast ? V : 1));
  const int vector = p.branches * p.channels;
  const int units = p.branches * p.hidden;
  const int parts = p.split.parts;
  const int pools = p.grad_out_given ? parts : 1;
  for_tickets(
      p, pools, p.feats_wanted ? parts : 0, message,
      [&](int n, int part) {
        A* da = row_of<A>(p.scratch, n, vector);
        if (p.grad_out_given) {
          A* partial = row_of<A>(p.partial, n, p.partials);
          sum_part<T, V, kLast, true>(
              p, n, part, p.grad_out, p.feats,
              kLast ? partial + int64_t{part} * vector : partial, meet);
          if (!last_to_arrive(&p.arrived[n], parts, message)) {
            return;
          }
          combine_parts<T, kLast>(p, partial, A(1), da);
        } else {
          combine<A>(p, nullptr, 0, 0, 0, A(0), da);
        }
        gate_grad<T>(
            p,
            p.grad_attention ? row_of<A>(p.grad_attention, n, vector) : nullptr,
            row_of<A>(p.pooled, n, vector), row_of<A>(p.attention, n, vector),
            da, row_of<A>(p.hidden_units, n, units),
            row_of<A>(p.grad_v, n, vector), row_of<A>(p.grad_u, n, units),
            row_of<A>(p.grad_pooled, n, vector));
        set_ready(p, n);
        if (p.weights_wanted) {
          sum_weight_grads<T>(p, n, message);
        }
      },
      [&](int n, int part) {
        wait_ready(p, n);
        scale_part<T, V, kLast, true>(
            p, n, part, p.grad_out, p.grad_feats,
            row_of<A>(p.attention, n, vector),
            row_of<A>(p.grad_pooled, n, vector));
      });
}

// ---- resident ----

// One part of a sample, held in shared memory: the segments one after another,
// or [S, pixels, C].
template <class T, int V, bool kLast>
EPSA_DEVICE void copy_in(
    const Params& p, const Maps& from, int n, int part, T* piece) {
  const auto copy = [](T* to, const T* x) {
    if constexpr (sizeof(Pack<T, V>) == 16) {
      simt::copy_async16(to, x);
    } else {
      store<V>(to, load<V>(x));
    }
  };
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const int first = part_begin(p.split, part);
    const int pixels =
        static_cast<int>(part_begin(p.split, part + 1) - first);
    if (deal.active) {
      const Pixels<const T> x(from, deal.s, n, first);
      const Pixels<T> to(piece, deal.s, pixels, p.channels);
      const int step = deal.columns * V;
      for (int at = deal.column * V; at < p.channels; at += step) {
        for (int m = deal.row; m < pixels; m += deal.rows) {
          copy(to.data + m * to.stride + at, x.data + m * x.stride + at);
        }
      }
    }
  } else {
    for_segments(p, part, [&](const Segment& g) {
      const T* x = segment_of<const T>(p, from, n, g);
      const int elements = g.rows * g.pixels;
      for (int i = thread_id() * V; i < elements; i += block_threads() * V) {
        copy(piece + i, x + i);
      }
      piece += elements;
    });
  }
  simt::copy_async_wait();
  barrier();
}

template <bool kLast>
EPSA_DEVICE int piece_elements(const Params& p) {
  const Split& split = p.split;
  const int units = (split.units + split.parts - 1) / split.parts;
  return units *
      (kLast ? p.branches * p.channels : split.planes * p.pixels);
}

// Sums over the part in shared memory, of x or of x * y with y in device memory:
// [S, C], of which a contiguous part has its own planes only.
template <class T, int V, bool kLast, bool kDot>
EPSA_DEVICE void sum_piece(
    const Params& p, int n, int part, T* piece, const Maps& y,
    Acc<T>* sums, Acc<T>* meet) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const int first = part_begin(p.split, part);
    const int pixels =
        static_cast<int>(part_begin(p.split, part + 1) - first);
    const Pixels<const T> x(piece, deal.s, pixels, p.channels);
    const Pixels<const T> py(y, deal.s, n, first);
    sum_pixels<T, V, kDot>(p, deal, x, py, pixels, sums, meet);
  } else {
    for_segments(p, part, [&](const Segment& g) {
      sum_segment<T, V, kDot>(
          p, piece, kDot ? segment_of<const T>(p, y, n, g) : nullptr, g,
          sums + g.s * p.channels + g.c, meet);
      piece += g.rows * g.pixels;
    });
  }
}

template <class T, int V, bool kLast, bool kAdd>
EPSA_DEVICE void scale_piece(
    const Params& p, int n, int part, T* piece, const Maps& to,
    const Acc<T>* mul, const Acc<T>* add) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const int first = part_begin(p.split, part);
    const int pixels =
        static_cast<int>(part_begin(p.split, part + 1) - first);
    scale_pixels<T, V, kAdd>(
        p, deal, Pixels<const T>(piece, deal.s, pixels, p.channels),
        Pixels<T>(to, deal.s, n, first), pixels, mul, add);
  } else {
    for_segments(p, part, [&](const Segment& g) {
      if (T* dst = segment_of<T>(p, to, n, g)) {
        const int row = g.s * p.channels + g.c;
        scale_rows<T, V, kAdd>(
            piece, dst, g.rows, g.pixels, mul + row,
            kAdd ? add + row : nullptr);
      }
      piece += g.rows * g.pixels;
    });
  }
}

// The whole sample's sums, from those of the cluster's blocks: to [S, C]. The
// second half of the cluster's barrier is left to cluster_finish, since nobody
// may exit while another still reads.
template <class T, bool kLast>
EPSA_DEVICE void gather(
    const Params& p, const Acc<T>* sums, Acc<T> scale, Acc<T>* to) {
  using A = Acc<T>;
  if (p.cluster == 1) {
    barrier();
    combine(p, sums, 1, 1, 0, scale, to);
    return;
  }
  simt::cluster_arrive();
  simt::cluster_wait();
  const Split& split = p.split;
  const int vector = p.branches * p.channels;
  for (int i = thread_id(); i < vector; i += block_threads()) {
    A sum;
    if constexpr (kLast) {
      sum = 0;
      for (int rank = 0; rank < p.cluster; ++rank) {
        sum += simt::cluster_peer(sums, rank)[i];
      }
    } else {  // the part that holds the plane's unit
      sum = simt::cluster_peer(sums, part_of(split, i / split.planes))[i];
    }
    to[i] = sum * scale;
  }
  simt::cluster_arrive();
  barrier();
}

EPSA_DEVICE void cluster_finish(const Params& p) {
  if (p.cluster > 1) {
    simt::cluster_wait();
  }
}

template <class A>
EPSA_DEVICE void copy_vector(const A* from, A* to, int size) {
  for (int i = thread_id(); i < size; i += block_threads()) {
    to[i] = from[i];
  }
}

template <class T, int V, bool kLast>
EPSA_KERNEL(kMaxThreads, kMinBlocks<T>)
forward_resident(EPSA_PARAMETER Params p) {
  using A = Acc<T>;
  const int n = simt::block_id() / p.cluster;
  const int rank = p.cluster > 1 ? simt::cluster_rank() : 0;
  const int vector = p.branches * p.channels;
  Shared shared;
  T* piece = shared.take<T>(piece_elements<kLast>(p));
  A* meet = shared.take<A>(block_threads() * (kLast ? V : 1));
  A* sums = shared.take<A>(vector);
  A* pooled = shared.take<A>(vector);
  A* scores = shared.take<A>(vector);
  A* attention = shared.take<A>(vector);
  A* hidden = shared.take<A>(p.branches * p.hidden);

  copy_in<T, V, kLast>(p, p.feats, n, rank, piece);
  sum_piece<T, V, kLast, false>(p, n, rank, piece, p.feats, sums, meet);
  gather<T, kLast>(p, sums, 1 / static_cast<A>(p.pixels), pooled);
  gate<T>(p, pooled, hidden, scores, attention);
  if (rank == 0) {
    copy_vector(pooled, row_of<A>(p.pooled, n, vector), vector);
    copy_vector(attention, row_of<A>(p.attention, n, vector), vector);
  }
  scale_piece<T, V, kLast, false>(
      p, n, rank, piece, p.out, attention, nullptr);
  cluster_finish(p);
}

template <class T, int V, bool kLast>
EPSA_KERNEL(kMaxThreads, kMinBlocks<T>)
backward_resident(EPSA_PARAMETER Params p) {
  using A = Acc<T>;
  const int n = simt::block_id() / p.cluster;
  const int rank = p.cluster > 1 ? simt::cluster_rank() : 0;
  const int vector = p.branches * p.channels;
  const int units = p.branches * p.hidden;
  Shared shared;
  T* piece = shared.take<T>(piece_elements<kLast>(p));
  A* meet = shared.take<A>(block_threads() * (kLast ? V : 1));
  A* sums = shared.take<A>(vector);
  A* da = shared.take<A>(vector);
  A* grad_v = shared.take<A>(vector);
  A* grad_pooled = shared.take<A>(vector);
  A* hidden = shared.take<A>(units);
  A* grad_u = shared.take<A>(units);
  Message* message = shared.take<Message>(1);

  const A* attention = row_of<A>(p.attention, n, vector);
  copy_in<T, V, kLast>(p, p.grad_out, n, rank, piece);
  sum_piece<T, V, kLast, true>(p, n, rank, piece, p.feats, sums, meet);
  gather<T, kLast>(p, sums, A(1), da);
  gate_grad<T>(
      p,
      p.grad_attention ? row_of<A>(p.grad_attention, n, vector) : nullptr,
      row_of<A>(p.pooled, n, vector), attention, da, hidden, grad_v, grad_u,
      grad_pooled);
  scale_piece<T, V, kLast, true>(
      p, n, rank, piece, p.grad_feats, attention, grad_pooled);
  if (rank == 0 && p.weights_wanted) {
    copy_vector(hidden, row_of<A>(p.hidden_units, n, units), units);
    copy_vector(grad_v, row_of<A>(p.grad_v, n, vector), vector);
    copy_vector(grad_u, row_of<A>(p.grad_u, n, units), units);
    sum_weight_grads<T>(p, n, message);
  }
  cluster_finish(p);
}

// ---- the kernel of a plan ----

using Kernel = void (*)(Params);

template <class T, int V, bool kLast>
Kernel kernel_of(Pass pass, Variant variant) {
  if (pass == Pass::forward) {
    return variant == Variant::resident ? Kernel(forward_resident<T, V, kLast>)
                                        : forward_streaming<T, V, kLast>;
  }
  return variant == Variant::resident ? Kernel(backward_resident<T, V, kLast>)
                                      : backward_streaming<T, V, kLast>;
}

template <class T>
Kernel kernel_of(const Problem& problem, const Plan& plan) {
  constexpr int kVector =
      std::is_same_v<T, double> ? 1 : 16 / static_cast<int>(sizeof(T));
  const bool last = problem.layout == Layout::channels_last;
  if (plan.vector == kVector) {
    return last ? kernel_of<T, kVector, true>(problem.pass, plan.variant)
                : kernel_of<T, kVector, false>(problem.pass, plan.variant);
  }
  return last ? kernel_of<T, 1, true>(problem.pass, plan.variant)
              : kernel_of<T, 1, false>(problem.pass, plan.variant);
}

inline Kernel kernel_of(const Problem& problem, const Plan& plan) {
  switch (problem.dtype) {
    case Dtype::f64:
      return kernel_of<double>(problem, plan);
    case Dtype::bf16:
      return kernel_of<simt::bf16>(problem, plan);
    case Dtype::f16:
      return kernel_of<simt::f16>(problem, plan);
    default:
      return kernel_of<float>(problem, plan);
  }
}

}  // namespace epsa::cuda
