// The gradient of the weights: a part of conv_kernels_body.h (no include guard).

// acc[k][b] += x (L channels) under tap k of [kFrom, kTo), times the gradient of
// output channel b of the lanes' groups. The gradient's pixel holds those channels
// side by side: where all lanes are of one group, channel b is broadcast; else
// `lanes[b]` says where each lane finds its own.
template <int kFrom, int kTo, int K, int B, bool kShared>
EPSA_FN void add_pixel(
    V (&acc)[K][B], const float* x, const float* grad, const Lanes* lanes) {
  V value[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    value[b] =
        kShared ? __builtin_shuffle(line(grad), lanes[b]) : splat(grad[b]);
  }
#pragma GCC unroll 9
  for (int k = kFrom; k < kTo; ++k) {
    V tap = line(x + k * L);
    if constexpr (B > 1) {
      pin(tap);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      acc[k][b] += tap * value[b];
    }
  }
}

// A row of P pixels of the gradient of an image S times as wide, from pixel w on:
// none outside of the image is multiplied.
template <int P, int w, int S, int K, int B, bool kShared>
EPSA_FN void add_whole_row(
    V (&acc)[K][B], const float* x, const float* grad, const Lanes* lanes) {
  if constexpr (w < P) {
    constexpr int kFrom = clamp(K / 2 - S * w, 0, K);
    constexpr int kTo = clamp(S * (P - w) + K / 2, 0, K);
    add_pixel<kFrom, kTo, K, B, kShared>(
        acc, x + w * S * L, grad + w * L, lanes);
    add_whole_row<P, w + 1, S, K, B, kShared>(acc, x, grad, lanes);
  }
}

// Rows of pixels times K taps of a kernel's row -> sums[k][b]. P: the pixels of a
// row where they are known ahead, or 0.
template <int K, int B, int S, bool kShared, int P>
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
    if constexpr (P > 0) {
      add_whole_row<P, 0, S, K, B, kShared>(acc, x, grad, lanes);
    } else {
      const float* under = x;
      const float* g = grad;
      for (int64_t w = 0; w < width; ++w, under += S * L, g += L) {
        add_pixel<0, K, K, B, kShared>(acc, under, g, lanes);
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
    return weight_grad_tile<K, B, S, kShared, 0>;
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

// The largest block of channels for K taps.
constexpr int weight_grad_block(int K) {
  int block = 1;
  for (const int b : kBlocks) {
    block = fits(K, b, L) ? b : block;
  }
  return block;
}

// Those of whole kernels and rows of EPSANet's last two stages.
#define EPSA_TILE(K, S, P) weight_grad_tile<K, weight_grad_block(K), S, false, P>
#define EPSA_KERNELS(S, P)                                                 \
  {EPSA_TILE(3, S, P), EPSA_TILE(5, S, P), EPSA_TILE(7, S, P),             \
   EPSA_TILE(9, S, P)}
const WeightGradTile kWeightGradRows[kMaxStride][2][4] = {
    {EPSA_KERNELS(1, 7), EPSA_KERNELS(1, 14)},
    {EPSA_KERNELS(2, 7), EPSA_KERNELS(2, 14)}};
#undef EPSA_KERNELS
#undef EPSA_TILE

// The tile for rows without padding, if there is one.
WeightGradTile whole_row_tile(
    const Conv& conv, const WeightGradPlan& plan, bool shared) {
  const int kernel = place(kRowKernels, conv.kernel_w);
  const int pixels = place(kRowPixels, conv.out_width);
  const bool known = !shared && kernel < 4 && pixels < 2 &&
      plan.block == weight_grad_block(kRowKernels[kernel]) &&
      conv.width == conv.stride * conv.out_width &&
      conv.padding_w == conv.kernel_w / 2;
  return known ? kWeightGradRows[conv.stride - 1][pixels][kernel] : nullptr;
}

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
  const WeightGradTile whole_row = whole_row_tile(conv, plan, shared);
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
        const WeightGradTile tile = whole_row
            ? whole_row
            : kWeightGradTiles[conv.stride - 1][shared][block][taps];
        tile(
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
    if (to.tap_stride != 1) {  // a group's channels are dense
      for (int64_t j = 0; j < taps; ++j) {
        const float* line_of = sums + j * pitch + b * L;
        for (int i = 0; i < L; i += u.lanes.run) {
          if (rows[i]) {
            Memory<T>::store(
                rows[i] + j * to.tap_stride,
                Memory<float>::load(line_of + i, u.lanes.run), u.lanes.run);
          }
        }
      }
      continue;
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
        if (n < L) {
          Memory<T>::store(rows[i] + j, v[i], n);
        } else {
          Memory<T>::store(rows[i] + j, v[i]);
        }
      }
    }
  }
}
