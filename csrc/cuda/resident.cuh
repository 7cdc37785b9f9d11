// The resident kernels: a cluster of blocks, or a single block, holds one sample in
// shared memory. Device memory is read once and written once.
#pragma once

#include "cuda/gate.cuh"
#include "cuda/parts.cuh"
#include "cuda/weight_grads.cuh"

namespace epsa::cuda {

// Starts the copy of one part of a sample to shared memory. The contiguous layout
// stores its segments one after another, channels_last stores [S, pixels, C].
template <class T, int V, bool kLast>
EPSA_DEVICE void fetch(const Params& p, const Maps& from, int n, int part, T* piece) {
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

// Waits until the copies of all threads have arrived. All threads call it.
EPSA_DEVICE void fetched() {
  simt::copy_async_wait();
  barrier();
}

// The elements of the largest part.
template <bool kLast>
EPSA_DEVICE int piece_elements(const Params& p) {
  const Split& split = p.split;
  const int units = (split.units + split.parts - 1) / split.parts;
  return units * (kLast ? p.branches * p.channels : split.planes * p.pixels);
}

// Sums x, or x * y, over the part in shared memory: [S, C]. A contiguous part
// writes the sums of its own planes only. With kBoth, y is in shared memory too;
// otherwise y comes from sample n's maps `from`.
template <class T, int V, bool kLast, bool kDot, bool kBoth>
EPSA_DEVICE void sum_piece(
    const Params& p, int n, int part, const T* piece, const T* y, const Maps& from, Acc<T>* sums,
    Acc<T>* meet) {
  constexpr Held held = kDot && !kBoth ? Held::x : Held::all;
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    const auto x = pixels_of<const T>(piece, deal, pixels, p.channels);
    if constexpr (kBoth) {
      sum_pixels<kDot, held>(
          p, deal, x, pixels_of<const T>(y, deal, pixels, p.channels), pixels, sums, meet);
    } else {
      sum_pixels<kDot, held>(
          p, deal, x, pixels_of<const T>(from, deal, n, first), pixels, sums, meet);
    }
  } else {
    for_segments<false>(p, part, [&](const Segment& g) {
      sum_segment<T, V, kDot, held>(
          p, piece,
          kBoth      ? y
              : kDot ? segment_of<const T>(p, from, n, g)
                     : nullptr,
          g, sums + g.s * p.channels + g.c, meet);
      piece += g.rows * g.pixels;
      y += kBoth ? g.rows * g.pixels : 0;
    });
  }
}

// Writes what the part in shared memory becomes.
template <class T, int V, bool kLast, Become kBecome>
EPSA_DEVICE void scale_piece(
    const Params& p, int n, int part, T* piece, const Maps& to, const Factors<Acc<T>>& factors) {
  if constexpr (kLast) {
    const Columns<V> deal(p);
    const auto [first, pixels] = pixels_of_part(p.split, part);
    scale_pixels<kBecome, Write::normal>(
        p, deal, pixels_of<const T>(piece, deal, pixels, p.channels),
        pixels_of<T>(to, deal, n, first), pixels, factors);
  } else {
    for_segments<false>(p, part, [&](const Segment& g) {
      if (T* dst = segment_of<T>(p, to, n, g)) {
        scale_segment<T, V, kBecome, Write::normal>(
            piece, dst, g.rows, g.pixels, factors.from(g.s * p.channels + g.c));
      }
      piece += g.rows * g.pixels;
    });
  }
}

// Adds up the sums of the cluster's blocks to the sample's: to [S, C]. It leaves
// the second half of the cluster's barrier to cluster_finish: a block must not
// exit while another block still reads its shared memory.
template <class T, bool kLast>
EPSA_DEVICE void gather(const Params& p, const Acc<T>* sums, Acc<T> scale, Acc<T>* to) {
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
    } else {  // one part holds the whole plane
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

template <class T, int V, bool kLast, bool kEpilogue>
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
  sum_piece<T, V, kLast, false, false>(p, n, rank, piece, nullptr, p.feats, sums, meet);
  gather<T, kLast>(p, sums, 1 / static_cast<A>(p.pixels), pooled);
  gate<T>(p, pooled, hidden, scores, attention);
  if (rank == 0) {
    copy_vector(pooled, row_of<A>(p.pooled, n, vector), vector);
    copy_vector(attention, row_of<A>(p.attention, n, vector), vector);
  }
  if constexpr (kEpilogue) {
    // Each thread has copied its own means, and the next pass reads none.
    epilogue<T>(p, attention, scores, pooled);
    scale_piece<T, V, kLast, Become::epilogue>(p, n, rank, piece, p.out, {scores, pooled, p.relu});
  } else {
    scale_piece<T, V, kLast, Become::output>(p, n, rank, piece, p.out, {attention});
  }
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
  A* sums = shared.take<A>(vector);
  T* piece = shared.take<T>(piece_elements<kLast>(p));
  T* feats = piece;
  if (p.pieces == 2) {
    feats = shared.take<T>(piece_elements<kLast>(p));
    fetch<T, V, kLast>(p, p.feats, n, rank, feats);
  }
  A* meet = shared.take<A>(block_threads() * (kLast ? V : 1));
  fetch<T, V, kLast>(p, p.grad_out, n, rank, piece);
  A* attention = shared.take<A>(vector);
  A* pooled = shared.take<A>(vector);
  // While the maps are under way:
  copy_vector(row_of<A>(p.pooled, n, vector), pooled, vector);
  copy_vector(row_of<A>(p.attention, n, vector), attention, vector);
  if (rank == 0 && p.weights_wanted) {
    begin_weight_grads(p, n);
  }
  fetched();
  if (p.pieces == 2) {
    sum_piece<T, V, kLast, true, true>(p, n, rank, piece, feats, p.feats, sums, meet);
  } else {
    sum_piece<T, V, kLast, true, false>(p, n, rank, piece, nullptr, p.feats, sums, meet);
  }

  // These pieces are taken after the sums. Their addresses would occupy registers during them.
  A* da = shared.take<A>(vector);
  A* grad_v = shared.take<A>(vector);
  A* grad_pooled = shared.take<A>(vector);
  A* hidden = shared.take<A>(units);
  A* grad_u = shared.take<A>(units);
  Message* message = shared.take<Message>(1);
  gather<T, kLast>(p, sums, A(1), da);
  gate_grad<T>(
      p, p.grad_attention ? row_of<A>(p.grad_attention, n, vector) : nullptr, pooled, attention, da,
      hidden, grad_v, grad_u, grad_pooled);
  scale_piece<T, V, kLast, Become::gradient>(
      p, n, rank, piece, p.grad_feats, {attention, grad_pooled});
  if (rank == 0 && p.weights_wanted) {
    copy_vector(hidden, row_of<A>(p.hidden_units, n, units), units);
    copy_vector(grad_v, row_of<A>(p.grad_v, n, vector), vector);
    copy_vector(grad_u, row_of<A>(p.grad_u, n, units), units);
    // After the next barrier no thread reads the maps. Their room is free then.
    const int bytes = p.pieces * piece_elements<kLast>(p) * static_cast<int>(sizeof(T));
    sum_weight_grads<T, 2>(
        p, n, message, reinterpret_cast<A*>(piece), bytes / static_cast<int>(sizeof(A)));
  }
  cluster_finish(p);
}

}  // namespace epsa::cuda
