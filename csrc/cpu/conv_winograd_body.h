// Winograd's minimal filtering F(2 x 2, 3 x 3) after Lavin and Gray (arXiv
// 1509.09308): a part of conv_kernels_body.h (no include guard).
//
// 2 x 2 outputs y of a 3 x 3 kernel g over a 4 x 4 tile d of the image are
// y = A' [(G g G') * (B' d B)] A, with 16 products for 36. The transforms' entries
// are 0, 1, -1 and 1/2, so it rounds hardly more than direct convolution does.
// What lies outside a tile's window reaches no output of it: where the last tile
// has one row or column too many, any value may stand there.

// B' d of one column (or row) of four
struct Four {
  V v[4];
};

EPSA_FN Four transform_image(V d0, V d1, V d2, V d3) {
  return {{d0 - d2, d1 + d2, d2 - d1, d1 - d3}};
}

// G g of one column (or row) of three
EPSA_FN Four transform_kernel(V g0, V g1, V g2) {
  const V outer = (g0 + g2) * 0.5f, inner = g1 * 0.5f;
  return {{g0, outer + inner, outer - inner, g2}};
}

// B' d of the column w: rows[i] is row i of a tile, or null outside of the image.
EPSA_FN Four transform_column(const float* const* rows, int64_t w) {
  V d[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    d[i] = rows[i] ? line(rows[i] + w * L) : V{};
  }
  return transform_image(d[0], d[1], d[2], d[3]);
}

// Tiles side by side, of which rows are the first one's, of one block of channels.
// Point q of tile t goes to to[q * point + t * L].
EPSA_FN void transform_row(
    const float* const* rows, int64_t tiles, float* to, int64_t point) {
  Four c0 = transform_column(rows, 0), c1 = transform_column(rows, 1);
  for (int64_t t = 0; t < tiles; ++t, to += L) {
    const Four c2 = transform_column(rows, 2 * t + 2);
    const Four c3 = transform_column(rows, 2 * t + 3);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Four row = transform_image(c0.v[i], c1.v[i], c2.v[i], c3.v[i]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        set_line(to + (4 * i + j) * point, row.v[j]);
      }
    }
    c0 = c2;
    c1 = c3;
  }
}

// A' m A of one tile and vector of channels -> two pixels of two rows (or of one).
EPSA_FN void transform_back(
    const float* from, int64_t point, float* to, int64_t pixel, int64_t row,
    bool both, bool add) {
  V y[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const V m0 = line(from + j * point), m1 = line(from + (4 + j) * point);
    const V m2 = line(from + (8 + j) * point);
    const V m3 = line(from + (12 + j) * point);
    y[0][j] = m0 + m1 + m2;
    y[1][j] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    if (i == 0 || both) {
      const V left = y[i][0] + y[i][1] + y[i][2];
      const V right = y[i][1] - y[i][2] - y[i][3];
      float* out = to + i * row;
      set_line(out, add ? line(out) + left : left);
      set_line(out + pixel, add ? line(out + pixel) + right : right);
    }
  }
}

// ---- weights ----

EPSA_FN int64_t kernel_tap(const ConvWeights& weights, int64_t t) {
  return weights.turned ? 8 - t : t;
}

// Weights of one vector of output channels and L input channels, as [9][L][L].
template <class T>
EPSA_FN void load_kernels(
    const T* from, const ConvWeights& weights, int64_t outputs, float* to) {
  if (weights.out_stride == 1) {  // the lanes are dense
    for (int64_t t = 0; t < 9; ++t) {
      for (int64_t c = 0; c < L; ++c) {
        const T* lanes = from + c * weights.in_stride +
            kernel_tap(weights, t) * weights.tap_stride;
        set_line(
            to + (t * L + c) * L, outputs < L ? Memory<T>::load(lanes, outputs)
                                              : Memory<T>::load(lanes));
      }
    }
    return;
  }
  // Columns of matrices whose rows are the output channels: first their dense
  // dimension, of taps or channels, then the other; all at once if both are.
  const bool taps_inner = weights.tap_stride == 1;
  const int64_t inner = taps_inner ? 9 : L;
  const int64_t stride = taps_inner ? weights.in_stride : weights.tap_stride;
  const bool dense = stride == inner;
  const int64_t columns = dense ? 9 * L : inner;
  const T* rows[L];
  V v[L];
  int64_t fast = 0, slow = 0;
  for (int64_t k = 0; k < 9 * L / columns; ++k) {
    for (int i = 0; i < L; ++i) {
      rows[i] =
          i < outputs ? from + i * weights.out_stride + k * stride : nullptr;
    }
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t n = lesser(L, columns - j);
      load_transposed(rows, j, n, v);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = kernel_tap(weights, taps_inner ? fast : slow);
        const int64_t c = taps_inner ? slow : fast;
        set_line(to + (t * L + c) * L, v[i]);
        if (++fast == inner) {
          fast = 0;
          ++slow;
        }
      }
    }
  }
}

// The channels of one call, from c on: their weights stand together, as
// [point][channel][unit_channels].
EPSA_FN int64_t winograd_channels(const Conv& conv, int64_t c) {
  return lesser(kWinogradChannels, conv.ic() - c);
}

// From point to point: an odd number of lines, as at a multiple of a page all
// points would fall into the same set of the cache.
EPSA_FN int64_t point_floats(int64_t floats) { return (floats / L | 1) * L; }

template <class T>
void pack_winograd(
    const Conv& conv, const ConvPlan& plan, const ConvWeights& weights,
    int64_t unit, float* packed) {
  const Run run = unit_run(conv, plan, unit);
  const int64_t oc = conv.oc();
  const T* from = static_cast<const T*>(weights.data) +
      run.first / oc * weights.group_stride + run.first % oc * weights.out_stride;
  alignas(EPSA_VEC_BYTES) float kernels[9 * L * L];
  for (int64_t b = 0; b < plan.unit_channels; b += L) {
    for (int64_t c = 0; c < conv.ic(); c += L) {
      const int64_t outputs = greater(0, lesser(L, run.count - b));
      load_kernels(
          from + b * weights.out_stride + c * weights.in_stride, weights,
          outputs, kernels);
      const int64_t first = c / kWinogradChannels * kWinogradChannels;
      const int64_t point = point_floats(
          winograd_channels(conv, first) * plan.unit_channels);
      float* to = packed + winograd_weights(plan, first, L) +
          (c - first) * plan.unit_channels + b;
      for (int64_t i = 0; i < L; ++i, to += plan.unit_channels) {
        const float* g = kernels + i * L;
        Four columns[3];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          columns[j] = transform_kernel(
              line(g + j * L * L), line(g + (3 + j) * L * L),
              line(g + (6 + j) * L * L));
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const Four row = transform_kernel(
              columns[0].v[j], columns[1].v[j], columns[2].v[j]);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            set_line(to + (4 * j + k) * point, row.v[k]);
          }
        }
      }
    }
  }
}

// ---- convolution ----

// Tiles of 2 x 2 outputs that are transformed and multiplied together, from output
// row h and column w on, for some blocks of input channels.
struct WinogradPiece {
  int64_t h, w, across, down, first_block, blocks;

  EPSA_FN int64_t tiles() const { return across * down; }
  // images [point][block][tile][L], then products [point][tile][width]
  EPSA_FN int64_t image_point() const {
    return point_floats(blocks * tiles() * L);
  }
  EPSA_FN int64_t product_point(int64_t width) const {
    return point_floats(tiles() * width);
  }
  EPSA_FN int64_t floats(int64_t width) const {
    return kWinogradPoints * (image_point() + product_point(width));
  }
};

// The largest piece.
EPSA_FN WinogradPiece winograd_piece(const ConvPlan& plan, int64_t channels) {
  return {
      0, 0, lesser(kWinogradTiles, plan.buffer_width / 2), pieces(plan.strip, 2),
      0, channels / L};
}

void transform_images(
    const Conv& conv, const Scratch& s, const WinogradPiece& piece,
    float* images) {
  for (int64_t b = 0; b < piece.blocks; ++b) {
    const float* image = s.data +
        ((piece.first_block + b) * s.height * s.width + s.border -
         conv.padding_w + piece.w) * L;
    for (int64_t i = 0; i < piece.down; ++i) {
      const float* rows[4];
      for (int k = 0; k < 4; ++k) {
        const int64_t h = piece.h + 2 * i + k - conv.padding_h;
        rows[k] = h < 0 || h >= conv.height ? nullptr : image + h * s.width * L;
      }
      transform_row(
          rows, piece.across,
          images + (b * piece.tiles() + i * piece.across) * L,
          piece.image_point());
    }
  }
}

// At each point a product of matrices: [tiles][channels] times [channels][width].
void multiply_points(
    const ConvPlan& plan, const WinogradPiece& piece, const float* images,
    const float* weights, float* products) {
  const int64_t tiles = piece.tiles(), width = plan.unit_channels;
  const int64_t weights_point = point_floats(piece.blocks * L * width);
  const int block = place(kBlocks, plan.block);
  Tile t{};  // of a 1 x 1 kernel, whose "rows" are the blocks
  t.row = tiles * L;
  t.kernel_h = t.last_row = piece.blocks;
  t.kernel_w = t.vectors = 1;
  t.channels = L;
  t.pitch = width;
  for (int64_t q = 0; q < kWinogradPoints; ++q) {
    t.w = weights + q * weights_point;
    for (int64_t i = 0, n = 0; i < tiles; i += n) {
      n = lesser(plan.pixels, largest_tile(tiles - i));
      t.x = images + q * piece.image_point() + i * L;
      t.sums = products + q * piece.product_point(width) + i * width;
      kTiles[0][0][block][place(kPixels, n)](t);
    }
  }
}

// As `convolve`, of kWinogradChannels at a time.
int64_t convolve_winograd(
    const Conv& conv, const ConvPlan& plan, const Scratch& s,
    const float* packed, int64_t unit, int64_t c, int64_t begin, int64_t end,
    const Sums& sums, float* memory) {
  const int64_t channels = winograd_channels(conv, c);
  const int64_t width = plan.unit_channels;
  const int64_t c0 = unit_run(conv, plan, unit).first / conv.oc() * conv.ic();
  const WinogradPiece most = winograd_piece(plan, channels);
  for (int64_t h = begin; h < end; h += 2 * most.down) {
    for (int64_t w = 0; w < plan.buffer_width; w += 2 * most.across) {
      const WinogradPiece piece{
          h, w, lesser(most.across, (plan.buffer_width - w) / 2),
          lesser(most.down, pieces(end - h, 2)), (c0 + c) / L, most.blocks};
      float* products = memory + kWinogradPoints * piece.image_point();
      transform_images(conv, s, piece, memory);
      multiply_points(
          plan, piece, memory, packed + winograd_weights(plan, c, L), products);
      for (int64_t t = 0; t < piece.tiles(); ++t) {
        const int64_t row = h + t / piece.across * 2;
        float* to = sums.data + (row - begin) * sums.row_stride +
            (w + t % piece.across * 2) * sums.pixel_stride;
        for (int64_t b = 0; b < width; b += L) {
          transform_back(
              products + t * width + b, piece.product_point(width), to + b,
              sums.pixel_stride, sums.row_stride, row + 1 < end,
              sums.add || c > 0);
        }
      }
    }
  }
  return c + channels;
}

int64_t winograd_floats(const Conv& conv, const ConvPlan& plan) {
  return winograd_piece(plan, winograd_channels(conv, 0))
      .floats(plan.unit_channels);
}
