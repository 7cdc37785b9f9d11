// How a sample is cut into parts, and both passes over a part: the sums of its
// channels, then what the maps become.
#pragma once

#include "cuda/sums.cuh"

namespace epsa::cuda {

// ---- how one sample is cut (Split) ----

EPSA_DEVICE int part_begin(const Split& split, int part) {
  const int more = split.units % split.parts;
  return part * (split.units / split.parts) + (part < more ? part : more);
}

// A part in channels_last, whose units are pixels.
struct PixelRange {
  int first, pixels;
};
EPSA_DEVICE PixelRange pixels_of_part(const Split& split, int part) {
  const int first = part_begin(split, part);
  return {first, part_begin(split, part + 1) - first};
}

// The part that holds a unit.
EPSA_DEVICE int part_of(const Split& split, int unit) {
  const int least = split.units / split.parts;
  const int more = split.units % split.parts;
  return unit < more * (least + 1) ? unit / (least + 1) : (unit - more) / least;
}

// A dense piece of one contiguous branch: `rows` rows of `pixels` pixels. The first
// row begins at pixel m of channel c. There are several rows only where rows are
// whole planes.
struct Segment {
  int s;
  int c, m;
  int rows, pixels;
};

// Visits the segments of a part. kChunks: may planes be cut?
template <bool kChunks, class Visit>
EPSA_DEVICE void for_segments(const Params& p, int part, const Visit& visit) {
  const Split& split = p.split;
  const bool chunk = kChunks && split.chunks > 1;
  const int plane = chunk ? part / split.chunks : 0;
  const int begin = chunk ? plane : part_begin(split, part);
  const int end = chunk ? plane + 1 : part_begin(split, part + 1);
  const int per_branch = p.channels / split.planes;
  for (int s = begin / per_branch; s * per_branch < end; ++s) {
    const int first = s * per_branch, last = first + per_branch;
    const int from = begin > first ? begin : first;
    const int to = end < last ? end : last;
    Segment segment{s, (from - first) * split.planes, 0, (to - from) * split.planes, p.pixels};
    if (chunk) {
      segment.m = part % split.chunks * split.chunk;
      const int rest = p.pixels - segment.m;
      segment.pixels = rest < split.chunk ? rest : split.chunk;
    }
    visit(segment);
  }
}

// Sample n of a map, from the element `offset` on; null where there is no map.
template <class T>
EPSA_DEVICE T* map_of(const Maps& maps, int s, int n, int64_t offset) {
  T* data = static_cast<T*>(maps.data[s]);
  return data ? data + n * maps.batch_stride[s] + offset : nullptr;
}

template <class T>
EPSA_DEVICE T* segment_of(const Params& p, const Maps& maps, int n, const Segment& g) {
  return map_of<T>(maps, g.s, n, int64_t{g.c} * p.pixels + g.m);
}

// How threads are dealt out in channels_last. Each branch has an equal share of the
// threads. A thread keeps to one column of V channels and walks down the pixels.
// Neighbouring threads read neighbouring addresses.
template <int V>
struct Columns {
  int s, column, row;  // of this thread
  int per_branch, columns, rows;
  int vectors;  // of V channels, in one branch
  bool active;

  EPSA_DEVICE explicit Columns(const Params& p) {
    // unsigned division takes fewer registers
    const unsigned thread = thread_id();
    const unsigned each = block_threads() / static_cast<unsigned>(p.branches);
    const unsigned most = static_cast<unsigned>(p.channels) / V;
    const unsigned wide = most < each ? most : each;
    s = thread / each;
    column = thread % each % wide;
    row = thread % each / wide;
    per_branch = each;
    columns = wide;
    rows = each / wide;
    vectors = most;
    active = s < p.branches && row < rows;
  }
};

// This thread's way down its column: its first element and the distance to its next
// pixel. The element is null where there is no map.
template <class T, class Step>
struct Pixels {
  T* at;
  Step step;
};

// Sample n's pixels from the pixel `first` on.
template <class T, int V>
EPSA_DEVICE Pixels<T, int64_t> pixels_of(
    const Maps& maps, const Columns<V>& deal, int n, int first) {
  const int64_t stride = maps.pixel_stride[deal.s];
  return {
      map_of<T>(maps, deal.s, n, (first + deal.row) * stride + deal.column * V),
      deal.rows * stride};
}

// The same in a dense piece [S, pixels, C].
template <class T, int V>
EPSA_DEVICE Pixels<T, int> pixels_of(T* piece, const Columns<V>& deal, int pixels, int channels) {
  return {piece + (deal.s * pixels + deal.row) * channels + deal.column * V, deal.rows * channels};
}

// ---- the first pass ----

// Sums a thread's turns down one column: x, or x * y.
template <bool kDot, Held held, class T, int V, class XStep, class YStep>
EPSA_DEVICE void sum_column(
    Pixels<const T, XStep> x, Pixels<const T, YStep> y, int turns, Acc<T> (&sum)[V]) {
  // Batches as in sum_turns would spill here. So the last turns, fewer than a
  // batch, wait for each other.
#pragma unroll(kSumTurns<V, kDot, held>)
  for (int turn = 0; turn < turns; ++turn) {
    const Pack<T, V> pack_x = load<V>(x.at);
    x.at += x.step;
    if constexpr (kDot) {
      const Pack<T, V> pack_y = load<V>(y.at);
      y.at += y.step;
      add_terms<true>(pack_x, pack_y, sum);
    } else {
      add_terms<false>(pack_x, pack_x, sum);
    }
  }
}

// Sums `pixels` pixels of each branch's channels: sums[s * C + c]. `meet` holds V
// values for each thread.
template <bool kDot, Held held, class T, int V, class XStep, class YStep>
EPSA_DEVICE void sum_pixels(
    const Params& p, const Columns<V>& deal, Pixels<const T, XStep> x, Pixels<const T, YStep> y,
    int pixels, Acc<T>* sums, Acc<T>* meet) {
  using A = Acc<T>;
  const int width = deal.columns * V;
  const int turns = deal.active ? turns_of(deal.row, pixels, deal.rows) : 0;
  for (int first = 0; first < deal.vectors; first += deal.columns) {
    A sum[V] = {};
    if (first + deal.column < deal.vectors) {
      sum_column<kDot, held>(x, y, turns, sum);
      x.at += width;
      y.at += width;
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

// Sums x, or x * y, over the rows of a segment.
template <class T, int V, bool kDot, Held held>
EPSA_DEVICE void sum_segment(
    const Params& p, const T* x, const T* y, const Segment& g, Acc<T>* sums, Acc<T>* meet) {
  // Planes of 49 or 196 pixels do not all begin at a multiple of V.
  if (p.pixels % V == 0) {
    sum_rows<T, V, kDot, held>(x, y, g.rows, g.pixels, sums, meet);
    return;
  }
  if constexpr (V == 8) {
    if (p.pixels % 4 == 0) {
      sum_rows<T, 4, kDot, held>(x, y, g.rows, g.pixels, sums, meet);
      return;
    }
  }
  sum_rows<T, 1, kDot, held>(x, y, g.rows, g.pixels, sums, meet);
}

// ---- the second pass ----

// How results are written. evict_first: vectors of 16 bytes leave the L2 cache before the
// maps, which streaming reads again.
enum class Write { normal, evict_first };

template <Write write, int V, class T>
EPSA_DEVICE void put(T* to, const Pack<T, V>& pack) {
  if constexpr (write == Write::evict_first && sizeof pack == 16) {
    simt::store_evict_first(to, pack);
  } else {
    store<V>(to, pack);
  }
}

// What the maps become.
enum class Become {
  output,    // out = F * a
  gradient,  // dF = G * a + dp / M
  epilogue,  // out = relu(F * (a * scale) + shift), where the ReLU may be absent
};

// x * mul + add, of each channel: [S, C], or a segment's rows of them.
template <class A>
struct Factors {
  const A* mul;
  const A* add = nullptr;  // null for Become::output
  bool relu = false;       // for Become::epilogue

  EPSA_DEVICE Factors from(int channel) const {
    return {mul + channel, add ? add + channel : nullptr, relu};
  }
};

// The turns of a batch: all their loads come before the first store.
template <int V, Become kBecome>
constexpr int kScaleTurns = kBecome != Become::output && V == 8 ? 1 : 2;

template <Become kBecome, class A>
EPSA_DEVICE A scaled(A x, A mul, A add, bool with_relu) {
  if constexpr (kBecome == Become::output) {
    return reweight(x, mul);
  }
  const A y = multiply_add(x, mul, add);
  return kBecome == Become::epilogue && with_relu ? relu(y) : y;
}

// What a channel's elements are added; nothing for an output.
template <Become kBecome, class A>
EPSA_DEVICE A summand(const Factors<A>& factors, int channel) {
  return kBecome == Become::output ? A(0) : factors.add[channel];
}

// Scales the pack that begins at element m of a row of `length` elements.
template <Become kBecome, bool kWhole, class T, int V>
EPSA_DEVICE void scale_pack(
    Pack<T, V>& pack, int row, int m, int length, const Factors<Acc<T>>& factors) {
  using A = Acc<T>;
  A a = factors.mul[row], d = summand<kBecome>(factors, row);
  transform(pack, [&](A x, int v) {
    const A y = scaled<kBecome>(x, a, d, factors.relu);
    if (!kWhole && v + 1 < V && ++m == length) {
      m = 0;
      ++row;
      a = factors.mul[row];
      d = summand<kBecome>(factors, row);
    }
    return y;
  });
}

// Scales rows of `pixels` elements by their factors. A null x means zeros. With
// kWhole, each pack lies in one row.
template <class T, int V, Become kBecome, Write write, bool kWhole>
EPSA_DEVICE void scale_rows(
    const T* x, T* to, int rows, int pixels, const Factors<Acc<T>>& factors) {
  constexpr int kTurns = kScaleTurns<V, kBecome>;
  const unsigned length = pixels;
  const int step = block_threads() * V;
  unsigned at = thread_id() * V;
  // Where the next pack begins. A division for each would take as long as its scaling.
  const int step_rows = step / length;
  int row = at / length, m = at % length;
  // All loads of a batch come first. The compiler moves no load across a store,
  // which might be to the same address.
#pragma unroll 1
  for (int left = turns_of(at, rows * pixels, step); left > 0; left -= kTurns) {
    Pack<T, V> packs[kTurns] = {};
    for (int k = 0; x && k < kTurns; ++k) {
      if (k < left) {
        packs[k] = load<V>(x + at + k * step);
      }
    }
    for (int k = 0; k < kTurns; ++k) {
      if (k < left) {
        scale_pack<kBecome, kWhole>(packs[k], row, m, pixels, factors);
        put<write>(to + at, packs[k]);
        at += step;
        row += step_rows;
        m += step - step_rows * pixels;
        if (m >= pixels) {
          m -= pixels;
          ++row;
        }
      }
    }
  }
}

template <class T, int V, Become kBecome, Write write>
EPSA_DEVICE void scale_segment(
    const T* x, T* to, int rows, int pixels, const Factors<Acc<T>>& factors) {
  if (pixels % V == 0) {
    scale_rows<T, V, kBecome, write, true>(x, to, rows, pixels, factors);
  } else if constexpr (V > 1) {
    scale_rows<T, V, kBecome, write, false>(x, to, rows, pixels, factors);
  }
}

// Scales a thread's turns down one column, whose channels have the factors `mul`.
template <Become kBecome, Write write, class T, int V, class Step>
EPSA_DEVICE void scale_column(
    Pixels<const T, Step> x, Pixels<T, int64_t> to, int turns, const Acc<T> (&mul)[V],
    const Acc<T> (&add)[V], bool relu) {
  constexpr int kTurns = kScaleTurns<V, kBecome>;
#pragma unroll 1
  for (int turn = 0; turn < turns; turn += kTurns) {
    Pack<T, V> packs[kTurns] = {};
    for (int k = 0; x.at && k < kTurns; ++k) {
      if (turn + k < turns) {
        packs[k] = load<V>(x.at);
        x.at += x.step;
      }
    }
    for (int k = 0; k < kTurns; ++k) {
      if (turn + k < turns) {
        Pack<T, V>& pack = packs[k];
        transform(pack, [&](Acc<T> value, int v) {
          return scaled<kBecome>(value, mul[v], add[v], relu);
        });
        put<write>(to.at, pack);
        to.at += to.step;
      }
    }
  }
}

template <Become kBecome, Write write, class T, int V, class Step>
EPSA_DEVICE void scale_pixels(
    const Params& p, const Columns<V>& deal, Pixels<const T, Step> x, Pixels<T, int64_t> to,
    int pixels, const Factors<Acc<T>>& factors) {
  using A = Acc<T>;
  if (!deal.active || !to.at) {
    return;
  }
  const int turns = turns_of(deal.row, pixels, deal.rows);
  for (int at = deal.column * V; at < p.channels; at += deal.columns * V) {
    A a[V], d[V];
    for (int v = 0; v < V; ++v) {
      const int channel = deal.s * p.channels + at + v;
      a[v] = factors.mul[channel];
      d[v] = summand<kBecome>(factors, channel);
    }
    scale_column<kBecome, write>(x, to, turns, a, d, factors.relu);
    x.at += x.at ? deal.columns * V : 0;
    to.at += deal.columns * V;
  }
}

}  // namespace epsa::cuda
