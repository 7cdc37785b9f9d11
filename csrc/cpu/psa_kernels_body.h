// The kernels of psa_kernels.h for one instruction set: included inside its
// namespace and target region, after vec.h and psa_math.h (no include guard).
//
// No lambdas and no std algorithms here: what is instantiated after the target
// region would be compiled for the baseline.

EPSA_FN int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
struct Body {
  using Mem = Memory<T>;
  using A = typename Mem::Acc;
  using V = Vec<A>;
  using AccMem = Memory<A>;
  static constexpr int64_t W = Mem::width;

  // ---- one element of the two passes over the maps ----

  template <bool kDot>
  static EPSA_FN V term(const T* x, const T* y) {
    return kDot ? Mem::load(x) * Mem::load(y) : Mem::load(x);
  }
  template <bool kDot>
  static EPSA_FN V term(const T* x, const T* y, int64_t n) {
    return kDot ? Mem::load(x, n) * Mem::load(y, n) : Mem::load(x, n);
  }
  template <bool kAdd>
  static EPSA_FN V scaled(V x, V mul, V add) {
    return kAdd ? reweight_grad(x, mul, add) : reweight(x, mul);
  }

  // ---- contiguous: lanes run along the pixels of one plane ----

  // Below this many pixels a plane is one chunk, and its ragged end counts.
  static constexpr int64_t kShortPlane = 512;

  // Sum of the n terms from index `first` of a dense block of `size` elements,
  // lane by lane. Vectors start at multiples of W in the block, not at `first`:
  // a plane of 49 or 196 pixels would else split almost every cache line. The
  // order of the sum depends on indices alone, never on addresses. Four sums
  // hide the latency of add; they are named, since an array indexed by a loop
  // that is not unrolled would live in memory.
  template <bool kDot>
  static EPSA_FN V reduce_row(
      const T* x, const T* y, int64_t first, int64_t n, int64_t size) {
    V sum0{}, sum1{}, sum2{}, sum3{};
    const int64_t end = first + n, lane = first % W;
    int64_t i = first - lane;
    if (lane) {
      const V head = i + W <= size ? term<kDot>(x + i, y + i)
                                   : term<kDot>(x + i, y + i, size - i);
      sum3 = keep_lanes<A>(head, lane, end - i);
      i += W;
    }
    for (; i + 4 * W <= end; i += 4 * W) {
      sum0 += term<kDot>(x + i, y + i);
      sum1 += term<kDot>(x + i + W, y + i + W);
      sum2 += term<kDot>(x + i + 2 * W, y + i + 2 * W);
      sum3 += term<kDot>(x + i + 3 * W, y + i + 3 * W);
    }
    if (i + W <= end) {
      sum0 += term<kDot>(x + i, y + i);
      i += W;
    }
    if (i + W <= end) {
      sum1 += term<kDot>(x + i, y + i);
      i += W;
    }
    if (i + W <= end) {
      sum2 += term<kDot>(x + i, y + i);
      i += W;
    }
    if (i < end) {
      sum0 += term<kDot>(x + i, y + i, end - i);
    }
    return (sum0 + sum1) + (sum2 + sum3);
  }

  // From the last element to the first, as scale_planes goes; the lines to be
  // written are asked for ahead (measured: 5 to 15% of the pass).
  template <bool kAdd>
  static EPSA_FN void scale_row(const T* x, T* dst, V mul, V add, int64_t n) {
    constexpr int64_t kAhead = 1024 / sizeof(T);
    int64_t i = n - n % W;
    if (i < n) {
      const V v = scaled<kAdd>(Mem::load(x + i, n - i), mul, add);
      Mem::store(dst + i, v, n - i);
    }
    for (; i >= 4 * W; i -= 4 * W) {
      for (int k = 1; k <= 4; ++k) {
        const int64_t j = i - k * W;
        __builtin_prefetch(dst + j - kAhead, /*write=*/1);
        Mem::store(dst + j, scaled<kAdd>(Mem::load(x + j), mul, add));
      }
    }
    for (; i > 0; i -= W) {
      Mem::store(dst + i - W, scaled<kAdd>(Mem::load(x + i - W), mul, add));
    }
  }

  // `mul` in the lanes before `split`, `next` in the others
  static EPSA_FN V blend(V mul, V next, int64_t split) {
    using Int = typename LanesOf<A>::Int;
    return LanesOf<A>::get() < static_cast<Int>(split) ? mul : next;
  }

  // The planes [c, last) of one branch, where a plane is short and no multiple
  // of the vector: vectors start at multiples of W in the branch's block, as in
  // reduce_row, and one that straddles two planes takes each lane's factor from
  // its own. A plane of 49 pixels would else split most cache lines (measured:
  // half the time of that pass).
  template <bool kAdd>
  static EPSA_FN void scale_block_of_planes(
      const T* x, T* dst, const A* mul, const A* add, int64_t plane, int64_t c,
      int64_t last) {
    int64_t i = c * plane;
    V m = V{} + mul[c], d = kAdd ? V{} + add[c] : V{};
    if (i % W) {
      const int64_t n = W - i % W;
      Mem::store(dst + i, scaled<kAdd>(Mem::load(x + i, n), m, d), n);
      i += n;
    }
    for (; c < last; ++c) {
      const int64_t end = (c + 1) * plane;
      for (; i + W <= end; i += W) {
        Mem::store(dst + i, scaled<kAdd>(Mem::load(x + i), m, d));
      }
      if (c + 1 == last) {
        if (i < end) {
          const V v = scaled<kAdd>(Mem::load(x + i, end - i), m, d);
          Mem::store(dst + i, v, end - i);
        }
        return;
      }
      const V next_m = V{} + mul[c + 1];
      const V next_d = kAdd ? V{} + add[c + 1] : V{};
      if (i < end) {
        const V both = scaled<kAdd>(
            Mem::load(x + i), blend(m, next_m, end - i),
            kAdd ? blend(d, next_d, end - i) : V{});
        Mem::store(dst + i, both);
        i += W;
      }
      m = next_m;
      d = next_d;
    }
  }

  template <bool kDot>
  static void reduce_planes(
      const Geometry& g, const Maps& x, const Maps* y, A* partial, int64_t n,
      int64_t begin, int64_t end) {
    const int64_t plane = g.pixels, block = g.channels * plane;
    int64_t k = begin % g.chunks;
    int64_t c = begin / g.chunks % g.channels;
    int64_t s = begin / g.chunks / g.channels;
    for (int64_t u = begin; u < end; ++u) {
      const int64_t first = k * g.chunk;
      partial[u] = sum_lanes(reduce_row<kDot>(
          map<const T>(x, s, n), kDot ? map<const T>(*y, s, n) : nullptr,
          c * plane + first, smaller(g.chunk, plane - first), block));
      if (++k == g.chunks) {
        k = 0;
        if (++c == g.channels) {
          c = 0;
          ++s;
        }
      }
    }
  }

  template <bool kAdd>
  static void scale_planes(
      const Geometry& g, const Maps& x, const A* mul, const A* add,
      const Maps& dst, int64_t n, int64_t begin, int64_t end) {
    const int64_t plane = g.pixels;
    if (plane >= W && plane < kShortPlane && plane % W) {
      while (begin < end) {
        const int64_t s = begin / g.channels;
        const int64_t stop = smaller(end, (s + 1) * g.channels);
        if (dst.data[s]) {
          scale_block_of_planes<kAdd>(
              map<const T>(x, s, n), map<T>(dst, s, n), mul + s * g.channels,
              kAdd ? add + s * g.channels : nullptr, plane,
              begin - s * g.channels, stop - s * g.channels);
        }
        begin = stop;
      }
      return;
    }
    // Backwards: the planes that the reduction read last are still in cache.
    int64_t k = (end - 1) % g.chunks;
    int64_t c = (end - 1) / g.chunks % g.channels;
    int64_t s = (end - 1) / g.chunks / g.channels;
    for (int64_t u = end - 1; u >= begin; --u) {
      const int64_t first = k * g.chunk;
      const int64_t at = c * plane + first;
      const int64_t sc = s * g.channels + c;
      if (dst.data[s]) {
        scale_row<kAdd>(
            map<const T>(x, s, n) + at, map<T>(dst, s, n) + at, V{} + mul[sc],
            kAdd ? V{} + add[sc] : V{}, smaller(g.chunk, plane - first));
      }
      if (--k < 0) {
        k = g.chunks - 1;
        if (--c < 0) {
          c = g.channels - 1;
          --s;
        }
      }
    }
  }

  // ---- channels_last: lanes run along the channels of one pixel ----

  // Pixels that are walked through together, branch by branch: so few that the
  // slots of one tensor are swept front to back. Writes want it narrower.
  static constexpr int64_t kReduceTile = 16, kScaleTile = 4;

  // Adds the sums of B vectors of channels over `pixels` pixels to `partial`; U
  // pixels at a time in sums of their own, so that B * U additions are under
  // way. kTail: one vector of `lanes` channels only.
  template <bool kDot, int B, int U, bool kTail>
  static EPSA_FN void reduce_block(
      const T* x, int64_t x_stride, const T* y, int64_t y_stride,
      int64_t pixels, A* partial, int64_t lanes) {
    V sum[U][B] = {};
    int64_t m = 0;
    for (; m + U <= pixels; m += U) {
      for (int u = 0; u < U; ++u) {
        const T* px = x + (m + u) * x_stride;
        const T* py = kDot ? y + (m + u) * y_stride : nullptr;
        for (int b = 0; b < B; ++b) {
          sum[u][b] += kTail ? term<kDot>(px, py, lanes)
                             : term<kDot>(px + b * W, py + b * W);
        }
      }
    }
    for (; m < pixels; ++m) {
      const T* px = x + m * x_stride;
      const T* py = kDot ? y + m * y_stride : nullptr;
      for (int b = 0; b < B; ++b) {
        sum[0][b] += kTail ? term<kDot>(px, py, lanes)
                           : term<kDot>(px + b * W, py + b * W);
      }
    }
    for (int b = 0; b < B; ++b) {
      V total = sum[0][b];
      for (int u = 1; u < U; ++u) {
        total += sum[u][b];
      }
      if (kTail) {
        AccMem::store(partial, AccMem::load(partial, lanes) + total, lanes);
      } else {
        AccMem::store(partial + b * W, AccMem::load(partial + b * W) + total);
      }
    }
  }

  template <bool kDot>
  static void reduce_pixels(
      const Geometry& g, const Maps& x, const Maps* y, A* partial, int64_t n,
      int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      for (int s = 0; s < g.branches; ++s) {
        A* sums = partial + (s * g.chunks + u) * g.channels;
        for (int64_t c = 0; c < g.channels; ++c) {
          sums[c] = 0;
        }
      }
      const int64_t stop = smaller((u + 1) * g.chunk, g.pixels);
      for (int64_t m = u * g.chunk; m < stop; m += kReduceTile) {
        const int64_t pixels = smaller(kReduceTile, stop - m);
        reduce_tile<kDot>(g, x, y, partial, n, u, m, pixels);
      }
    }
  }

  template <bool kDot>
  static EPSA_FN void reduce_tile(
      const Geometry& g, const Maps& x, const Maps* y, A* partial, int64_t n,
      int64_t u, int64_t first, int64_t pixels) {
    for (int s = 0; s < g.branches; ++s) {
      const int64_t xs = x.pixel_stride[s];
      const int64_t ys = kDot ? y->pixel_stride[s] : 0;
      const T* px = map<const T>(x, s, n) + first * xs;
      const T* py = kDot ? map<const T>(*y, s, n) + first * ys : nullptr;
      A* sums = partial + (s * g.chunks + u) * g.channels;
      int64_t c = 0;
      for (; c + 4 * W <= g.channels; c += 4 * W) {
        reduce_block<kDot, 4, 2, false>(
            px + c, xs, kDot ? py + c : py, ys, pixels, sums + c, W);
      }
      for (; c + W <= g.channels; c += W) {
        reduce_block<kDot, 1, 4, false>(
            px + c, xs, kDot ? py + c : py, ys, pixels, sums + c, W);
      }
      if (c < g.channels) {
        reduce_block<kDot, 1, 4, true>(
            px + c, xs, kDot ? py + c : py, ys, pixels, sums + c,
            g.channels - c);
      }
    }
  }

  template <bool kAdd, int B, bool kTail>
  static EPSA_FN void scale_block(
      const T* x, int64_t x_stride, T* dst, int64_t dst_stride, int64_t pixels,
      const A* mul, const A* add, int64_t lanes) {
    V a[B], d[B];
    for (int b = 0; b < B; ++b) {
      a[b] = kTail ? AccMem::load(mul, lanes) : AccMem::load(mul + b * W);
      d[b] = !kAdd ? V{}
          : kTail  ? AccMem::load(add, lanes)
                   : AccMem::load(add + b * W);
    }
    for (int64_t m = 0; m < pixels; ++m) {
      const T* px = x + m * x_stride;
      T* to = dst + m * dst_stride;
      for (int b = 0; b < B; ++b) {
        if (kTail) {
          Mem::store(to, scaled<kAdd>(Mem::load(px, lanes), a[b], d[b]), lanes);
        } else {
          const V v = Mem::load(px + b * W);
          Mem::store(to + b * W, scaled<kAdd>(v, a[b], d[b]));
        }
      }
    }
  }

  template <bool kAdd>
  static void scale_pixels(
      const Geometry& g, const Maps& x, const A* mul, const A* add,
      const Maps& dst, int64_t n, int64_t begin, int64_t end) {
    const int64_t first = begin * g.chunk;
    const int64_t stop = smaller(end * g.chunk, g.pixels);
    // backwards, as scale_planes
    int64_t m = first + (stop - first - 1) / kScaleTile * kScaleTile;
    for (; m >= first; m -= kScaleTile) {
      const int64_t pixels = smaller(kScaleTile, stop - m);
      scale_tile<kAdd>(g, x, mul, add, dst, n, m, pixels);
    }
  }

  template <bool kAdd>
  static EPSA_FN void scale_tile(
      const Geometry& g, const Maps& x, const A* mul, const A* add,
      const Maps& dst, int64_t n, int64_t first, int64_t pixels) {
    for (int s = 0; s < g.branches; ++s) {
      if (!dst.data[s]) {
        continue;
      }
      const int64_t xs = x.pixel_stride[s];
      const int64_t ds = dst.pixel_stride[s];
      const T* px = map<const T>(x, s, n) + first * xs;
      T* to = map<T>(dst, s, n) + first * ds;
      const A* a = mul + s * g.channels;
      const A* d = kAdd ? add + s * g.channels : nullptr;
      int64_t c = 0;
      for (; c + 4 * W <= g.channels; c += 4 * W) {
        scale_block<kAdd, 4, false>(
            px + c, xs, to + c, ds, pixels, a + c, kAdd ? d + c : d, W);
      }
      for (; c + W <= g.channels; c += W) {
        scale_block<kAdd, 1, false>(
            px + c, xs, to + c, ds, pixels, a + c, kAdd ? d + c : d, W);
      }
      if (c < g.channels) {
        scale_block<kAdd, 1, true>(
            px + c, xs, to + c, ds, pixels, a + c, kAdd ? d + c : d,
            g.channels - c);
      }
    }
  }

  // ---- entry points of the two passes ----

  template <class P>
  static EPSA_FN P* map(const Maps& maps, int64_t s, int64_t n) {
    return static_cast<P*>(maps.data[s]) + n * maps.batch_stride[s];
  }

  static void reduce(
      const Geometry& g, const Maps& x, const Maps* y, void* partial, int64_t n,
      int64_t begin, int64_t end) {
    A* sums = static_cast<A*>(partial);
    const bool planes = g.layout == Layout::contiguous;
    if (y) {
      (planes ? reduce_planes<true> : reduce_pixels<true>)(
          g, x, y, sums, n, begin, end);
    } else {
      (planes ? reduce_planes<false> : reduce_pixels<false>)(
          g, x, y, sums, n, begin, end);
    }
  }

  static void scale(
      const Geometry& g, const Maps& x, const void* mul, const void* add,
      const Maps& dst, int64_t n, int64_t begin, int64_t end) {
    const A* m = static_cast<const A*>(mul);
    const A* a = static_cast<const A*>(add);
    const bool planes = g.layout == Layout::contiguous;
    if (add) {
      (planes ? scale_planes<true> : scale_pixels<true>)(
          g, x, m, a, dst, n, begin, end);
    } else {
      (planes ? scale_planes<false> : scale_pixels<false>)(
          g, x, m, a, dst, n, begin, end);
    }
  }
};

// The SE MLP and the softmax, on vectors of the accumulation type: lanes along
// the channels.
template <class A>
struct Gate {
  using Mem = Memory<A>;
  using V = Vec<A>;
  static constexpr int64_t W = Mem::width;

  // A row of C values that may end within a vector.
  static EPSA_FN V load(const A* p, int64_t n) {
    return n >= W ? Mem::load(p) : Mem::load(p, n);
  }
  static EPSA_FN void store(A* p, V v, int64_t n) {
    if (n >= W) {
      Mem::store(p, v);
    } else {
      Mem::store(p, v, n);
    }
  }

  static EPSA_FN A per_pixel(const Geometry& g) {
    return 1 / static_cast<A>(g.pixels);
  }

  static EPSA_FN A dot(const A* x, const A* y, int64_t n) {
    V sum{};
    int64_t i = 0;
    for (; i + W <= n; i += W) {
      sum += Mem::load(x + i) * Mem::load(y + i);
    }
    if (i < n) {
      sum += Mem::load(x + i, n - i) * Mem::load(y + i, n - i);
    }
    return sum_lanes(sum);
  }

  // The chunks' partial sums of each channel, added in the order of chunks.
  static EPSA_FN void combine(const Geometry& g, const A* partial, A* sums) {
    if (partial == sums) {  // one chunk, summed in place
      return;
    }
    const int64_t count = g.branches * g.channels;
    if (g.layout == Layout::contiguous) {  // [S, C, chunks]
      for (int64_t i = 0; i < count; ++i) {
        A sum = partial[i * g.chunks];
        for (int64_t k = 1; k < g.chunks; ++k) {
          sum += partial[i * g.chunks + k];
        }
        sums[i] = sum;
      }
      return;
    }
    for (int s = 0; s < g.branches; ++s) {  // [S, chunks, C]
      const A* rows = partial + s * g.chunks * g.channels;
      for (int64_t c = 0; c < g.channels; c += W) {
        const int64_t n = g.channels - c;
        V sum = load(rows + c, n);
        for (int64_t k = 1; k < g.chunks; ++k) {
          sum += load(rows + k * g.channels + c, n);
        }
        store(sums + s * g.channels + c, sum, n);
      }
    }
  }

  // h = relu(W1 p + b1)
  static EPSA_FN void hidden_units(
      const Geometry& g, const Weights& w, const A* pooled, A* hidden) {
    for (int s = 0; s < g.branches; ++s) {
      const A* fc1 = static_cast<const A*>(w.fc1) + s * w.matrix_stride;
      const A* bias = static_cast<const A*>(w.fc1_bias);
      for (int64_t j = 0; j < g.hidden; ++j) {
        A u = dot(fc1 + j * g.channels, pooled + s * g.channels, g.channels);
        if (bias) {
          u += bias[s * w.hidden_stride + j];
        }
        hidden[s * g.hidden + j] = relu(u);
      }
    }
  }

  // sigmoid(W2 h + b2) of up to W channels
  static EPSA_FN V excitation(
      const Geometry& g, const Weights& w, const A* hidden, int s, int64_t c) {
    const int64_t n = g.channels - c;
    const A* fc2t = static_cast<const A*>(w.fc2t) + s * w.matrix_stride + c;
    const A* bias = static_cast<const A*>(w.fc2_bias);
    V v = bias ? load(bias + s * w.channel_stride + c, n) : V{};
    for (int64_t j = 0; j < g.hidden; ++j) {
      v += load(fc2t + j * g.channels, n) * hidden[s * g.hidden + j];
    }
    return sigmoid_from_exp(exp(-v));
  }

  static void gate(
      const Geometry& g, const Weights& w, const void* partial_, void* pooled_,
      void* hidden_, void* attention_) {
    A* pooled = static_cast<A*>(pooled_);
    A* hidden = static_cast<A*>(hidden_);
    A* attention = static_cast<A*>(attention_);
    if (partial_) {
      combine(g, static_cast<const A*>(partial_), pooled);
      const int64_t count = g.branches * g.channels;
      for (int64_t i = 0; i < count; i += W) {
        const V sum = load(pooled + i, count - i);
        store(pooled + i, sum * per_pixel(g), count - i);
      }
    }
    hidden_units(g, w, pooled, hidden);
    for (int64_t c = 0; c < g.channels; c += W) {
      // z lies in (0, 1), so exp needs no shift by the maximum
      V e[kMaxBranches];
      V sum{};
      for (int s = 0; s < g.branches; ++s) {
        e[s] = exp(excitation(g, w, hidden, s, c));
        sum += e[s];
      }
      const V scale = 1 / sum;
      for (int s = 0; s < g.branches; ++s) {
        store(attention + s * g.channels + c, e[s] * scale, g.channels - c);
      }
    }
  }

  static void gate_grad(
      const Geometry& g, const Weights& w, const void* partial_, bool of_output,
      const void* grad_attention_, const void* pooled_, const void* attention_,
      void* hidden_, void* grad_v_, void* grad_u_, void* grad_pooled_) {
    const A* grad_attention = static_cast<const A*>(grad_attention_);
    const A* attention = static_cast<const A*>(attention_);
    A* hidden = static_cast<A*>(hidden_);
    A* grad_v = static_cast<A*>(grad_v_);
    A* grad_u = static_cast<A*>(grad_u_);
    A* grad_pooled = static_cast<A*>(grad_pooled_);
    A* grad_a = grad_pooled;  // until it is overwritten at the end
    if (partial_) {
      combine(g, static_cast<const A*>(partial_), grad_a);
    }
    hidden_units(g, w, static_cast<const A*>(pooled_), hidden);
    for (int64_t c = 0; c < g.channels; c += W) {
      const int64_t n = g.channels - c;
      V da[kMaxBranches];
      V dot{};
      for (int s = 0; s < g.branches; ++s) {
        const int64_t at = s * g.channels + c;
        da[s] = partial_ ? load(grad_a + at, n) : V{};
        if (of_output) {  // which is F * a: the sums are a * da
          da[s] /= load(attention + at, n);
        }
        if (grad_attention) {
          da[s] += load(grad_attention + at, n);
        }
        dot += load(attention + at, n) * da[s];
      }
      for (int s = 0; s < g.branches; ++s) {
        const int64_t at = s * g.channels + c;
        const V dz = softmax_grad(load(attention + at, n), da[s], dot);
        const V z = excitation(g, w, hidden, s, c);
        store(grad_v + at, sigmoid_grad(dz, z), n);
      }
    }
    for (int s = 0; s < g.branches; ++s) {
      const A* fc1 = static_cast<const A*>(w.fc1) + s * w.matrix_stride;
      const A* fc2t = static_cast<const A*>(w.fc2t) + s * w.matrix_stride;
      A* du = grad_u + s * g.hidden;
      for (int64_t j = 0; j < g.hidden; ++j) {
        const A dh =
            dot(grad_v + s * g.channels, fc2t + j * g.channels, g.channels);
        du[j] = relu_grad(dh, hidden[s * g.hidden + j]);
      }
      for (int64_t c = 0; c < g.channels; c += W) {
        const int64_t n = g.channels - c;
        V dp{};
        for (int64_t j = 0; j < g.hidden; ++j) {
          dp += load(fc1 + j * g.channels + c, n) * du[j];
        }
        store(grad_pooled + s * g.channels + c, dp * per_pixel(g), n);
      }
    }
  }

  // sum over the rows (n, s) of x[n, s, j] * y[n, s, c .. c + W), or of y alone
  static EPSA_FN V row_sum(
      const Geometry& g, int64_t samples, int first, int last, const A* x,
      int64_t j, const A* y, int64_t c) {
    V sum{};
    for (int64_t n = 0; n < samples; ++n) {
      for (int s = first; s < last; ++s) {
        const int64_t row = n * g.branches + s;
        const V v = load(y + row * g.channels + c, g.channels - c);
        sum += x ? v * x[row * g.hidden + j] : v;
      }
    }
    return sum;
  }

  static void weight_grad(
      const Geometry& g, int64_t samples, bool shared, const void* pooled_,
      const void* hidden_, const void* grad_v_, const void* grad_u_,
      const WeightGrads& grads, int64_t begin, int64_t end) {
    const A* pooled = static_cast<const A*>(pooled_);
    const A* hidden = static_cast<const A*>(hidden_);
    const A* grad_v = static_cast<const A*>(grad_v_);
    const A* grad_u = static_cast<const A*>(grad_u_);
    for (int64_t bj = begin; bj < end; ++bj) {
      const int64_t b = bj / g.hidden, j = bj % g.hidden;
      const int first = shared ? 0 : static_cast<int>(b);
      const int last = shared ? g.branches : first + 1;
      if (grads.fc1_bias) {
        A sum = 0;
        for (int64_t n = 0; n < samples; ++n) {
          for (int s = first; s < last; ++s) {
            sum += grad_u[(n * g.branches + s) * g.hidden + j];
          }
        }
        static_cast<A*>(grads.fc1_bias)[bj] = sum;
      }
      for (int64_t c = 0; c < g.channels; c += W) {
        const int64_t n = g.channels - c;
        if (grads.fc1) {
          store(
              static_cast<A*>(grads.fc1) + bj * g.channels + c,
              row_sum(g, samples, first, last, grad_u, j, pooled, c), n);
        }
        if (grads.fc2) {
          A column[W];
          Mem::store(
              column, row_sum(g, samples, first, last, hidden, j, grad_v, c));
          A* fc2 = static_cast<A*>(grads.fc2) +
              (b * g.channels + c) * g.hidden + j;
          for (int64_t i = 0; i < smaller(W, n); ++i) {
            fc2[i * g.hidden] = column[i];
          }
        }
        if (grads.fc2_bias && j == 0) {
          store(
              static_cast<A*>(grads.fc2_bias) + b * g.channels + c,
              row_sum(g, samples, first, last, nullptr, 0, grad_v, c), n);
        }
      }
    }
  }
};

template <class T>
constexpr Kernels table = {
    Body<T>::reduce,
    Body<T>::scale,
    Gate<typename Memory<T>::Acc>::gate,
    Gate<typename Memory<T>::Acc>::gate_grad,
    Gate<typename Memory<T>::Acc>::weight_grad,
};

inline const Kernels& kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32:
      return table<float>;
    case Dtype::f64:
      return table<double>;
    case Dtype::bf16:
      return table<bf16>;
    case Dtype::f16:
      return table<f16>;
  }
  __builtin_unreachable();
}
