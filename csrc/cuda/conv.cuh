// Grouped convolutions on tensor cores (conv_plan.h says how groups become matrices).
//
// A block holds the padded tile of some input channels in shared memory, in planes of 8
// channels. Its warps share the passes: a unit of a branch on up to kConvTiles matrices of
// rows. Sums are in float32, start with the bias, and are rounded once.
#pragma once

#include "cuda/conv_params.h"
#include "cuda/simt.cuh"

namespace epsa::cuda {

using simt::kWarp;

// A block's place in the batch.
struct ConvPlace {
  int slab, image, y, x;  // the first of each
};

template <class Int>
EPSA_DEVICE ConvPlace conv_place(const ConvParams& p, Int id) {
  const auto next = [&](int count) {
    const int i = static_cast<int>(id % count);
    id /= count;
    return i;
  };
  ConvPlace place;
  place.slab = next(p.channels / p.slab);
  place.x = next(p.tiles_x) * p.tile_w;
  place.y = next(p.tiles_y) * p.tile_h;
  place.image = static_cast<int>(id) * p.images;
  return place;
}

// ---- weights in the order of the kernel's reads ----

template <class T>
EPSA_DEVICE T packed_weight(
    const ConvBranch& b, int unit, int chunk, int ky, int step, int v, int column, int k) {
  const ConvUnit& u = b.unit;
  const int columns = 8 / u.positions;  // output channels
  const int position = column / columns;
  const int output = unit * u.outputs() + v * columns + column % columns;
  const int group = output / b.outputs;
  // the input channel among all, and the tap
  const int first = u.positions == 1 ? group * b.inputs + chunk * 16 : unit * u.inputs();
  const int input = first + (u.taps() == 2 ? k % 8 : k);
  const int kx = (u.taps() == 2 ? 2 * step + k / 8 : step) - position;
  if (kx < 0 || kx >= u.kernel || input / b.inputs != group) {
    T zero;
    simt::from_float(0.0f, zero);
    return zero;
  }
  return static_cast<const T*>(b.weight)
      [output * b.stride[0] + input % b.inputs * b.stride[1] + ky * b.stride[2] + kx * b.stride[3]];
}

template <class T>
EPSA_KERNEL(kConvThreads, 1)
pack_weights(EPSA_PARAMETER ConvParams p) {
  const int64_t index = int64_t{simt::block_id()} * simt::block_threads() + simt::thread_id();
  const int lane = static_cast<int>(index % kWarp);
  int64_t entry = index / kWarp;
  if (entry >= p.entries) {
    return;
  }
  int s = 0;
  while (s + 1 < p.branches && entry >= p.branch[s + 1].first) {
    ++s;
  }
  const ConvBranch& b = p.branch[s];
  entry -= b.first;
  T* to = static_cast<T*>(b.packed) + (entry * kWarp + lane) * 4;
  int rest = static_cast<int>(entry);
  const auto next = [&](int count) {
    const int i = rest % count;
    rest /= count;
    return i;
  };
  const int v = next(b.unit.wide), step = next(b.unit.steps()), ky = next(b.unit.kernel);
  const int chunk = next(b.unit.chunks), unit = rest;
  for (int i = 0; i < 4; ++i) {
    to[i] =
        packed_weight<T>(b, unit, chunk, ky, step, v, lane / 4, lane % 4 * 2 + i % 2 + i / 2 * 8);
  }
}

// ---- the padded tile ----

template <class T>
EPSA_DEVICE void load_tile(const ConvParams& p, const ConvPlace& place) {
  const int planes = p.slab / 8;  // a power of two up to 32: a lane copies to one plane
  const int lane = simt::thread_id() % kWarp, plane = lane % planes;
  const T* x = static_cast<const T*>(p.x) + place.slab * p.slab + plane * 8;
  unsigned char* shared = simt::shared_memory() + plane * p.plane;
  for (int line = simt::thread_id() / kWarp; line < p.images * p.rows;
       line += simt::block_threads() / kWarp) {
    const int image = line / p.rows;
    const int n = place.image + image, y = place.y + line - image * p.rows - kConvHalo;
    const bool inside = n < p.samples && y >= 0 && y < p.height;
    const T* from = x + (int64_t{n} * p.height + y) * p.width * p.channels;
    unsigned char* to = shared + line * p.row * 16;
#pragma unroll 4
    for (int i = lane / planes; i < p.row; i += kWarp / planes) {
      const int column = place.x + i - kConvHalo;
      if (inside && column >= 0 && column < p.width) {
        simt::copy_async16(to + i * 16, from + int64_t{column} * p.channels);
      } else {
        *reinterpret_cast<simt::Zeros16*>(to + i * 16) = simt::Zeros16{};
      }
    }
  }
  simt::copy_async_wait();
  simt::barrier();
}

// ---- one pass ----

// Where the row of a matrix lies in the tile.
template <int P>
struct ConvRow {
  int image, y, x;

  EPSA_DEVICE ConvRow(const ConvParams& p, const ConvBranch& b, int row) {
    const int of_image = p.tile_h * p.tile_w / P;
    image = row / of_image;
    row -= image * of_image;
    const int column = row / p.tile_h;
    y = row - column * p.tile_h;
    x = (column % b.run * b.hop + column / b.run) * P;
  }
};

template <class T, int K, int P, int W>
EPSA_DEVICE void convolve(const ConvParams& p, const ConvBranch& b, int slab, int unit, int part) {
  constexpr ConvUnit kUnit{K, P, W, 1};
  constexpr int kSteps = kUnit.steps(), kTaps = kUnit.taps();
  constexpr int kChannels = 8 / P;  // of the columns of the second matrix
  const int lane = simt::thread_id() % kWarp;
  const int rows = p.tile_h * p.tile_w / P * p.images;
  const auto row_of = [&](int i, int row) { return (part * kConvTiles + i) * 16 + row; };

  // This lane's rows of the first matrices, in bytes of shared memory. The upper half of the
  // lanes gives the columns 8 to 15: the next plane, or the next tap.
  const int plane =
      P > 1 ? unit * kUnit.inputs() / 8 : unit / (b.outputs / kUnit.outputs()) * 2 * b.unit.chunks;
  constexpr int kShift = kConvHalo - K / 2;
  int from =
      plane * p.plane + (kShift * p.row + kShift) * 16 + lane / 16 * (kTaps == 2 ? 16 : p.plane);
  int base[kConvTiles];
#pragma unroll
  for (int i = 0; i < kConvTiles; ++i) {
    const int r = row_of(i, lane % 16);
    const ConvRow<P> row(p, b, r < rows ? r : 0);
    base[i] = ((row.image * p.rows + row.y) * p.row + row.x) * 16;
  }

  // Each register is filled anew as soon as it was used, for a step or a line later.
  const int index = slab * b.units + unit;
  const auto* packed = static_cast<const simt::Half4*>(b.packed) +
      int64_t{index} * b.unit.chunks * K * kSteps * W * kWarp + lane;
  simt::Half4 w[kSteps * W];
#pragma unroll
  for (int u = 0; u < kSteps * W; ++u) {
    w[u] = simt::load_once(packed + u * kWarp);
  }
  simt::Matrices a[kConvTiles];
#pragma unroll
  for (int i = 0; i < kConvTiles; ++i) {
    a[i] = simt::load_matrices(from + base[i]);
  }
  float sums[kConvTiles][W][4] = {};
  if (b.bias) {
#pragma unroll
    for (int v = 0; v < W; ++v) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {  // the lane's two channels, as below
        const int channel = index * kUnit.outputs() + (lane % 4 * 2 + j) % kChannels + 8 * v;
        const float bias = simt::to_float(static_cast<const T*>(b.bias)[channel]);
#pragma unroll
        for (int i = 0; i < kConvTiles; ++i) {
          sums[i][v][j] = sums[i][v][j + 2] = bias;
        }
      }
    }
  }
  const int lines = b.unit.chunks * K;
  int ky = 0;
#pragma unroll 1
  for (int line = 1; line <= lines; ++line) {
    // The last line reads itself again.
    const bool more = line < lines;
    packed += more ? kSteps * W * kWarp : 0;
    ky = ky + 1 < K ? ky + 1 : 0;
    const int next = from + (!more ? 0 : ky > 0 ? p.row * 16 : 2 * p.plane - (K - 1) * p.row * 16);
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      const int after = u + 1 < kSteps ? from + (u + 1) * kTaps * 16 : next;
#pragma unroll
      for (int i = 0; i < kConvTiles; ++i) {
#pragma unroll
        for (int v = 0; v < W; ++v) {
          simt::multiply_add<T>(sums[i][v], a[i], w[u * W + v]);
        }
        a[i] = simt::load_matrices(after + base[i]);
      }
#pragma unroll
      for (int v = 0; v < W; ++v) {
        w[u * W + v] = simt::load_once(packed + (u * W + v) * kWarp);
      }
    }
    from = next;
  }

  // A lane has two neighbouring channels of one position, in two rows. The place is computed
  // anew: it would hold four registers in the loop.
  const ConvPlace place = conv_place(p, simt::block_id_read_again());
  const int column = lane % 4 * 2, position = column / kChannels;
  T* out = static_cast<T*>(b.out) + index * kUnit.outputs() + column % kChannels;
#pragma unroll
  for (int i = 0; i < kConvTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(i, lane / 4 + 8 * half);
      if (r >= rows) {
        continue;
      }
      const ConvRow<P> row(p, b, r);
      const int n = place.image + row.image, y = place.y + row.y, x = place.x + row.x + position;
      if (n < p.samples && y < p.height && x < p.width) {
        T* to = out + ((int64_t{n} * p.height + y) * p.width + x) * p.outputs;
#pragma unroll
        for (int v = 0; v < W; ++v) {
          simt::store_pair(to + 8 * v, sums[i][v][2 * half], sums[i][v][2 * half + 1]);
        }
      }
    }
  }
}

// The small kernel has no large units: it needs fewer registers, and two blocks of it fit.
template <class T, bool kLarge>
EPSA_KERNEL(kLarge ? kConvLargeThreads : kConvThreads, kLarge ? 1 : 2)
convolve_tile(EPSA_PARAMETER ConvParams p) {
  const ConvPlace place = conv_place(p, simt::block_id());
  load_tile<T>(p, place);
  const int warps = simt::block_threads() / kWarp;
  int pass = simt::thread_id() / kWarp;  // among those of the branch and of later ones
  for (int s = 0; s < p.branches; ++s) {
    const ConvBranch& b = p.branch[s];
    const int passes = b.units * b.parts;
    for (; pass < passes; pass += warps) {
      const int unit = pass / b.parts, part = pass % b.parts;
      switch (conv_instance(b.unit.kernel, b.unit.positions, b.unit.wide)) {
#define EPSA_ENTRY(K, P, W)                                  \
  case conv_instance(K, P, W):                               \
    if constexpr (kLarge || !ConvUnit{K, P, W, 1}.large()) { \
      convolve<T, K, P, W>(p, b, place.slab, unit, part);    \
    }                                                        \
    break;
        EPSA_CONV_UNITS(EPSA_ENTRY)
#undef EPSA_ENTRY
        default:
          break;
      }
    }
    pass -= passes;
  }
}

}  // namespace epsa::cuda
