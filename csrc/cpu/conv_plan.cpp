#include "cpu/conv_plan.h"

#include <algorithm>

#include "types.h"

namespace epsa::cpu {
namespace {

int64_t pieces(int64_t n, int64_t size) {
  return (n + size - 1) / size;
}

// Cycles of a tile per tap and channel. The core has two FMA units and two load ports,
// and issues four instructions a cycle.
double tile_cycles(int pixels, int block) {
  const int fmas = pixels * block;
  const int fewer = pixels < block ? pixels : block;
  const int more = pixels + block - fewer;
  // With a single value or vector of weights, the FMA itself loads the other operand.
  const int loads = fewer == 1 ? 0 : more;
  const double by_port = (fmas > fewer + more ? fmas : fewer + more) / 2.0;
  const double by_issue = (fmas + fewer + loads + 8) / 4.0;
  const double busiest = by_port > by_issue ? by_port : by_issue;
  return busiest > 4 ? busiest : 4;  // the latency of an FMA
}

// Counts the pairs of an output row and a row of a 3 x 3 kernel that meet in the image;
// likewise for columns.
double meetings(int64_t out, int64_t padding, int64_t size) {
  int64_t count = 0;
  for (int64_t k = 0; k < 3; ++k) {
    const int64_t first = std::max<int64_t>(0, padding - k);
    count += std::max<int64_t>(0, std::min(out, size + padding - k) - first);
  }
  return static_cast<double>(count);
}

int64_t winograd_strip(const Conv& conv) {
  const int64_t rows = 2 * std::max<int64_t>(1, kWinogradTiles / pieces(conv.out_width, 2));
  return std::min(rows, conv.out_height);
}

// Transforms cost about a quarter of their products. Reading weights that exceed a core's
// own cache costs more than the products save.
bool winograd_pays(const Conv& conv) {
  const double direct = meetings(conv.out_height, conv.padding_h, conv.height) *
      meetings(conv.out_width, conv.padding_w, conv.width);
  const double transformed = kWinogradPoints * static_cast<double>(pieces(conv.out_height, 2)) *
      static_cast<double>(pieces(conv.out_width, 2));
  const double weights =
      kWinogradPoints * static_cast<double>(conv.ic()) * static_cast<double>(conv.oc());
  return direct > 1.25 * transformed && weights <= static_cast<double>(kCacheFloats);
}

// Cycles of an output row per tap and channel.
double row_cycles(const Conv& conv, int pixels, int block) {
  return tile_cycles(pixels, block) * static_cast<double>(pieces(conv.out_width, pixels));
}

// Cycles of a strip per input channel: the transforms, which each unit makes for itself,
// and their products. The last products are in smaller tiles.
double winograd_cycles(const Conv& conv, int pixels, int block) {
  constexpr double kTransform = 4;
  const int64_t tiles =
      pieces(winograd_strip(conv), 2) * std::min(kWinogradTiles, pieces(conv.out_width, 2));
  double cycles = tile_cycles(pixels, block) * static_cast<double>(tiles / pixels);
  for (int64_t rest = tiles % pixels; rest > 0;) {
    const int piece = largest_tile(rest);
    cycles += tile_cycles(piece, block);
    rest -= piece;
  }
  return kWinogradPoints * cycles + kTransform * static_cast<double>(tiles);
}

// Matrix's batches of tiles in an image, where a row of the output has `across` tiles. Each
// batch reads all weights.
int64_t matrix_batches(int64_t rows, int64_t across, int64_t strip) {
  return rows / strip * pieces(strip * across, kMatrixTiles) +
      pieces(rows % strip * across, kMatrixTiles);
}

ConvMethod choose_method(const Conv& conv, int lanes, Isa isa, const Packing& packed) {
  // A phase's units of these methods begin at whole vectors.
  const bool whole = !conv.phase || conv.oc() % lanes == 0;
  if (conv.pairs && isa >= Isa::amx_bf16) {
    const bool fits = is_matrix(conv, lanes) && (whole || MatrixTiles(conv, lanes).position > 1);
    return fits ? ConvMethod::matrix : ConvMethod::library;
  }
  if (DotLanes::fit(conv, lanes) && conv.oc() < lanes) {
    return ConvMethod::dot;
  }
  if (!whole || pieces(conv.oc(), lanes) * lanes > 2 * conv.oc()) {
    return ConvMethod::library;  // most lanes would be idle
  }
  const bool winograd = is_winograd(conv, lanes) &&
      (packed.block ? packed.method == ConvMethod::winograd : winograd_pays(conv));
  return winograd ? ConvMethod::winograd : ConvMethod::broadcast;
}

}  // namespace

Conv make_conv(
    int64_t in_channels, int64_t out_channels, int64_t groups, int64_t kernel_h, int64_t kernel_w,
    int64_t stride, int64_t padding, int64_t dilation, int64_t height, int64_t width) {
  return {
      in_channels,
      out_channels,
      groups,
      kernel_h,
      kernel_w,
      stride,
      dilation,
      padding,
      padding,
      height,
      width,
      conv_out_size(height, kernel_h, stride, padding, dilation),
      conv_out_size(width, kernel_w, stride, padding, dilation)};
}

std::string name(ConvMethod method) {
  switch (method) {
    case ConvMethod::broadcast:
      return "broadcast";
    case ConvMethod::dot:
      return "dot";
    case ConvMethod::winograd:
      return "winograd";
    case ConvMethod::library:
      return "library";
    case ConvMethod::matrix:
      return "matrix";
  }
  return "?";
}

ConvPlan plan_conv(const Conv& conv, bool in_double, Isa isa, const Packing& packed) {
  if (in_double || conv.stride > kMaxStride || conv.padding_h < 0 || conv.padding_w < 0) {
    return {};
  }
  const int lanes = lanes_of(isa);
  const ConvMethod method = choose_method(conv, lanes, isa, packed);
  if (method == ConvMethod::library) {
    return {};
  }
  if (method == ConvMethod::matrix) {
    const int64_t position = MatrixTiles(conv, lanes).position;
    const int64_t positions = pieces(conv.out_width, position);
    return tile_plan(
        conv, method, static_cast<int>(pieces(positions, pieces(positions, lanes))),
        static_cast<int>(position), isa);
  }
  const bool dot = method == ConvMethod::dot;
  const bool winograd = method == ConvMethod::winograd;
  // A group's output channels (dot), or vectors of them.
  const int64_t outputs = dot ? conv.oc() : pieces(conv.oc(), lanes);
  int best_pixels = 0, best_block = 0;
  double best = 0;
  for (int block : kBlocks) {
    if (outputs % block || (packed.block && block != packed.block)) {
      continue;
    }
    for (int pixels : kPixels) {
      // Winograd's blocks are small, which makes units enough for all threads.
      if (!fits(pixels, block, lanes) || (winograd && block * lanes > 32)) {
        continue;
      }
      const double cost =
          (winograd ? winograd_cycles(conv, pixels, block) : row_cycles(conv, pixels, block)) /
          block;
      if (best_block == 0 || cost < best) {
        best = cost;
        best_block = block;
        best_pixels = pixels;
      }
    }
  }
  if (slides(conv, best_block) && best_pixels == 28) {
    best_pixels = 14;  // leaves registers for the weights of a kernel's row
  }
  return best_block == 0 ? ConvPlan() : tile_plan(conv, method, best_pixels, best_block, isa);
}

ConvPlan tile_plan(const Conv& conv, ConvMethod method, int pixels, int block, Isa isa) {
  const int lanes = lanes_of(isa);
  ConvPlan plan;
  plan.method = method;
  plan.pixels = pixels;
  plan.block = block;
  if (method == ConvMethod::dot) {
    const DotLanes dot_lanes(conv, lanes);
    const int64_t outputs = dot_lanes.groups * conv.oc();  // of a cluster
    const int64_t clusters = std::max<int64_t>(1, lanes / outputs);
    plan.by_group = false;
    plan.unit_channels = clusters * outputs;
    plan.units = pieces(dot_lanes.clusters(conv), clusters);
    plan.unit_weights = clusters * conv.oc() * dot_lanes.vectors * conv.taps() * lanes;
  } else if (method == ConvMethod::matrix) {
    const MatrixTiles tiles(conv, lanes);
    plan.by_group = tiles.by_group();
    if (plan.by_group) {
      plan.unit_channels = lanes;
      plan.units = conv.groups * pieces(conv.oc(), lanes);
    } else {
      plan.unit_channels = tiles.position * tiles.outputs;
      plan.units = pieces(tiles.lanes.clusters(conv), tiles.position);
    }
    plan.unit_weights =
        tiles.position * tiles.lanes.vectors * conv.kernel_h * tiles.columns * lanes * lanes;
  } else {
    plan.unit_channels = block * lanes;
    plan.units = conv.groups * (pieces(conv.oc(), lanes) / block);
    plan.unit_weights = method == ConvMethod::winograd
        ? winograd_weights(plan, conv.ic(), lanes)
        : conv.ic() * conv.taps() * plan.unit_channels;
  }
  plan.unit_pitch = pieces(plan.unit_channels, lanes) * lanes;
  plan.depth = lanes;
  if (method == ConvMethod::winograd) {
    plan.reach = plan.buffer_width = pieces(conv.out_width, 2) * 2;
    plan.strip = winograd_strip(conv);
    return plan;
  }
  const int64_t tile = method == ConvMethod::matrix ? pixels * block : pixels;
  plan.reach = plan.buffer_width = pieces(conv.out_width, tile) * tile;
  // Half of a small first-level cache.
  constexpr int64_t kBufferFloats = 4096;
  plan.strip = std::clamp<int64_t>(
      kBufferFloats / (plan.buffer_width * plan.unit_pitch), 1, conv.out_height);
  if (method == ConvMethod::matrix) {
    const MatrixTiles tiles(conv, lanes);
    plan.depth = tiles.depth;
    plan.reach += tiles.columns * tiles.taps - tiles.seen(conv);
    const int64_t across = plan.buffer_width / tile;
    for (int64_t strip = plan.strip - 1; strip > 0; --strip) {
      if (matrix_batches(conv.out_height, across, strip) <
          matrix_batches(conv.out_height, across, plan.strip)) {
        plan.strip = strip;
      }
    }
  }
  return plan;
}

Packing packing_of(const Conv& conv, const ConvPlan& plan) {
  const bool matrix = plan.method == ConvMethod::matrix;
  return {
      plan.method, plan.block,
      matrix ? static_cast<int>(MatrixTiles(conv, kMatrixLanes).columns) : 0};
}

Conv counted_in(const Conv& conv, bool pairs) {
  Conv result = conv;
  if (pairs != conv.pairs) {
    result.in_channels = pairs ? conv.in_channels / 2 : conv.in_channels * 2;
    result.pairs = pairs;
  }
  return result;
}

bool in_pairs(const Conv& conv, Isa isa) {
  return isa >= Isa::avx512_bf16 && conv.ic() % 2 == 0 && conv.stride <= kMaxStride &&
      choose_method(counted_in(conv, /*pairs=*/true), lanes_of(isa), isa, {}) !=
      ConvMethod::library;
}

Conv joined(const Conv& conv) {
  Conv result = conv;
  result.groups /= conv.oc() == 1 && conv.groups % 2 == 0 ? 2 : 1;
  return result;
}

Phase grad_input_phase(const Conv& conv, int64_t first_row, int64_t first_column) {
  // Row y of the input meets tap k of output row o where y = s * o + k - padding. Let
  // s * q + t be its row in the padded image. It meets the taps t, t + s, ... of the
  // output rows q, q - 1, ...
  const int64_t s = conv.stride;
  const int64_t row = first_row + conv.padding_h;
  const int64_t column = first_column + conv.padding_w;
  Phase phase{first_row, first_column, row % s, column % s, conv};
  Conv& c = phase.conv;
  c.phase = true;
  std::swap(c.in_channels, c.out_channels);
  c.stride = 1;
  c.kernel_h = pieces(conv.kernel_h - phase.tap_row, s);
  c.kernel_w = pieces(conv.kernel_w - phase.tap_column, s);
  // The turned kernel's first tap meets output row q - (taps - 1).
  c.padding_h = conv.dilation * (c.kernel_h - 1) - row / s;
  c.padding_w = conv.dilation * (c.kernel_w - 1) - column / s;
  c.height = conv.out_height;
  c.width = conv.out_width;
  c.out_height = pieces(conv.height - first_row, s);
  c.out_width = pieces(conv.width - first_column, s);
  return phase;
}

WeightGradPlan plan_weight_grad(const Conv& conv, bool in_double, Isa isa) {
  WeightGradPlan plan;
  const int lanes = lanes_of(isa);
  if (in_double || conv.stride > kMaxStride || conv.dilation != 1 || !DotLanes::fit(conv, lanes)) {
    return plan;
  }
  const DotLanes dot(conv, lanes);
  // All output channels of the lanes' groups must lie in one vector.
  if (dot.groups > 1 && (conv.oc() * dot.groups > lanes || lanes % (conv.oc() * dot.groups))) {
    return plan;
  }
  const int taps =
      *std::find_if(std::begin(kTaps), std::end(kTaps), [&](int k) { return k <= conv.kernel_w; });
  plan.library = false;
  for (int block : kBlocks) {
    if (block <= lanes && conv.oc() % block == 0 && fits(taps, block, lanes)) {
      plan.block = block;
    }
  }
  plan.units = dot.clusters(conv) * dot.vectors * (conv.oc() / plan.block);
  plan.unit_sums = conv.taps() * plan.block * lanes;
  return plan;
}

WeightGradPlan plan_matrix_grad(const Conv& conv, Isa isa) {
  WeightGradPlan plan;
  if (isa < Isa::amx_bf16 || plan_weight_grad(conv, /*in_double=*/false, isa).library) {
    return plan;
  }
  const int lanes = lanes_of(isa);
  const DotLanes dot(conv, lanes);
  plan.library = false;
  plan.matrix = true;
  const MatrixGradRows rows(conv, lanes);
  plan.units = dot.clusters(conv) * dot.vectors * pieces(rows.count, lanes);
  plan.unit_sums = rows.tiles * conv.kernel_w * lanes * lanes;
  return plan;
}

PixelRuns::PixelRuns(const std::vector<Conv>& convs, int lanes) {
  const Conv& first = convs.at(0);
  stride = first.stride;
  int64_t right = first.width, bottom = first.height;  // where reads of the image end
  int64_t tap_row = 0, tap_column = 0;                 // the last tap's place
  int64_t moved = 1;
  for (const Conv& c : convs) {
    border = std::max(border, c.padding_w);
    top = std::max(top, c.padding_h);
    const int64_t row = c.dilation * (c.kernel_h - 1) - c.padding_h;
    const int64_t column = c.dilation * (c.kernel_w - 1) - c.padding_w;
    tap_row = std::max(tap_row, row);
    moved = std::max(moved, MatrixGradRows(c, lanes).moved);
    tap_column = std::max(tap_column, column);
    bottom = std::max(bottom, stride * (c.out_height - 1) + row + 1);
    right = std::max(right, stride * (c.out_width - 1) + column + 1);
  }
  // What is read to the right of a row are the next row's zeros on the left.
  pitch = std::max({border + first.width, right, first.out_width});
  pitch += pitch % 2;  // a pair of pixels lies in one row
  rows = top + bottom + 1;
  // An odd number: channels fall into different sets of the cache.
  runs = pieces((first.out_height + moved - 1) * pitch, kRunPixels) | 1;
  const int64_t last = stride * runs * kRunPixels + (top + tap_row) * pitch + border + tap_column;
  beyond = std::max<int64_t>(0, last - block());
}

void ScratchSize::include(const Conv& conv, int64_t reach) {
  if (conv.padding_w > border) {  // moves the columns so far to the right
    width += conv.padding_w - border;
    border = conv.padding_w;
  }
  const int64_t left = border - conv.padding_w;
  const int64_t kernel = conv.dilation * (conv.kernel_w - 1) + 1;
  width =
      std::max({width, border + conv.width, left + (conv.out_width - 1) * conv.stride + kernel});
  // An odd number of lines. At a multiple of a page, the rows of a kernel would fall into
  // the same sets of the cache.
  width |= 1;
  beyond = std::max(beyond, (reach - conv.out_width) * conv.stride);
}

Run unit_run(const Conv& conv, const ConvPlan& plan, int64_t unit) {
  if (!plan.by_group) {
    const int64_t first = unit * plan.unit_channels;
    return {first, std::min(plan.unit_channels, conv.out_channels - first)};
  }
  const int64_t units = plan.units / conv.groups;  // of a group
  const int64_t first = unit % units * plan.unit_channels;
  return {unit / units * conv.oc() + first, std::min(plan.unit_channels, conv.oc() - first)};
}

}  // namespace epsa::cpu
