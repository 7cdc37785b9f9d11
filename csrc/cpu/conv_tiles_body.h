// The sums of one tile, in registers: a part of conv_kernels_body.h (no include guard).

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
