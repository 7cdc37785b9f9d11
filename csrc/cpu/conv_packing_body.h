// Images and weights into the order in which the tiles read them, and sums into the
// output: a part of conv_kernels_body.h (no include guard).

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
            float* line_to = to + j * plan.block * L;
            if (weights.in_stride == 1) {  // a group's channels are dense
              for (int i = 0; i < L; i += lanes.run) {
                Memory<float>::store(
                    line_to + i,
                    rows[i] ? Memory<T>::load(
                                  rows[i] + tap * weights.tap_stride, lanes.run)
                            : V{},
                    lanes.run);
              }
              continue;
            }
            for (int i = 0; i < L; ++i) {
              line_to[i] = rows[i]
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
