// The kernels of conv_kernels.h for one instruction set: included inside its
// namespace and target region, after vec.h (no include guard).
//
// No lambdas and no std algorithms here: what is instantiated after the target
// region would be compiled for the baseline.

using V = Vec<float>;
constexpr int L = EPSA_VEC_BYTES / sizeof(float);
typedef V Line __attribute__((may_alias, aligned(EPSA_VEC_BYTES)));

EPSA_FN int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
EPSA_FN int64_t greater(int64_t a, int64_t b) { return a < b ? b : a; }
EPSA_FN int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

EPSA_FN V line(const float* p) { return *reinterpret_cast<const Line*>(p); }
// x in every lane (adding it to zeros would cost an addition: -0 + 0 is not -0)
EPSA_FN V splat(float x) {
#if EPSA_VEC_BYTES == 64
  return (V)_mm512_set1_ps(x);
#elif EPSA_VEC_BYTES == 32
  return (V)_mm256_set1_ps(x);
#else
  return V{x, x, x, x};
#endif
}
EPSA_FN void set_line(float* p, V v) { *reinterpret_cast<Line*>(p) = v; }

// ---- lanes of several vectors ----

typedef int32_t Lanes __attribute__((vector_size(EPSA_VEC_BYTES)));

// Of each run of 2 * H lanes of a and of b, the lower halves side by side, or the
// upper halves.
template <int H, bool kUpper>
struct HalvesOf {
  static constexpr Lanes mask() {
    Lanes m{};
    for (int l = 0; l < L; ++l) {
      m[l] = (l & H ? L + l - H : l) + (kUpper ? H : 0);
    }
    return m;
  }
};
template <int H, bool kUpper>
EPSA_FN V halves(V a, V b) {
  return __builtin_shuffle(a, b, HalvesOf<H, kUpper>::mask());
}

template <int H>
EPSA_FN void transpose_step(V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if ((i & H) == 0) {
      const V a = v[i], b = v[i + H];
      v[i] = halves<H, false>(a, b);
      v[i + H] = halves<H, true>(a, b);
    }
  }
}

// v as an L x L matrix
EPSA_FN void transpose(V* v) {
  transpose_step<1>(v);
  transpose_step<2>(v);
  if constexpr (L >= 8) {
    transpose_step<4>(v);
  }
  if constexpr (L >= 16) {
    transpose_step<8>(v);
  }
}

// Sums over the runs of G lanes, of G vectors: lane j * G + i of the result is
// the sum of run j of v[i].
template <int G>
EPSA_FN V sum_runs(const V* v) {
  if constexpr (G == 1) {
    return v[0];
  } else {
    V half[G / 2];  // run j of v[i] and of v[i + G/2], now side by side
#pragma GCC unroll 16
    for (int i = 0; i < G / 2; ++i) {
      const V a = v[i], b = v[i + G / 2];
      half[i] = halves<G / 2, false>(a, b) + halves<G / 2, true>(a, b);
    }
    return sum_runs<G / 2>(half);
  }
}

// Keeps a loaded vector in its register: GCC would fold the load into each
// instruction that uses it.
EPSA_FN void pin(V& v) {
#if EPSA_MULTI_ISA
  asm("" : "+v"(v));
#else
  (void)v;
#endif
}

// ---- one tile: P pixels of an output row, B vectors of sums for each ----

struct Tile {
  const float* x;  // the first pixel under the kernel's first tap
  int64_t row, step;  // floats from tap to tap, vertically and horizontally
  const float* w;  // [kernel_h][kernel_w][channels][B * L]
  int64_t kernel_w;
  int64_t first_row, last_row;  // the kernel's rows that lie in the image
  int64_t channels;  // broadcast: input channels, one lane each; dot: 1
  float* sums;  // of the first pixel
  int64_t pitch;  // of sums, from pixel to pixel
  bool add;  // to the sums that are there?
};

// acc += one tap of one channel (broadcast) or of L channels (dot): each pixel's
// value times B vectors of weights. Of the two, those that are fewer are held in
// registers.
template <int P, int B, int S, bool kDot>
EPSA_FN void add_tap(V (&acc)[P][B], const float* x, const float* w) {
  if constexpr (P >= B) {
    V weight[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      weight[b] = line(w + b * L);
    }
#pragma GCC unroll 28
    for (int p = 0; p < P; ++p) {
      V value = kDot ? line(x + p * S * L) : splat(x[p * S * L]);
      if constexpr (B > 1) {
        pin(value);
      }
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        acc[p][b] += value * weight[b];
      }
    }
  } else {
    V value[P];
#pragma GCC unroll 28
    for (int p = 0; p < P; ++p) {
      value[p] = kDot ? line(x + p * S * L) : splat(x[p * S * L]);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      V weight = line(w + b * L);
      pin(weight);
#pragma GCC unroll 28
      for (int p = 0; p < P; ++p) {
        acc[p][b] += value[p] * weight;
      }
    }
  }
}

template <int P, int B, int S, bool kDot>
void tile(const Tile& t) {
  V acc[P][B];
#pragma GCC unroll 28
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      acc[p][b] = t.add ? line(t.sums + p * t.pitch + b * L) : V{};
    }
  }
  const int64_t taps = t.kernel_w, channels = kDot ? 1 : t.channels;
  const float* w = t.w + t.first_row * taps * channels * B * L;
  const float* row = t.x + t.first_row * t.row;
  for (int64_t ky = t.first_row; ky < t.last_row; ++ky, row += t.row) {
    const float* x = row;
    for (int64_t kx = 0; kx < taps; ++kx, x += t.step) {
      if constexpr (kDot) {
        add_tap<P, B, S, kDot>(acc, x, w);
        w += B * L;
      } else {
        for (int64_t c = 0; c < channels; ++c, w += B * L) {
          add_tap<P, B, S, kDot>(acc, x + c, w);
        }
      }
    }
  }
#pragma GCC unroll 28
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      set_line(t.sums + p * t.pitch + b * L, acc[p][b]);
    }
  }
}

using TileFunction = void (*)(const Tile&);

template <int P, int B, int S, bool kDot>
constexpr TileFunction tile_if_fits() {
  if constexpr (fits(P, B, L)) {
    return tile<P, B, S, kDot>;
  } else {
    return nullptr;
  }
}

#define EPSA_TILES(B, S, D)                                                \
  {tile_if_fits<1, B, S, D>(), tile_if_fits<2, B, S, D>(),                 \
   tile_if_fits<3, B, S, D>(), tile_if_fits<4, B, S, D>(),                 \
   tile_if_fits<6, B, S, D>(), tile_if_fits<7, B, S, D>(),                 \
   tile_if_fits<14, B, S, D>(), tile_if_fits<28, B, S, D>()}
#define EPSA_BLOCKS(S, D)                                                  \
  {EPSA_TILES(1, S, D), EPSA_TILES(2, S, D), EPSA_TILES(4, S, D),          \
   EPSA_TILES(8, S, D)}
const TileFunction kTiles[kMaxStride][2][4][8] = {
    {EPSA_BLOCKS(1, false), EPSA_BLOCKS(1, true)},
    {EPSA_BLOCKS(2, false), EPSA_BLOCKS(2, true)}};
#undef EPSA_BLOCKS
#undef EPSA_TILES

TileFunction tile_function(const Conv& conv, const ConvPlan& plan) {
  int pixels = 0, block = 0;
  while (kPixels[pixels] != plan.pixels) {
    ++pixels;
  }
  while (kBlocks[block] != plan.block) {
    ++block;
  }
  const bool dot = plan.method == ConvMethod::dot;
  return kTiles[conv.stride - 1][dot][block][pixels];
}

// ---- packing ----

// Rows of memory side by side, transposed: at(j) receives lane i = rows[i][j]. A
// null row is zero.
template <class T>
EPSA_FN void load_transposed(const T* const* rows, int64_t j, int64_t n, V* v) {
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    v[i] = !rows[i] ? V{}
        : n < L     ? Memory<T>::load(rows[i] + j, n)
                    : Memory<T>::load(rows[i] + j);
  }
  transpose(v);
}

template <class T>
void pack_image(
    const Image& source, int64_t channels, int64_t width, const Scratch& s,
    int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t here = lesser(L, channels - block * L);
    const T* x = static_cast<const T*>(source.data) +
        block * L * source.channel_stride;
    for (int64_t h = 0; h < s.height; ++h, x += source.row_stride) {
      float* to = s.data +
          ((block * s.height + h) * s.width + s.border) * L;
      if (source.channel_stride == 1) {  // channels_last
        for (int64_t w = 0; w < width; ++w) {
          const T* pixel = x + w * source.pixel_stride;
          set_line(
              to + w * L, here < L ? Memory<T>::load(pixel, here)
                                   : Memory<T>::load(pixel));
        }
        continue;
      }
      const T* rows[L];
      for (int i = 0; i < L; ++i) {
        rows[i] = i < here ? x + i * source.channel_stride : nullptr;
      }
      for (int64_t w = 0; w < width; w += L) {
        V v[L];
        const int64_t n = lesser(L, width - w);
        load_transposed(rows, w, n, v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          if (i < n) {
            set_line(to + (w + i) * L, v[i]);
          }
        }
      }
    }
  }
}

// Where a broadcast unit's weights of one input channel and tap stand: the
// channels in the segments that the scratch's blocks make of them.
struct Segments {
  int64_t c0, ic, taps;  // the group's first channel, its channels
  EPSA_FN int64_t at(int64_t c, int64_t tap) const {
    const int64_t first = greater(0, (c0 + c) / L * L - c0);
    const int64_t count = lesser((c0 + c) / L * L + L - c0, ic) - first;
    return first * taps + tap * count + (c - first);
  }
};

template <class T>
void pack_broadcast(
    const Conv& conv, const ConvPlan& plan, const ConvWeights& weights,
    int64_t unit, float* packed) {
  const T* from = static_cast<const T*>(weights.data);
  const int64_t width = plan.unit_channels;
  const Run run = unit_run(conv, plan, unit);
  const Segments segments{
      run.first / conv.oc() * conv.ic(), conv.ic(), conv.taps()};
  // Of channels and taps the dense one is the inner: columns of a matrix whose
  // rows are the output channels.
  const bool taps_inner = weights.tap_stride == 1;
  const int64_t inner = taps_inner ? conv.taps() : conv.ic();
  const int64_t outer = taps_inner ? conv.ic() : conv.taps();
  const int64_t outer_stride =
      taps_inner ? weights.in_stride : weights.tap_stride;
  // the matrix is one run of memory, or each of its outer rows is
  const bool dense = outer_stride == inner;
  const int64_t columns = dense ? inner * outer : inner;
  const T* rows[L];
  V v[L];
  for (int64_t b = 0; b < width; b += L) {
    for (int64_t k = 0; k < (dense ? 1 : outer); ++k) {
      for (int i = 0; i < L; ++i) {
        rows[i] = b + i < run.count
            ? from + (run.first + b + i) * weights.out_stride + k * outer_stride
            : nullptr;
      }
      int64_t slow = k, fast = 0;
      for (int64_t j = 0; j < columns; j += L) {
        const int64_t n = lesser(L, columns - j);
        load_transposed(rows, j, n, v);
        for (int i = 0; i < n; ++i) {
          const int64_t at = taps_inner ? segments.at(slow, fast)
                                        : segments.at(fast, slow);
          set_line(packed + at * width + b, v[i]);
          if (++fast == inner) {
            fast = 0;
            ++slow;
          }
        }
      }
    }
  }
}

template <class T>
void pack_dot(
    const Conv& conv, const ConvPlan& plan, const ConvWeights& weights,
    int64_t unit, float* packed) {
  const T* from = static_cast<const T*>(weights.data);
  const int64_t taps = conv.taps(), oc = conv.oc();
  const DotLanes lanes(conv, L);
  const int64_t clusters = plan.unit_channels / (lanes.groups * oc);
  const T* rows[L];  // of the lanes' input channels; columns are the taps
  V v[L];
  for (int64_t k = 0; k < clusters; ++k) {
    const int64_t g0 = (unit * clusters + k) * lanes.groups;
    for (int64_t o = 0; o < oc; ++o) {
      for (int64_t m = 0; m < lanes.vectors; ++m) {
        for (int i = 0; i < L; ++i) {
          const int64_t group = g0 + i / lanes.run;
          const int64_t c = m * L + i % lanes.run;
          rows[i] = group < conv.groups ? from +
                  (group * oc + o) * weights.out_stride + c * weights.in_stride
                                        : nullptr;
        }
        float* to = packed +
            ((k * oc + o / plan.block * plan.block) * lanes.vectors +
             m * plan.block) * taps * L + o % plan.block * L;
        if (weights.tap_stride != 1) {
          for (int64_t j = 0; j < taps; ++j) {
            for (int i = 0; i < L; ++i) {
              to[j * plan.block * L + i] = rows[i]
                  ? Memory<T>::load(rows[i] + j * weights.tap_stride, 1)[0]
                  : 0.0f;
            }
          }
          continue;
        }
        for (int64_t j = 0; j < taps; j += L) {
          const int64_t n = lesser(L, taps - j);
          load_transposed(rows, j, n, v);
          for (int i = 0; i < n; ++i) {
            set_line(to + (j + i) * plan.block * L, v[i]);
          }
        }
      }
    }
  }
}

template <class T>
void pack_weights(
    const Conv& conv, const ConvPlan& plan, const ConvWeights& weights,
    int64_t unit, float* packed) {
  (plan.method == ConvMethod::dot ? pack_dot<T> : pack_broadcast<T>)(
      conv, plan, weights, unit, packed);
}

// ---- convolution ----

// One output row of a tile buffer: all tiles.
struct Row {
  int64_t first_tap, last_tap;  // rows of the kernel in the image
  const float* x;  // scratch, of the first pixel under the first tap
};

EPSA_FN Row row_of(const Conv& conv, const Scratch& s, int64_t block, int64_t h) {
  const int64_t top = h * conv.stride - conv.padding;  // of the image
  const int64_t above = greater(0, -top);
  const int64_t below = greater(0, conv.height - top);
  return {
      lesser(conv.kernel_h, pieces(above, conv.dilation)),
      lesser(conv.kernel_h, pieces(below, conv.dilation)),
      s.data +
          ((block * s.height + top) * s.width + s.border - conv.padding) * L};
}

EPSA_FN void do_row(
    const Conv& conv, const ConvPlan& plan, const Scratch& s, TileFunction tile,
    const Row& row, Tile& t) {
  t.row = conv.dilation * s.width * L;
  t.step = conv.dilation * L;
  t.kernel_w = conv.kernel_w;
  t.first_row = row.first_tap;
  t.last_row = row.last_tap;
  t.x = row.x;
  for (int64_t w = 0; w < plan.buffer_width; w += plan.pixels) {
    tile(t);
    t.x += plan.pixels * conv.stride * L;
    t.sums += plan.pixels * t.pitch;
  }
}

// sums [width][block][L] of dot's lanes -> buffer [width][pitch]
template <int G>
void reduce_row(
    const float* sums, int64_t width, int64_t block, int64_t oc, float* buffer,
    int64_t pitch) {
  for (int64_t b = 0; b < block; ++b) {
    for (int64_t p = 0; p < width; p += G) {
      V v[G];
#pragma GCC unroll 16
      for (int i = 0; i < G; ++i) {
        v[i] = line(sums + ((p + i) * block + b) * L);
      }
      alignas(EPSA_VEC_BYTES) float lanes[L];
      set_line(lanes, sum_runs<G>(v));
      const int64_t n = lesser(G, width - p);
      float* to = buffer + p * pitch + b;
      for (int64_t i = 0; i < n; ++i, to += pitch) {
        for (int64_t j = 0; j < L / G; ++j) {
          to[j * oc] = lanes[j * G + i];
        }
      }
    }
  }
}

void reduce_row(
    const DotLanes& lanes, const float* sums, int64_t width, int64_t block,
    int64_t oc, float* buffer, int64_t pitch) {
  switch (lanes.run) {
    case 1:
      return reduce_row<1>(sums, width, block, oc, buffer, pitch);
    case 2:
      return reduce_row<2>(sums, width, block, oc, buffer, pitch);
    case 4:
      return reduce_row<4>(sums, width, block, oc, buffer, pitch);
#if EPSA_VEC_BYTES >= 32
    case 8:
      return reduce_row<8>(sums, width, block, oc, buffer, pitch);
#endif
#if EPSA_VEC_BYTES >= 64
    case 16:
      return reduce_row<16>(sums, width, block, oc, buffer, pitch);
#endif
  }
}

void convolve(
    const Conv& conv, const ConvPlan& plan, const Scratch& s,
    const float* packed, int64_t unit, int64_t begin, int64_t end,
    float* buffer) {
  const TileFunction tile = tile_function(conv, plan);
  const int64_t row_floats = plan.buffer_width * plan.unit_pitch;
  const int64_t ic = conv.ic(), oc = conv.oc();
  Tile t{};
  if (plan.method == ConvMethod::broadcast) {
    const int64_t c0 = unit_run(conv, plan, unit).first / oc * ic;
    t.pitch = plan.unit_pitch;
    for (int64_t c = 0; c < ic; c += t.channels) {
      const int64_t lane = (c0 + c) % L;
      t.channels = lesser(L - lane, ic - c);
      t.w = packed + c * conv.taps() * plan.unit_channels;
      t.add = c > 0;
      for (int64_t h = begin; h < end; ++h) {
        Row row = row_of(conv, s, (c0 + c) / L, h);
        row.x += lane;
        t.sums = buffer + (h - begin) * row_floats;
        do_row(conv, plan, s, tile, row, t);
      }
    }
    return;
  }
  const DotLanes lanes(conv, L);
  const int64_t outputs = lanes.groups * oc;
  const int64_t clusters = plan.unit_channels / outputs;
  const int64_t all_clusters = lanes.clusters(conv);
  float* sums = buffer + (end - begin) * row_floats;
  t.channels = 1;
  t.pitch = plan.block * L;
  for (int64_t k = 0; k < clusters; ++k) {
    const int64_t cluster = unit * clusters + k;
    if (cluster == all_clusters) {
      break;
    }
    for (int64_t o = 0; o < oc; o += plan.block) {
      const float* w =
          packed + (k * oc + o) * lanes.vectors * conv.taps() * L;
      for (int64_t h = begin; h < end; ++h) {
        for (int64_t m = 0; m < lanes.vectors; ++m) {
          t.w = w + m * plan.block * conv.taps() * L;
          t.add = m > 0;
          t.sums = sums;
          do_row(
              conv, plan, s, tile,
              row_of(conv, s, cluster * lanes.vectors + m, h), t);
        }
        reduce_row(
            lanes, sums, plan.buffer_width, plan.block, oc,
            buffer + (h - begin) * row_floats + k * outputs + o,
            plan.unit_pitch);
      }
    }
  }
}

int64_t buffer_floats(const ConvPlan& plan) {
  const int64_t sums = plan.method == ConvMethod::dot
      ? (plan.buffer_width + L) * plan.block * L
      : 0;
  return plan.strip * plan.buffer_width * plan.unit_pitch + sums;
}

// ---- from the tile buffer to the output ----

// Channels [c, c + n) of `pixels` pixels, `pitch` floats apart, to planes.
template <class T>
EPSA_FN void unpack_run(
    const float* buffer, int64_t pitch, int64_t n, int64_t pixels, T* to,
    int64_t channel_stride) {
  for (int64_t p = 0; p < pixels; p += L) {
    const int64_t here = lesser(L, pixels - p);
    V v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      v[i] = i < here ? line(buffer + (p + i) * pitch) : V{};
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i < n) {
        T* plane = to + i * channel_stride + p;
        if (here < L) {
          Memory<T>::store(plane, v[i], here);
        } else {
          Memory<T>::store(plane, v[i]);
        }
      }
    }
  }
}

template <class T>
void unpack(
    const float* buffer, const ConvPlan& plan, int64_t channels, int64_t rows,
    int64_t width, const Image& destination, float* sums) {
  T* to = static_cast<T*>(destination.data);
  const int64_t pitch = plan.unit_pitch;
  const int64_t row_floats = plan.buffer_width * pitch;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t n = lesser(L, channels - c);
    if (sums) {  // rows first, then their sums: shorter chains, less rounding
      V total{};
      for (int64_t h = 0; h < rows; ++h) {
        const float* from = buffer + h * row_floats + c;
        V even{}, odd{};
        int64_t w = 0;
        for (; w + 1 < width; w += 2, from += 2 * pitch) {
          even += line(from);
          odd += line(from + pitch);
        }
        if (w < width) {
          even += line(from);
        }
        total += even + odd;
      }
      if (n < L) {
        Memory<float>::store(sums + c, total, n);
      } else {
        Memory<float>::store(sums + c, total);
      }
    }
    if (destination.channel_stride == 1) {  // channels_last
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          const V v = line(buffer + h * row_floats + w * pitch + c);
          T* pixel = to + h * destination.row_stride +
              w * destination.pixel_stride + c;
          if (n < L) {
            Memory<T>::store(pixel, v, n);
          } else {
            Memory<T>::store(pixel, v);
          }
        }
      }
      continue;
    }
    T* planes = to + c * destination.channel_stride;
    if (plan.buffer_width == width) {  // the strip is one run of pixels
      unpack_run(
          buffer + c, pitch, n, rows * width, planes,
          destination.channel_stride);
      continue;
    }
    for (int64_t h = 0; h < rows; ++h) {
      unpack_run(
          buffer + h * row_floats + c, pitch, n, width,
          planes + h * destination.row_stride, destination.channel_stride);
    }
  }
}

const ConvKernels& conv_kernels(Dtype dtype) {
  static const ConvKernels f32{
      L, buffer_floats, pack_image<float>, pack_weights<float>,
      convolve, unpack<float>};
  static const ConvKernels bf16_{
      L, buffer_floats, pack_image<bf16>, pack_weights<bf16>,
      convolve, unpack<bf16>};
  static const ConvKernels f16_{
      L, buffer_floats, pack_image<f16>, pack_weights<f16>,
      convolve, unpack<f16>};
  return dtype == Dtype::f32 ? f32 : dtype == Dtype::bf16 ? bf16_ : f16_;
}
