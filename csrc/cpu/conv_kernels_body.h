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

#include "conv_tiles_body.h"
#include "conv_packing_body.h"

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

#include "conv_winograd_body.h"

int64_t convolve(
    const Conv& conv, const ConvPlan& plan, const Scratch& s,
    const float* packed, int64_t unit, int64_t c, int64_t begin, int64_t end,
    const Sums& sums, float* lane_sums) {
  if (plan.method == ConvMethod::winograd) {
    return convolve_winograd(
        conv, plan, s, packed, unit, c, begin, end, sums, lane_sums);
  }
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
  switch (plan.method) {
    case ConvMethod::dot:
      return (greater(kColumn, column_width(conv, plan)) + L) * plan.block * L;
    case ConvMethod::winograd:
      return winograd_floats(conv, plan);
    default:
      return 0;
  }
}

#include "conv_weight_grad_body.h"

template <class T>
void pack_weights(
    const Conv& conv, const ConvPlan& plan, const ConvWeights& weights,
    int64_t unit, float* packed) {
  (plan.method == ConvMethod::dot             ? pack_dot<T>
       : plan.method == ConvMethod::winograd ? pack_winograd<T>
                                             : pack_broadcast<T>)(
      conv, plan, weights, unit, packed);
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
