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
  const float* w;  // [vectors][kernel_h][kernel_w][channels][B * L]
  int64_t kernel_h, kernel_w;
  int64_t first_row, last_row;  // the kernel's rows that lie in the image
  int64_t channels;  // broadcast: input channels, one lane each; dot: 1
  int64_t vectors, vector;  // dot: vectors of channels, floats to the next; else 1
  float* sums;  // of the first pixel
  int64_t pitch;  // of sums, from pixel to pixel
  bool add;  // to the sums that are there?
};

// acc += one tap of one channel (broadcast) or of L channels (dot): the value of
// each pixel in [kFrom, kTo) times B vectors of weights. Of the two, those that are
// fewer are held in registers.
template <int kFrom, int kTo, int P, int B, int S, bool kDot>
EPSA_FN void add_tap(V (&acc)[P][B], const float* x, const float* w) {
  if constexpr (P >= B) {
    V weight[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      weight[b] = line(w + b * L);
    }
#pragma GCC unroll 28
    for (int p = kFrom; p < kTo; ++p) {
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
    for (int p = kFrom; p < kTo; ++p) {
      value[p] = kDot ? line(x + p * S * L) : splat(x[p * S * L]);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      V weight = line(w + b * L);
      pin(weight);
#pragma GCC unroll 28
      for (int p = kFrom; p < kTo; ++p) {
        acc[p][b] += value[p] * weight;
      }
    }
  }
}

template <int P, int B>
EPSA_FN void load_sums(V (&acc)[P][B], const Tile& t) {
#pragma GCC unroll 28
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      acc[p][b] = t.add ? line(t.sums + p * t.pitch + b * L) : V{};
    }
  }
}

template <int P, int B>
EPSA_FN void store_sums(const V (&acc)[P][B], const Tile& t) {
#pragma GCC unroll 28
  for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      set_line(t.sums + p * t.pitch + b * L, acc[p][b]);
    }
  }
}

// The kernel's rows that lie in the image, over one vector (dot) or lane by lane
// over some channels of one (broadcast).
template <int P, int B, int S, bool kDot>
EPSA_FN void add_rows(
    V (&acc)[P][B], const Tile& t, const float* x, const float* w) {
  const int64_t taps = t.kernel_w, channels = kDot ? 1 : t.channels;
  w += t.first_row * taps * channels * B * L;
  const float* row = x + t.first_row * t.row;
  for (int64_t ky = t.first_row; ky < t.last_row; ++ky, row += t.row) {
    const float* under = row;
    for (int64_t kx = 0; kx < taps; ++kx, under += t.step) {
      if constexpr (kDot) {
        add_tap<0, P, P, B, S, kDot>(acc, under, w);
        w += B * L;
      } else {
        for (int64_t c = 0; c < channels; ++c, w += B * L) {
          add_tap<0, P, P, B, S, kDot>(acc, under + c, w);
        }
      }
    }
  }
}

template <int P, int B, int S, bool kDot>
void tile(const Tile& t) {
  V acc[P][B];
  load_sums(acc, t);
  if constexpr (kDot) {
    const int64_t weights = t.kernel_h * t.kernel_w * B * L;
    for (int64_t m = 0; m < t.vectors; ++m) {
      add_rows<P, B, S, kDot>(acc, t, t.x + m * t.vector, t.w + m * weights);
    }
  } else {
    add_rows<P, B, S, kDot>(acc, t, t.x, t.w);
  }
  store_sums(acc, t);
}

// A tile that is a whole row of the output of an image S times as wide, of which no
// pixel outside is multiplied: a third of the work of a 9 x 9 kernel on 7 pixels.
constexpr int clamp(int x, int low, int high) {
  return x < low ? low : x > high ? high : x;
}

template <int K, int kTap, int P, int B, int S, bool kDot>
EPSA_FN void add_row_taps(
    V (&acc)[P][B], const float* x, const float* w, int64_t channels) {
  if constexpr (kTap < K) {
    // pixel p meets column S * p + kTap - K / 2 of S * P, rounded up
    constexpr int kFrom = clamp((K / 2 - kTap + S - 1) / S, 0, P);
    constexpr int kTo = clamp((S * P + K / 2 - kTap + S - 1) / S, 0, P);
    for (int64_t c = 0; c < channels; ++c, w += B * L) {
      add_tap<kFrom, kTo, P, B, S, kDot>(acc, x + kTap * L + c, w);
    }
    add_row_taps<K, kTap + 1, P, B, S, kDot>(acc, x, w, channels);
  }
}

template <int K, int P, int B, int S, bool kDot>
EPSA_FN void add_whole_rows(
    V (&acc)[P][B], const Tile& t, const float* x, const float* w) {
  const int64_t channels = kDot ? 1 : t.channels;
  w += t.first_row * K * channels * B * L;
  x += t.first_row * t.row;
  for (int64_t ky = t.first_row; ky < t.last_row; ++ky, x += t.row) {
    add_row_taps<K, 0, P, B, S, kDot>(acc, x, w, channels);
    w += K * channels * B * L;
  }
}

template <int K, int P, int B, int S, bool kDot>
void row_tile(const Tile& t) {
  V acc[P][B];
  load_sums(acc, t);
  if constexpr (kDot) {
    const int64_t weights = t.kernel_h * K * B * L;
    for (int64_t m = 0; m < t.vectors; ++m) {
      add_whole_rows<K, P, B, S, kDot>(
          acc, t, t.x + m * t.vector, t.w + m * weights);
    }
  } else {
    add_whole_rows<K, P, B, S, kDot>(acc, t, t.x, t.w);
  }
  store_sums(acc, t);
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

// Those of EPSANet's maps of 7 and 14 pixels.
constexpr int kRowKernels[] = {3, 5, 7, 9}, kRowPixels[] = {7, 14};

template <int K, int P, int B, int S, bool kDot>
constexpr TileFunction row_tile_if_fits() {
  if constexpr (fits(P, B, L)) {
    return row_tile<K, P, B, S, kDot>;
  } else {
    return nullptr;
  }
}

#define EPSA_KERNELS(P, B, S, D)                                           \
  {row_tile_if_fits<3, P, B, S, D>(), row_tile_if_fits<5, P, B, S, D>(),   \
   row_tile_if_fits<7, P, B, S, D>(), row_tile_if_fits<9, P, B, S, D>()}
#define EPSA_BLOCKS(P, S, D) {EPSA_KERNELS(P, 1, S, D), EPSA_KERNELS(P, 2, S, D)}
// Dot's of 14 pixels would be too long for the cache of decoded instructions:
// slower by a sixth.
const TileFunction kRowTiles[kMaxStride][2][2][2][4] = {
    {{EPSA_BLOCKS(7, 1, false), EPSA_BLOCKS(14, 1, false)},
     {EPSA_BLOCKS(7, 1, true), {{}, {}}}},
    {{EPSA_BLOCKS(7, 2, false), EPSA_BLOCKS(14, 2, false)},
     {EPSA_BLOCKS(7, 2, true), {{}, {}}}}};
#undef EPSA_BLOCKS
#undef EPSA_KERNELS

// The place of x in a list, or its length.
template <int n>
EPSA_FN int place(const int (&list)[n], int64_t x) {
  int i = 0;
  while (i < n && list[i] != x) {
    ++i;
  }
  return i;
}

TileFunction tile_function(const Conv& conv, const ConvPlan& plan) {
  const bool dot = plan.method == ConvMethod::dot;
  const int block = place(kBlocks, plan.block);
  const int kernel = place(kRowKernels, conv.kernel_w);
  const int pixels = place(kRowPixels, plan.pixels);
  if (kernel < 4 && pixels < 2 && block < 2 && conv.dilation == 1 &&
      conv.width == conv.stride * plan.pixels &&
      conv.out_width == plan.pixels && conv.padding_w == conv.kernel_w / 2) {
    if (const TileFunction row =
            kRowTiles[conv.stride - 1][dot][pixels][block][kernel]) {
      return row;
    }
  }
  return kTiles[conv.stride - 1][dot][block][place(kPixels, plan.pixels)];
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

EPSA_FN void zero_pixels(float* to, int64_t count) {
  for (int64_t w = 0; w < count; ++w) {
    set_line(to + w * L, V{});
  }
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
      float* row = s.data + (block * s.height + h) * s.width * L;
      float* to = row + s.border * L;
      zero_pixels(row, s.border);
      zero_pixels(to + width * L, s.width - s.border - width);
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
    if (here + block * L == channels) {
      zero_pixels(s.data + (block + 1) * s.height * s.width * L, s.beyond);
    }
  }
}

// Where a broadcast unit's weights of one input channel and tap stand: the
// channels in the segments that the scratch's blocks make of them.
struct Segments {
  int64_t c0, ic, taps;  // the group's first channel, its channels
  EPSA_FN int64_t first(int64_t c) const {  // channel of c's segment
    return greater(0, (c0 + c) / L * L - c0);
  }
  EPSA_FN int64_t behind(int64_t c) const {  // channels from c on
    return lesser((c0 + c) / L * L + L - c0, ic) - c;
  }
  EPSA_FN int64_t count(int64_t c) const { return behind(first(c)); }
  EPSA_FN int64_t at(int64_t c, int64_t tap) const {
    return first(c) * taps + tap * count(c) + (c - first(c));
  }
};

template <class T>
void pack_broadcast(
    const Conv& conv, const ConvPlan& plan, const ConvWeights& weights,
    int64_t unit, float* packed) {
  const int64_t width = plan.unit_channels;
  const int64_t ic = conv.ic(), oc = conv.oc(), taps = conv.taps();
  const Run run = unit_run(conv, plan, unit);
  const int64_t group = run.first / oc;
  const T* from = static_cast<const T*>(weights.data) +
      group * weights.group_stride + run.first % oc * weights.out_stride;
  const Segments segments{group * ic, ic, taps};
  if (weights.out_stride == 1) {  // the lanes are dense
    for (int64_t c = 0; c < ic; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const T* row = from + c * weights.in_stride +
            (weights.turned ? taps - 1 - tap : tap) * weights.tap_stride;
        for (int64_t b = 0; b < width; b += L) {
          const int64_t n = lesser(L, run.count - b);
          set_line(
              packed + segments.at(c, tap) * width + b,
              n <= 0      ? V{}
                  : n < L ? Memory<T>::load(row + b, n)
                          : Memory<T>::load(row + b));
        }
      }
    }
    return;
  }
  // Of channels and taps the dense one is the inner: columns of a matrix whose
  // rows are the output channels.
  const bool taps_inner = weights.tap_stride == 1;
  const int64_t inner = taps_inner ? taps : ic;
  const int64_t outer = taps_inner ? ic : taps;
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
            ? from + (b + i) * weights.out_stride + k * outer_stride
            : nullptr;
      }
      // within a channel's taps, or a segment's channels, steps are even
      int64_t slow = k, fast = 0, even = 0, step = 0;
      float* to = packed;
      for (int64_t j = 0; j < columns; j += L) {
        const int64_t n = lesser(L, columns - j);
        load_transposed(rows, j, n, v);
        for (int i = 0; i < n; ++i) {
          if (even == 0) {
            const int64_t c = taps_inner ? slow : fast;
            const int64_t tap = taps_inner ? fast : slow;
            to = packed + b +
                segments.at(c, weights.turned ? taps - 1 - tap : tap) * width;
            step = !taps_inner ? width
                : weights.turned ? -segments.count(c) * width
                                 : segments.count(c) * width;
            even = taps_inner ? taps : segments.behind(c);
            fast += even;
            if (fast == inner) {
              fast = 0;
              ++slow;
            }
          }
          set_line(to, v[i]);
          to += step;
          --even;
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
          rows[i] = group < conv.groups
              ? from + group * weights.group_stride + o * weights.out_stride +
                  c * weights.in_stride
              : nullptr;
        }
        float* to = packed +
            ((k * oc + o / plan.block * plan.block) * lanes.vectors +
             m * plan.block) * taps * L + o % plan.block * L;
        if (weights.tap_stride != 1) {
          for (int64_t j = 0; j < taps; ++j) {
            const int64_t tap = weights.turned ? taps - 1 - j : j;
            for (int i = 0; i < L; ++i) {
              to[j * plan.block * L + i] = rows[i]
                  ? Memory<T>::load(rows[i] + tap * weights.tap_stride, 1)[0]
                  : 0.0f;
            }
          }
          continue;
        }
        for (int64_t j = 0; j < taps; j += L) {
          const int64_t n = lesser(L, taps - j);
          load_transposed(rows, j, n, v);
          for (int i = 0; i < n; ++i) {
            const int64_t tap = weights.turned ? taps - 1 - j - i : j + i;
            set_line(to + tap * plan.block * L, v[i]);
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
  const int64_t top = h * conv.stride - conv.padding_h;  // of the image
  const int64_t above = greater(0, -top);
  const int64_t below = greater(0, conv.height - top);
  const int64_t d = conv.dilation;  // seldom but 1, and divisions are slow
  return {
      lesser(conv.kernel_h, d == 1 ? above : pieces(above, d)),
      lesser(conv.kernel_h, d == 1 ? below : pieces(below, d)),
      s.data +
          ((block * s.height + top) * s.width + s.border - conv.padding_w) * L};
}

// The tiles of a column: all rows of it follow each other, so that the rows of a
// kernel stay in the first cache, as those of a wide image would not.
constexpr int64_t kColumn = 28;  // pixels of the image

EPSA_FN int64_t column_width(const Conv& conv, const ConvPlan& plan) {
  return greater(1, kColumn / (conv.stride * plan.pixels)) * plan.pixels;
}

// Pixels [begin, end) of one output row, whole tiles; t.sums are the first one's.
EPSA_FN void do_row(
    const Conv& conv, const ConvPlan& plan, const Scratch& s, TileFunction tile,
    const Row& row, int64_t begin, int64_t end, Tile& t) {
  t.row = conv.dilation * s.width * L;
  t.step = conv.dilation * L;
  t.kernel_h = conv.kernel_h;
  t.kernel_w = conv.kernel_w;
  t.first_row = row.first_tap;
  t.last_row = row.last_tap;
  t.x = row.x + begin * conv.stride * L;
  for (int64_t w = begin; w < end; w += plan.pixels) {
    tile(t);
    t.x += plan.pixels * conv.stride * L;
    t.sums += plan.pixels * t.pitch;
  }
}

// Sums of one row's lanes [width][block][L] by groups -> `to` (its first pixel
// and channel); the next group's channels are oc channels on.
template <int G>
void reduce_row(
    const float* lanes, int64_t width, int64_t block, int64_t oc, float* to,
    int64_t pixel_stride, bool add) {
  for (int64_t b = 0; b < block; ++b) {
    for (int64_t p = 0; p < width; p += G) {
      V v[G];
#pragma GCC unroll 16
      for (int i = 0; i < G; ++i) {
        v[i] = line(lanes + ((p + i) * block + b) * L);
      }
      alignas(EPSA_VEC_BYTES) float sums[L];
      set_line(sums, sum_runs<G>(v));
      const int64_t n = lesser(G, width - p);
      float* pixel = to + p * pixel_stride + b;
      for (int64_t i = 0; i < n; ++i, pixel += pixel_stride) {
        for (int64_t j = 0; j < L / G; ++j) {
          const float sum = sums[j * G + i];
          pixel[j * oc] = add ? pixel[j * oc] + sum : sum;
        }
      }
    }
  }
}

using ReduceRow = void (*)(
    const float*, int64_t, int64_t, int64_t, float*, int64_t, bool);

ReduceRow reduce_row_of(int64_t run) {
  switch (run) {
    case 1:
      return reduce_row<1>;
    case 2:
      return reduce_row<2>;
#if EPSA_VEC_BYTES >= 32
    case 4:
      return reduce_row<4>;
#endif
#if EPSA_VEC_BYTES >= 64
    case 8:
      return reduce_row<8>;
#endif
    default:
      return reduce_row<L>;
  }
}

int64_t convolve(
    const Conv& conv, const ConvPlan& plan, const Scratch& s,
    const float* packed, int64_t unit, int64_t c, int64_t begin, int64_t end,
    const Sums& sums, float* lane_sums) {
  const TileFunction tile = tile_function(conv, plan);
  const int64_t ic = conv.ic(), oc = conv.oc();
  const int64_t column = column_width(conv, plan);
  Tile t{};
  if (plan.method == ConvMethod::broadcast) {
    const int64_t c0 = unit_run(conv, plan, unit).first / oc * ic;
    const int64_t lane = (c0 + c) % L;
    t.channels = lesser(L - lane, ic - c);
    t.w = packed + c * conv.taps() * plan.unit_channels;
    t.pitch = sums.pixel_stride;
    t.add = sums.add || c > 0;
    for (int64_t w = 0; w < plan.buffer_width; w += column) {
      const int64_t behind = lesser(w + column, plan.buffer_width);
      for (int64_t h = begin; h < end; ++h) {
        Row row = row_of(conv, s, (c0 + c) / L, h);
        row.x += lane;
        t.sums = sums.data + (h - begin) * sums.row_stride + w * t.pitch;
        do_row(conv, plan, s, tile, row, w, behind, t);
      }
    }
    return c + t.channels;
  }
  const DotLanes lanes(conv, L);
  const ReduceRow reduce = reduce_row_of(lanes.run);
  const int64_t outputs = lanes.groups * oc;
  const int64_t clusters = plan.unit_channels / outputs;
  const int64_t all_clusters = lanes.clusters(conv);
  t.channels = 1;
  t.vectors = lanes.vectors;
  t.vector = s.height * s.width * L;
  t.pitch = plan.block * L;
  // narrow rows are reduced together, where their sums are one run of pixels
  const bool dense = column >= plan.buffer_width &&
      sums.row_stride == plan.buffer_width * sums.pixel_stride;
  const int64_t rows = dense ? greater(1, kColumn / plan.buffer_width) : 1;
  for (int64_t k = 0; k < clusters; ++k) {
    const int64_t cluster = unit * clusters + k;
    if (cluster == all_clusters) {
      break;
    }
    for (int64_t o = 0; o < oc; o += plan.block) {
      t.w = packed + (k * oc + o) * lanes.vectors * conv.taps() * L;
      for (int64_t first = 0; first < plan.buffer_width; first += column) {
        const int64_t behind = lesser(first + column, plan.buffer_width);
        const int64_t width = behind - first;
        for (int64_t h = begin; h < end;) {
          t.sums = lane_sums;
          const int64_t h0 = h;
          for (; h < lesser(h0 + rows, end); ++h) {
            const Row row = row_of(conv, s, cluster * lanes.vectors, h);
            do_row(conv, plan, s, tile, row, first, behind, t);
          }
          reduce(
              lane_sums, (h - h0) * width, plan.block, oc,
              sums.data + (h0 - begin) * sums.row_stride +
                  first * sums.pixel_stride + k * outputs + o,
              sums.pixel_stride, sums.add);
        }
      }
    }
  }
  return ic;
}

int64_t lane_floats(const Conv& conv, const ConvPlan& plan) {
  return plan.method == ConvMethod::dot
      ? (greater(kColumn, column_width(conv, plan)) + L) * plan.block * L
      : 0;
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
    const Sums& sums, int64_t channels, int64_t rows, int64_t width,
    const Image& destination, float* totals) {
  T* to = static_cast<T*>(destination.data);
  const int64_t pitch = sums.pixel_stride;
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t n = lesser(L, channels - c);
    const float* from = sums.data + c;
    if (totals) {  // rows first, then their sums: shorter chains, less rounding
      V total{};
      for (int64_t h = 0; h < rows; ++h) {
        const float* pixel = from + h * sums.row_stride;
        V even{}, odd{};
        int64_t w = 0;
        for (; w + 1 < width; w += 2, pixel += 2 * pitch) {
          even += line(pixel);
          odd += line(pixel + pitch);
        }
        if (w < width) {
          even += line(pixel);
        }
        total += even + odd;
      }
      if (n < L) {
        Memory<float>::store(totals + c, total, n);
      } else {
        Memory<float>::store(totals + c, total);
      }
    }
    if (destination.channel_stride == 1) {  // channels_last
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          const V v = line(from + h * sums.row_stride + w * pitch);
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
    if (destination.pixel_stride != 1) {  // every so many pixels of planes
      for (int64_t h = 0; h < rows; ++h) {
        for (int64_t w = 0; w < width; ++w) {
          V v = line(from + h * sums.row_stride + w * pitch);
          T* pixel = planes + h * destination.row_stride +
              w * destination.pixel_stride;
          for (int64_t i = 0; i < n; ++i) {
            V one{};
            one[0] = v[i];
            Memory<T>::store(pixel + i * destination.channel_stride, one, 1);
          }
        }
      }
      continue;
    }
    if (sums.row_stride == width * pitch && destination.row_stride == width) {
      unpack_run(  // the rows are one run of pixels
          from, pitch, n, rows * width, planes, destination.channel_stride);
      continue;
    }
    for (int64_t h = 0; h < rows; ++h) {
      unpack_run(
          from + h * sums.row_stride, pitch, n, width,
          planes + h * destination.row_stride, destination.channel_stride);
    }
  }
}

// ---- the gradient of the weights ----

// One row of pixels times K taps of a kernel's row: sums[k][b] += x (L channels)
// under tap k, times the gradient of output channel b of the lanes' groups. The
// gradient's pixel holds those channels side by side: where all lanes are of one
// group, channel b is broadcast; else `lanes[b]` says where each lane finds its
// own.
template <int K, int B, int S, bool kShared>
void weight_grad_tile(
    const float* x, int64_t x_row, const float* grad, int64_t grad_row,
    int64_t rows, int64_t width, const Lanes* lanes, float* sums) {
  V acc[K][B];
#pragma GCC unroll 9
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      acc[k][b] = line(sums + (k * B + b) * L);
    }
  }
  for (int64_t h = 0; h < rows; ++h, x += x_row, grad += grad_row) {
    const float* under = x;
    const float* g = grad;
    for (int64_t w = 0; w < width; ++w, under += S * L, g += L) {
      V value[B];
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) {
        value[b] =
            kShared ? __builtin_shuffle(line(g), lanes[b]) : splat(g[b]);
      }
#pragma GCC unroll 9
      for (int k = 0; k < K; ++k) {
        V tap = line(under + k * L);
        if constexpr (B > 1) {
          pin(tap);
        }
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) {
          acc[k][b] += tap * value[b];
        }
      }
    }
  }
#pragma GCC unroll 9
  for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      set_line(sums + (k * B + b) * L, acc[k][b]);
    }
  }
}

using WeightGradTile = void (*)(
    const float*, int64_t, const float*, int64_t, int64_t, int64_t,
    const Lanes*, float*);

template <int K, int B, int S, bool kShared>
constexpr WeightGradTile weight_grad_tile_if_fits() {
  if constexpr (fits(K, B, L)) {
    return weight_grad_tile<K, B, S, kShared>;
  } else {
    return nullptr;
  }
}

#define EPSA_TAPS(B, S, D)                                                 \
  {weight_grad_tile_if_fits<9, B, S, D>(),                                 \
   weight_grad_tile_if_fits<7, B, S, D>(),                                 \
   weight_grad_tile_if_fits<5, B, S, D>(),                                 \
   weight_grad_tile_if_fits<3, B, S, D>(),                                 \
   weight_grad_tile_if_fits<1, B, S, D>()}
#define EPSA_BLOCKS(S, D)                                                  \
  {EPSA_TAPS(1, S, D), EPSA_TAPS(2, S, D), EPSA_TAPS(4, S, D),             \
   EPSA_TAPS(8, S, D)}
const WeightGradTile kWeightGradTiles[kMaxStride][2][4][5] = {
    {EPSA_BLOCKS(1, false), EPSA_BLOCKS(1, true)},
    {EPSA_BLOCKS(2, false), EPSA_BLOCKS(2, true)}};
#undef EPSA_BLOCKS
#undef EPSA_TAPS

// A unit's lanes and output channels.
struct WeightGradUnit {
  DotLanes lanes;
  int64_t cluster, vector;  // of the input channels
  int64_t first;  // output channel, of each of its groups
  WeightGradUnit(const Conv& conv, const WeightGradPlan& plan, int64_t unit)
      : lanes(conv, L) {
    const int64_t blocks = conv.oc() / plan.block;
    first = unit % blocks * plan.block;
    vector = unit / blocks % lanes.vectors;
    cluster = unit / blocks / lanes.vectors;
  }
};

void weight_grad(
    const Conv& conv, const WeightGradPlan& plan, const Scratch& x,
    const Scratch& grad, int64_t unit, float* sums) {
  const WeightGradUnit u(conv, plan, unit);
  const int64_t out_h = conv.out_height, out_w = conv.out_width;
  // the output channels of the first lane's group
  const int64_t channel = u.cluster * u.lanes.groups * conv.oc() + u.first;
  const bool shared = u.lanes.groups > 1;
  Lanes lanes[kBlocks[3]];
  if (shared) {
    for (int b = 0; b < plan.block; ++b) {
      for (int i = 0; i < L; ++i) {
        lanes[b][i] = static_cast<int32_t>(
            channel % L + i / u.lanes.run * conv.oc() + b);
      }
    }
  }
  // of a vector of several groups' channels the shuffle takes them from their
  // places; else the first of them is at the address
  const float* g = grad.data +
      (channel / L * grad.height * grad.width + grad.border) * L +
      (shared ? 0 : channel % L);
  const float* image = x.data +
      ((u.cluster * u.lanes.vectors + u.vector) * x.height * x.width +
       x.border - conv.padding_w) * L;
  const int64_t x_row = conv.stride * x.width * L, g_row = grad.width * L;
  const int block = place(kBlocks, plan.block);
  // Rows at a time: those of the image and of the gradient stay in the first
  // cache while the kernel's rows pass over them.
  constexpr int64_t kCacheFloats = 6144;
  const int64_t strip = greater(
      1, kCacheFloats / ((conv.stride * x.width + grad.width) * L));
  for (int64_t begin = 0; begin < out_h; begin += strip) {
    for (int64_t ky = 0; ky < conv.kernel_h; ++ky) {
      // output rows whose tap lies in the image
      const int64_t top = ky - conv.padding_h;
      const int64_t first =
          greater(begin, top < 0 ? pieces(-top, conv.stride) : 0);
      const int64_t last = lesser(
          lesser(begin + strip, out_h),
          conv.height > top ? pieces(conv.height - top, conv.stride) : 0);
      if (first >= last) {
        continue;
      }
      const float* under = image + (first * conv.stride + top) * x.width * L;
      float* row = sums + ky * conv.kernel_w * plan.block * L;
      for (int64_t kx = 0; kx < conv.kernel_w;) {
        int taps = 0;
        while (kTaps[taps] > conv.kernel_w - kx) {
          ++taps;
        }
        kWeightGradTiles[conv.stride - 1][shared][block][taps](
            under + kx * L, x_row, g + first * g_row, g_row, last - first,
            out_w, lanes, row + kx * plan.block * L);
        kx += kTaps[taps];
      }
    }
  }
}

template <class T>
void unpack_weight_grad(
    const Conv& conv, const WeightGradPlan& plan, int64_t unit,
    const float* sums, const ConvWeights& to) {
  const WeightGradUnit u(conv, plan, unit);
  const int64_t taps = conv.taps(), pitch = plan.block * L;
  T* data = static_cast<T*>(to.data);
  for (int64_t b = 0; b < plan.block; ++b) {
    T* rows[L];  // of the lanes' input channels
    for (int i = 0; i < L; ++i) {
      const int64_t group = u.cluster * u.lanes.groups + i / u.lanes.run;
      rows[i] = group < conv.groups
          ? data + group * to.group_stride + (u.first + b) * to.out_stride +
              (u.vector * L + i % u.lanes.run) * to.in_stride
          : nullptr;
    }
    for (int64_t j = 0; j < taps; j += L) {
      const int64_t n = lesser(L, taps - j);
      V v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        v[i] = i < n ? line(sums + (j + i) * pitch + b * L) : V{};
      }
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        if (!rows[i]) {
          continue;
        }
        if (to.tap_stride != 1) {
          for (int64_t k = 0; k < n; ++k) {
            V one{};
            one[0] = v[i][k];
            Memory<T>::store(rows[i] + (j + k) * to.tap_stride, one, 1);
          }
        } else if (n < L) {
          Memory<T>::store(rows[i] + j, v[i], n);
        } else {
          Memory<T>::store(rows[i] + j, v[i]);
        }
      }
    }
  }
}

template <class T>
const ConvKernels& kernels_of() {
  static const ConvKernels kernels{
      L,        lane_floats, pack_image<T>, pack_weights<T>,
      convolve, unpack<T>,   weight_grad,   unpack_weight_grad<T>};
  return kernels;
}

const ConvKernels& conv_kernels(Dtype dtype) {
  return dtype == Dtype::f32 ? kernels_of<float>()
      : dtype == Dtype::bf16 ? kernels_of<bf16>()
                             : kernels_of<f16>();
}
