// How the CPU computes one grouped convolution: a pure function of shapes and
// instruction set. No torch header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace epsa::cpu {

// One branch's convolution. The output's size is given, as it does not follow from the
// input's where the convolution is part of a gradient.
struct Conv {
  int64_t in_channels, out_channels, groups;  // pairs: two inputs count as one
  int64_t kernel_h, kernel_w;
  int64_t stride, dilation;      // vertical and horizontal
  int64_t padding_h, padding_w;  // above and left
  int64_t height, width;         // of the input
  int64_t out_height, out_width;
  bool winograd = true;  // whether Winograd's method may compute it
  // Whether two bfloat16 channels of the input stand where kernels have one of float.
  bool pairs = false;
  // Whether it is a phase of an input's gradient (below). No other convolution reads its
  // scratch, and its sums are added to those of other branches.
  bool phase = false;

  int64_t ic() const { return in_channels / groups; }  // of one group
  int64_t oc() const { return out_channels / groups; }
  int64_t taps() const { return kernel_h * kernel_w; }
};

// As at::conv2d defines it.
Conv make_conv(
    int64_t in_channels, int64_t out_channels, int64_t groups, int64_t kernel_h, int64_t kernel_w,
    int64_t stride, int64_t padding, int64_t dilation, int64_t height, int64_t width);

enum class ConvMethod {
  // Lanes are output channels of one group; an input channel is broadcast.
  broadcast,
  // Lanes are input channels. The lanes of a group are summed at the end.
  dot,
  // Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, arXiv 1509.09308). Lanes are those of
  // broadcast. 16 products of transformed images and weights replace 36.
  winograd,
  // No kernel here fits: at::conv2d.
  library,
  // Products of matrices in AMX's tiles. Needs pairs.
  matrix,
};

std::string name(ConvMethod method);

// A unit of work is a run of output channels of one branch and a strip of output rows.
// Its sums are in a tile buffer [rows][buffer_width][unit_pitch].
struct ConvPlan {
  ConvMethod method = ConvMethod::library;
  // Registers hold a tile's sums: `pixels` of an output row (winograd: transforms), times
  // `block` vectors of output channels (dot: single output channels). matrix: `pixels`
  // positions of `block` pixels each.
  int pixels = 0;
  int block = 0;
  int64_t unit_channels = 0;  // output channels of a unit; the last may have fewer
  bool by_group = true;       // whether they belong to one group, or run across groups
  int64_t units = 0;          // runs of output channels
  int64_t unit_pitch = 0;     // floats from pixel to pixel of the tile buffer
  int64_t unit_weights = 0;   // packed floats of one unit
  int64_t buffer_width = 0;   // pixels of its rows: whole tiles
  int64_t strip = 0;          // output rows of a unit; the last strip may have fewer
  int64_t depth = 0;          // lanes of a pixel in the scratch
  int64_t reach = 0;          // buffer_width, and the pixels that a matrix reads behind it

  int64_t strips(int64_t out_height) const { return (out_height + strip - 1) / strip; }
};

// How weights were packed, for images of any size. Block 0: they were not.
struct Packing {
  ConvMethod method = ConvMethod::library;
  int block = 0;
  int columns = 0;  // matrix: of the kernel, which depend on the stride

  bool operator==(const Packing& other) const {
    return method == other.method && block == other.block && columns == other.columns;
  }
};

// in_double: float64, which has no kernels here. packed: the plan must read such weights.
// The units of a phase must begin at whole vectors; otherwise its plan is `library`.
ConvPlan plan_conv(const Conv& conv, bool in_double, Isa isa, const Packing& packed = {});

// The plan of a given tile, which must fit. The block must divide a group's vectors of
// output channels (dot: its output channels).
ConvPlan tile_plan(const Conv& conv, ConvMethod method, int pixels, int block, Isa isa);

// The gradient of a convolution's input is stride * stride convolutions of its output's
// gradient. Each of them, a phase, makes every stride-th row and column of the result,
// from (first_row, first_column) on. Its kernel is every stride-th row and column of the
// weights, from (tap_row, tap_column) on, turned around. Input and output channels change
// roles.
struct Phase {
  int64_t first_row, first_column, tap_row, tap_column;
  Conv conv;  // one of the kernel's sizes is 0 where it has no such taps
};
Phase grad_input_phase(const Conv& conv, int64_t first_row, int64_t first_column);

// How the gradient of a branch's weight is computed. Lanes are input channels, as in dot.
// Registers sum a tile over all pixels: taps of a kernel's row, times `block` output
// channels of each of the lanes' groups.
//
// matrix: a unit has up to L output channels of the lanes' groups. Each tap is a product
// of matrices: A has these channels of the output's gradient, B the lanes of x under the
// tap, and pixels are what both share (PixelRuns).
struct WeightGradPlan {
  bool library = true;
  bool matrix = false;
  int block = 0;          // matrix: unused
  int64_t units = 0;      // vectors of input channels times blocks of output channels
  int64_t unit_sums = 0;  // floats
};
WeightGradPlan plan_weight_grad(const Conv& conv, bool in_double, Isa isa);

// The same by matrix. `library` where it cannot, or where plan_weight_grad could not.
WeightGradPlan plan_matrix_grad(const Conv& conv, Isa isa);

// The output channels of one unit.
struct Run {
  int64_t first, count;
};
Run unit_run(const Conv& conv, const ConvPlan& plan, int64_t unit);

// An image in blocks of channels, padded to the left and right. Nothing pads it above
// and below: the kernels skip the rows of taps that lie outside. The padding is zero, and
// so are the lanes behind the last channel. (Pairs of pixels begin in the padding.)
struct Scratch {
  float* data;
  int64_t lanes;          // of a block: L, or the depth of a matrix
  int64_t height, width;  // of the padded image
  int64_t border;         // columns left of the image
  int64_t beyond;         // columns behind the last row, which are zero
};

// The size of a scratch that several convolutions read.
struct ScratchSize {
  int64_t border = 0;  // columns left of the image
  int64_t width = 0;   // columns with their padding
  int64_t beyond = 0;  // columns that the last tile reads behind the last row

  // Makes room for all reads of conv, whose plan has this reach.
  void include(const Conv& conv, int64_t reach);
  // The floats of one image, in blocks of `lanes` channels.
  int64_t floats(int64_t channels, int64_t height, int64_t lanes) const {
    return ((channels + lanes - 1) / lanes * height * width + beyond) * lanes;
  }
  Scratch scratch(float* data, int64_t height, int64_t lanes) const {
    return {data, lanes, height, width, border, beyond};
  }
};

// Dot's lanes. A vector holds several narrow groups, or a wide group takes several
// vectors.
struct DotLanes {
  int64_t run;      // lanes of one group
  int64_t groups;   // of one vector
  int64_t vectors;  // of one group

  DotLanes(const Conv& conv, int64_t lanes)
      : run(conv.ic() < lanes ? conv.ic() : lanes), groups(lanes / run), vectors(conv.ic() / run) {}

  static bool fit(const Conv& conv, int64_t lanes) {
    const int64_t ic = conv.ic();
    return ic < lanes ? lanes % ic == 0 : ic % lanes == 0;
  }
  // The vectors, or runs of vectors, that hold whole groups.
  int64_t clusters(const Conv& conv) const { return (conv.groups + groups - 1) / groups; }
};

// The rows of A in the gradient of the weights by matrix: the outputs of a cluster of dot's
// lanes. Where these are few, each has `moved` copies, one after another. Copy r is moved
// down by r rows, and so meets the kernel's row r * stride further.
struct MatrixGradRows {
  DotLanes lanes;
  int64_t moved = 1;
  int64_t count;      // of a cluster
  int64_t tiles = 0;  // of one column of the kernel

  MatrixGradRows(const Conv& conv, int64_t lanes_) : lanes(conv, lanes_) {
    const int64_t outputs = lanes.groups * conv.oc();
    if (2 * outputs <= lanes_ && conv.dilation == 1) {
      const int64_t rows = (conv.kernel_h + conv.stride - 1) / conv.stride;
      moved = rows < lanes_ / outputs ? rows : lanes_ / outputs;
    }
    count = outputs * moved;
    while (kernel_row(conv, tiles, 0) < conv.kernel_h) {
      ++tiles;
    }
  }

  // The kernel's row that copy r meets in a tile. There may be no such row.
  int64_t kernel_row(const Conv& conv, int64_t tile, int64_t r) const {
    const int64_t s = conv.stride;
    return tile / s * s * moved + tile % s + r * s;
  }
};

constexpr int kRunPixels = 32;  // of a row of A: pairs of bfloat16 in a register

// One sample as the gradients of the weights by matrix read it. The output's pixels are
// numbered row by row, with `pitch` numbers for each row, so that runs of pixels cross from
// row to row. A plane of an output's gradient is zero where a number has no pixel. x is in
// blocks of L channels. Its place S * i, moved by a tap, is what the tap of pixel i meets,
// where S is the stride. A place holds a pair: its own pixel, and the one S columns further.
struct PixelRuns {
  int64_t stride = 1;
  int64_t border = 0, top = 0;  // columns left of x and rows above it, which are zero
  int64_t pitch = 0, rows = 0;  // places of a row, rows of a block
  int64_t runs = 0;             // of a plane
  int64_t beyond = 0;           // places behind the last block, which are zero

  PixelRuns() = default;
  PixelRuns(const std::vector<Conv>& convs, int lanes);  // of one module

  int64_t block() const { return rows * pitch; }  // places
  int64_t x_floats(int64_t channels, int64_t lanes) const {
    return ((channels + lanes - 1) / lanes * block() + beyond) * lanes;
  }
  int64_t plane_floats() const { return runs * (kRunPixels / 2); }
};

// Matrix's tiles have L rows of a register each. A row of A is a vector of dot's lanes
// under one tap. A column of B is one output channel of these lanes' groups. Where the
// groups have few outputs, B also has columns for the pixels to the right: a `position`
// is a run of output pixels. B is zero where a lane's group is not the column's.
//
// A phase has a scratch of its own, where a pixel holds the channels of one group. If they
// are fewer than L, a row of A has the pixels under several taps of a kernel's row.
struct MatrixTiles {
  int64_t depth;  // lanes of a pixel
  int64_t taps;   // of a row of A
  DotLanes lanes;
  int64_t outputs;   // of a vector's groups
  int64_t position;  // pixels; 0: the convolution does not fit
  int64_t columns;   // of the kernel, as far as a position sees, in rows of A

  MatrixTiles(const Conv& conv, int64_t lanes_)
      : depth(conv.phase && conv.dilation == 1 && conv.ic() < lanes_ ? conv.ic() : lanes_),
        taps(lanes_ / depth),
        lanes(conv, depth),
        outputs(lanes.groups * conv.oc()),
        position(0) {
    const int64_t together = lanes_ / outputs;
    if (lanes.groups == 1 || outputs <= lanes_) {
      position = 2 * outputs > lanes_                                    ? 1
          : lanes_ % outputs == 0 && together <= 4 && conv.dilation == 1 ? together
                                                                         : 0;
    }
    columns = (seen(conv) + taps - 1) / taps;
  }

  int64_t seen(const Conv& conv) const {  // pixels of a row, by a position
    return conv.kernel_w + conv.stride * (position - 1);
  }

  // Whether a unit is one group's run of outputs. Otherwise it is `position` vectors with
  // all of their outputs.
  bool by_group() const { return lanes.groups == 1 && position == 1; }
};

// ---- what the kernels are built for ----

constexpr int lanes_of(Isa isa) {  // floats of a register
  return isa >= Isa::avx512 ? 16 : isa == Isa::avx2 ? 8 : 4;
}

// A core's own cache, in floats. Larger weights leave it before the next sample needs them.
constexpr int64_t kCacheFloats = 1 << 18;

// Packed weights of up to so many values are compared with the originals in each call. To
// read more costs more than to pack them.
constexpr int64_t kComparedWeights = kCacheFloats;

constexpr int kMaxStride = 2;
constexpr int kPixels[] = {1, 2, 3, 4, 6, 7, 14, 28};
constexpr int kBlocks[] = {1, 2, 4, 8};

// The pixels of the largest tile that has at most so many.
constexpr int largest_tile(int64_t pixels) {
  int largest = 1;
  for (const int p : kPixels) {
    largest = p <= pixels ? p : largest;
  }
  return largest;
}

constexpr int kTaps[] = {9, 7, 5, 3, 1};  // of a weight gradient's tile

// Whether Winograd's method is allowed for conv, and can compute it.
constexpr bool is_winograd(const Conv& conv, int64_t lanes) {
  return conv.winograd && !conv.pairs && conv.kernel_h == 3 && conv.kernel_w == 3 &&
      conv.stride == 1 && conv.dilation == 1 && conv.ic() % lanes == 0;
}

constexpr int kWinogradPoints = 16;        // of a transform
constexpr int64_t kWinogradChannels = 64;  // of the input, at a time
// Tiles of 2 x 2 outputs at a time. So many read the weights seldom, and still fit into a
// core's own cache.
constexpr int64_t kWinogradTiles = 64;

// The floats of a unit's weights before those of input channel c. A line of the cache
// separates the points.
constexpr int64_t winograd_weights(const ConvPlan& plan, int64_t c, int64_t lanes) {
  const int64_t calls = (c + kWinogradChannels - 1) / kWinogradChannels;
  return kWinogradPoints * (c * plan.unit_channels + calls * lanes);
}

// Whether matrix can compute conv, which is of pairs.
inline bool is_matrix(const Conv& conv, int64_t lanes) {
  return conv.stride <= kMaxStride && DotLanes::fit(conv, lanes) &&
      MatrixTiles(conv, lanes).position > 0;
}

constexpr int kPairLanes = lanes_of(Isa::avx512_bf16);
constexpr int kMatrixLanes = lanes_of(Isa::amx_bf16);
constexpr int kMatrixTiles = 6;  // of sums at a time; AMX has two more, for A and B

// What plan's kernels read.
Packing packing_of(const Conv& conv, const ConvPlan& plan);

// conv with its inputs counted in pairs, or one by one.
Conv counted_in(const Conv& conv, bool pairs);

// Whether the tiles of pairs slide along a row: those of one vector, for these kernels.
constexpr int kRowKernels[] = {3, 5, 7, 9};
constexpr bool slides(const Conv& conv, int block) {
  bool known = false;
  for (const int k : kRowKernels) {
    known = known || conv.kernel_w == k;
  }
  return conv.pairs && block == 1 && conv.stride == 1 && conv.dilation == 1 && known;
}

// Whether the kernels of pairs compute a bfloat16 convolution. Where there is AMX, only
// matrix: the processors that have it make products of pairs no faster than of floats.
bool in_pairs(const Conv& conv, Isa isa);

// conv with two groups as one, where each has a single output: its phases then have pairs.
// The weights between the two are zeros.
Conv joined(const Conv& conv);

// Whether a tile's sums and operands fit into the registers.
constexpr bool fits(int pixels, int block, int lanes) {
  const int fewer = pixels < block ? pixels : block;
  return pixels * block + fewer + 1 <= (lanes == 16 ? 32 : 16);
}

}  // namespace epsa::cpu
