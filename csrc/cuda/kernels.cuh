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

#include "cuda/gate.cuh"
#include "cuda/parts.cuh"
#include "cuda/weight_grads.cuh"

namespace epsa::cuda {

constexpr int kMaxThreads = 512;
// Registers are given out for two such blocks on a multiprocessor (64 each);
// double, which serves gradient checks, may have twice as many.
template <class T>
constexpr int kMinBlocks = std::is_same_v<T, double> ? 1 : 2;

// ---- streaming ----

// Sums over one part of sample n, of x or of x * y: contiguous, one for each row
// of a segment, [S, C, chunks]; channels_last, [S, C].
template <class T, int V, bool kLast, bool kDot>
EPSA_DEVICE void sum_part(
    const Params& p, int n, int part, const Maps& x, const Maps& y,
    Acc<T>* sums, Acc<T>* meet) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    sum_pixels<kDot, false>(
        p, deal, pixels_of<const T>(x, deal, n, first),
        pixels_of<const T>(y, deal, n, first), pixels, sums, meet);
  } else {
    for_segments<true>(p, part, [&](const Segment& g) {
      const int row = (g.s * p.channels + g.c) * p.split.chunks +
          (p.split.chunks > 1 ? g.m / p.split.chunk : 0);
      sum_segment<T, V, kDot, false>(
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
    const auto [first, pixels] = pixels_of_part(p.split, part);
    scale_pixels<kAdd>(
        p, deal, pixels_of<const T>(x, deal, n, first),
        pixels_of<T>(to, deal, n, first), pixels, mul, add);
  } else {
    for_segments<true>(p, part, [&](const Segment& g) {
      if (T* dst = segment_of<T>(p, to, n, g)) {
        const int row = g.s * p.channels + g.c;
        scale_segment<T, V, kAdd>(
            segment_of<const T>(p, x, n, g), dst, g.rows, g.pixels, mul + row,
            kAdd ? add + row : nullptr);
      }
    });
  }
}

// Hands out tickets until all are done. With P pool and R reweight tickets a
// sample: the pools of the first `lag` samples; then sample by sample the pools
// of one and the reweights of the one `lag` before it; then the last reweights.
template <class PoolTicket, class ReweightTicket>
EPSA_DEVICE void for_tickets(
    const Params& p, int pools, int reweights, Message* message,
    const PoolTicket& pool, const ReweightTicket& reweight) {
  const int both = pools + reweights;
  for (;;) {
    if (thread_id() == 0) {
      message->ticket = simt::next_ticket(p.ticket);
    }
    barrier();
    const unsigned long long ticket = message->ticket;
    barrier();
    if (ticket >= static_cast<unsigned long long>(p.samples * both)) {
      return;
    }
    const int head = p.lag * pools;
    const int body = (p.samples - p.lag) * both;
    int t = static_cast<int>(ticket);
    int n, j;  // of sample n the pool j, or from `pools` on the reweight
    if (t < head) {
      n = t / pools;
      j = t % pools;
    } else if ((t -= head) < body) {
      n = t / both;
      j = t % both;
      n += j < pools ? p.lag : 0;
    } else {
      t -= body;
      n = p.samples - p.lag + t / reweights;
      j = pools + t % reweights;
    }
    if (j < pools) {
      pool(n, j);
    } else {
      reweight(n, j - pools);
    }
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
  const int parts = p.split.parts;
  const int pools = p.grad_out_given ? parts : 1;
  for_tickets(
      p, pools, p.feats_wanted ? parts : 0, message,
      [&](int n, int part) {
        const int units = p.branches * p.hidden;
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

// Starts to fetch one part of a sample to shared memory: the segments one after
// another, or [S, pixels, C].
template <class T, int V, bool kLast>
EPSA_DEVICE void fetch(
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
    const auto [first, pixels] = pixels_of_part(p.split, part);
    if (deal.active) {
      auto x = pixels_of<const T>(from, deal, n, first);
      auto to = pixels_of<T>(piece, deal, pixels, p.channels);
      const int turns = turns_of(deal.row, pixels, deal.rows);
      const int width = deal.columns * V;
      for (int at = deal.column; at < deal.vectors; at += deal.columns) {
        const T* px = x.at;
        T* pto = to.at;
        for (int turn = 0; turn < turns; ++turn) {
          copy(pto, px);
          px += x.step;
          pto += to.step;
        }
        x.at += width;
        to.at += width;
      }
    }
  } else {
    for_segments<false>(p, part, [&](const Segment& g) {
      const T* x = segment_of<const T>(p, from, n, g);
      const int elements = g.rows * g.pixels;
      const int step = block_threads() * V;
      const int turns = turns_of(thread_id() * V, elements, step);
      T* to = piece + thread_id() * V;
      x += thread_id() * V;
      for (int turn = 0; turn < turns; ++turn) {
        copy(to, x);
        to += step;
        x += step;
      }
      piece += elements;
    });
  }
}

// For all threads: what they fetched is there.
EPSA_DEVICE void fetched() {
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

// Sums over the part in shared memory, of x or of x * y: [S, C], of which a
// contiguous part has its own planes only. With kBoth y is held as well, else it
// comes from sample n's maps `from`.
template <class T, int V, bool kLast, bool kDot, bool kBoth>
EPSA_DEVICE void sum_piece(
    const Params& p, int n, int part, const T* piece, const T* y,
    const Maps& from, Acc<T>* sums, Acc<T>* meet) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    const auto x = pixels_of<const T>(piece, deal, pixels, p.channels);
    if constexpr (kBoth) {
      sum_pixels<kDot, true>(
          p, deal, x, pixels_of<const T>(y, deal, pixels, p.channels), pixels,
          sums, meet);
    } else {
      sum_pixels<kDot, true>(
          p, deal, x, pixels_of<const T>(from, deal, n, first), pixels, sums,
          meet);
    }
  } else {
    for_segments<false>(p, part, [&](const Segment& g) {
      sum_segment<T, V, kDot, true>(
          p, piece,
          kBoth       ? y
              : kDot ? segment_of<const T>(p, from, n, g)
                     : nullptr,
          g, sums + g.s * p.channels + g.c, meet);
      piece += g.rows * g.pixels;
      y += kBoth ? g.rows * g.pixels : 0;
    });
  }
}

template <class T, int V, bool kLast, bool kAdd>
EPSA_DEVICE void scale_piece(
    const Params& p, int n, int part, T* piece, const Maps& to,
    const Acc<T>* mul, const Acc<T>* add) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    scale_pixels<kAdd>(
        p, deal, pixels_of<const T>(piece, deal, pixels, p.channels),
        pixels_of<T>(to, deal, n, first), pixels, mul, add);
  } else {
    for_segments<false>(p, part, [&](const Segment& g) {
      if (T* dst = segment_of<T>(p, to, n, g)) {
        const int row = g.s * p.channels + g.c;
        scale_segment<T, V, kAdd>(
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
#pragma unroll 4
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

  fetch<T, V, kLast>(p, p.feats, n, rank, piece);
  fetched();
  sum_piece<T, V, kLast, false, false>(
      p, n, rank, piece, nullptr, p.feats, sums, meet);
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
  T* feats = piece;
  if (p.pieces == 2) {
    feats = shared.take<T>(piece_elements<kLast>(p));
    fetch<T, V, kLast>(p, p.feats, n, rank, feats);
  }
  A* meet = shared.take<A>(block_threads() * (kLast ? V : 1));
  A* sums = shared.take<A>(vector);
  fetch<T, V, kLast>(p, p.grad_out, n, rank, piece);
  fetched();
  if (p.pieces == 2) {
    sum_piece<T, V, kLast, true, true>(
        p, n, rank, piece, feats, p.feats, sums, meet);
  } else {
    sum_piece<T, V, kLast, true, false>(
        p, n, rank, piece, nullptr, p.feats, sums, meet);
  }

  // taken here, not above: their addresses would occupy registers for the sums
  A* da = shared.take<A>(vector);
  A* grad_v = shared.take<A>(vector);
  A* grad_pooled = shared.take<A>(vector);
  A* hidden = shared.take<A>(units);
  A* grad_u = shared.take<A>(units);
  Message* message = shared.take<Message>(1);
  gather<T, kLast>(p, sums, A(1), da);
  const A* attention = row_of<A>(p.attention, n, vector);
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
