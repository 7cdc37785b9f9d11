// The streaming kernels: blocks take tickets, in order, from a counter.
//
// A pool ticket sums one part of a sample and never waits. The block whose part
// arrives last also runs the sample's SE MLP. A reweight ticket waits for that
// block. All tickets that it waits for have lower numbers, so a single resident
// block makes progress.
#pragma once

#include "cuda/gate.cuh"
#include "cuda/parts.cuh"
#include "cuda/weight_grads.cuh"

namespace epsa::cuda {

// Sums x, or x * y, over one part of sample n. The contiguous layout gives one sum
// for each row of a segment: [S, C, chunks]. channels_last gives [S, C].
template <class T, int V, bool kLast, bool kDot>
EPSA_DEVICE void sum_part(
    const Params& p, int n, int part, const Maps& x, const Maps& y, Acc<T>* sums, Acc<T>* meet) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    sum_pixels<kDot, Held::none>(
        p, deal, pixels_of<const T>(x, deal, n, first), pixels_of<const T>(y, deal, n, first),
        pixels, sums, meet);
  } else {
    for_segments<true>(p, part, [&](const Segment& g) {
      const int row = (g.s * p.channels + g.c) * p.split.chunks +
          (p.split.chunks > 1 ? g.m / p.split.chunk : 0);
      sum_segment<T, V, kDot, Held::none>(
          p, segment_of<const T>(p, x, n, g), kDot ? segment_of<const T>(p, y, n, g) : nullptr, g,
          sums + row, meet);
    });
  }
}

// Writes what one part of sample n becomes.
template <class T, int V, bool kLast, Become kBecome>
EPSA_DEVICE void scale_part(
    const Params& p, int n, int part, const Maps& x, const Maps& to,
    const Factors<Acc<T>>& factors) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    scale_pixels<kBecome, Write::evict_first>(
        p, deal, pixels_of<const T>(x, deal, n, first), pixels_of<T>(to, deal, n, first), pixels,
        factors);
  } else {
    for_segments<true>(p, part, [&](const Segment& g) {
      if (T* dst = segment_of<T>(p, to, n, g)) {
        scale_segment<T, V, kBecome, Write::evict_first>(
            segment_of<const T>(p, x, n, g), dst, g.rows, g.pixels,
            factors.from(g.s * p.channels + g.c));
      }
    });
  }
}

// Takes tickets until none is left. Tickets come in this order:
//   1. the pools of the first `lag` samples;
//   2. sample by sample, the pools of one and the reweights of the sample `lag`
//      before it;
//   3. the reweights of the last `lag` samples.
// The reweights take a sample's parts in reverse: what was read last is most likely
// still in the L2 cache.
template <class PoolTicket, class ReweightTicket>
EPSA_DEVICE void for_tickets(
    const Params& p, int pools, int reweights, Message* message, const PoolTicket& pool,
    const ReweightTicket& reweight) {
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
    int n, j;  // sample; its pool if j < pools, else its reweight j - pools
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
      reweight(n, reweights - 1 - (j - pools));
    }
  }
}

// Adds up a sample's partial sums. Call it in the block whose part arrived last:
// only that block sees all of them.
template <class T, bool kLast>
EPSA_DEVICE void combine_parts(const Params& p, const Acc<T>* partial, Acc<T> scale, Acc<T>* to) {
  if constexpr (kLast) {  // [parts, S, C]
    combine(p, partial, 1, p.split.parts, p.branches * p.channels, scale, to);
  } else {  // [S, C, chunks]
    combine(p, partial, p.split.chunks, p.split.chunks, 1, scale, to);
  }
}

// Tells waiting blocks that sample n's attention and gradients are written.
EPSA_DEVICE void set_ready(const Params& p, int n) {
  barrier();
  if (thread_id() == 0) {
    simt::publish(&p.ready[n]);
  }
}

EPSA_DEVICE void wait_ready(const Params& p, int n) {
  if (thread_id() == 0) {
    while (!simt::is_published(&p.ready[n])) {
      do {
        simt::pause();
      } while (!simt::is_set(&p.ready[n]));
    }
  }
  barrier();
}

template <class T, int V, bool kLast, bool kEpilogue>
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
              p, n, part, p.feats, p.feats, kLast ? partial + int64_t{part} * vector : partial,
              meet);
          if (!last_to_arrive(&p.arrived[n], parts, message)) {
            return;
          }
          combine_parts<T, kLast>(p, partial, 1 / static_cast<A>(p.pixels), pooled);
        }
        A* scores = row_of<A>(p.scratch, n, vector);
        A* attention = row_of<A>(p.attention, n, vector);
        gate<T>(p, pooled, row_of<A>(p.hidden_units, n, p.branches * p.hidden), scores, attention);
        if constexpr (kEpilogue) {
          epilogue<T>(p, attention, scores, row_of<A>(p.summands, n, vector));
        }
        set_ready(p, n);
      },
      [&](int n, int part) {
        wait_ready(p, n);
        if constexpr (kEpilogue) {
          scale_part<T, V, kLast, Become::epilogue>(
              p, n, part, p.feats, p.out,
              {row_of<A>(p.scratch, n, vector), row_of<A>(p.summands, n, vector), p.relu});
        } else {
          scale_part<T, V, kLast, Become::output>(
              p, n, part, p.feats, p.out, {row_of<A>(p.attention, n, vector)});
        }
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
              p, n, part, p.grad_out, p.feats, kLast ? partial + int64_t{part} * vector : partial,
              meet);
          if (!last_to_arrive(&p.arrived[n], parts, message)) {
            return;
          }
          combine_parts<T, kLast>(p, partial, A(1), da);
        } else {
#pragma unroll 1
          for (int i = thread_id(); i < vector; i += block_threads()) {
            da[i] = 0;  // the next loop over it deals out threads in the same way
          }
        }
        gate_grad<T>(
            p, p.grad_attention ? row_of<A>(p.grad_attention, n, vector) : nullptr,
            row_of<A>(p.pooled, n, vector), row_of<A>(p.attention, n, vector), da,
            row_of<A>(p.hidden_units, n, units), row_of<A>(p.grad_v, n, vector),
            row_of<A>(p.grad_u, n, units), row_of<A>(p.grad_pooled, n, vector));
        set_ready(p, n);
        if (p.weights_wanted) {
          begin_weight_grads(p, n);
          sum_weight_grads<T, 3>(p, n, message, nullptr, 0);
        }
      },
      [&](int n, int part) {
        wait_ready(p, n);
        scale_part<T, V, kLast, Become::gradient>(
            p, n, part, p.grad_out, p.grad_feats,
            {row_of<A>(p.attention, n, vector), row_of<A>(p.grad_pooled, n, vector)});
      });
}

}  // namespace epsa::cuda
