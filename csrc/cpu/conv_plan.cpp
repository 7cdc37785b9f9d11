// The plan of a convolution (conv_plan.h).
#include "conv_plan.h"

#include <algorithm>

namespace epsa::cpu {
namespace {

int64_t pieces(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Cycles of a tile per tap and channel, of a core with two FMA units, two load
// ports and four instructions a cycle.
double tile_cycles(int pixels, int block) {
  const int fmas = pixels * block;
  const int fewer = pixels < block ? pixels : block;
  const int more = pixels + block - fewer;
  // with one vector of the fewer, the FMA itself loads the other operand
  const int loads = fewer == 1 ? 0 : more;
  const double by_port =
      (fmas > fewer + more ? fmas : fewer + more) / 2.0;
  const double by_issue = (fmas + fewer + loads + 8) / 4.0;
  const double busiest = by_port > by_issue ? by_port : by_issue;
  return busiest > 4 ? busiest : 4;  // the latency of an FMA
}

}  // namespace

ConvPlan plan_conv(const Conv& conv, bool in_double, Isa isa) {
  ConvPlan plan;
  if (in_double || conv.stride > kMaxStride) {
    return plan;
  }
  const int lanes = lanes_of(isa);
  const int64_t vectors = pieces(conv.oc(), lanes);  // of a group's outputs
  if (DotLanes::fit(conv, lanes) && conv.oc() < lanes) {
    plan.method = ConvMethod::dot;
  } else if (vectors * lanes <= 2 * conv.oc()) {
    plan.method = ConvMethod::broadcast;
  } else {
    return plan;
  }
  const bool dot = plan.method == ConvMethod::dot;
  double best = 0;
  for (int block : kBlocks) {
    if ((dot ? conv.oc() : vectors) % block) {
      continue;
    }
    for (int pixels : kPixels) {
      if (!fits(pixels, block, lanes)) {
        continue;
      }
      const double cost = tile_cycles(pixels, block) *
          static_cast<double>(pieces(conv.out_width(), pixels)) / block;
      if (plan.block == 0 || cost < best) {
        best = cost;
        plan.block = block;
        plan.pixels = pixels;
      }
    }
  }
  if (dot) {
    const DotLanes dot_lanes(conv, lanes);
    const int64_t outputs = dot_lanes.groups * conv.oc();  // of a cluster
    const int64_t clusters = std::max<int64_t>(1, lanes / outputs);
    plan.unit_channels = clusters * outputs;
    plan.units = pieces(dot_lanes.clusters(conv), clusters);
    plan.unit_weights =
        clusters * conv.oc() * dot_lanes.vectors * conv.taps() * lanes;
  } else {
    plan.unit_channels = plan.block * lanes;
    plan.units = conv.groups * (vectors / plan.block);
    plan.unit_weights = conv.ic() * conv.taps() * plan.unit_channels;
  }
  plan.unit_pitch = pieces(plan.unit_channels, lanes) * lanes;
  plan.buffer_width = pieces(conv.out_width(), plan.pixels) * plan.pixels;
  // a tile buffer as large as half of a small first-level cache
  constexpr int64_t kBufferFloats = 4096;
  plan.strip = std::clamp<int64_t>(
      kBufferFloats / (plan.buffer_width * plan.unit_pitch), 1,
      conv.out_height());
  return plan;
}

Conv transposed(const Conv& conv) {
  Conv t = conv;
  t.in_channels = conv.out_channels;
  t.out_channels = conv.in_channels;
  t.padding = conv.dilation * (conv.kernel_h - 1) - conv.padding;
  t.height = conv.out_height();
  t.width = conv.out_width();
  return t;
}

ConvPlan plan_grad_input(const Conv& conv, bool in_double, Isa isa) {
  const Conv t = transposed(conv);
  if (conv.stride != 1 || conv.kernel_h != conv.kernel_w || t.padding < 0) {
    return ConvPlan();
  }
  const ConvPlan plan = plan_conv(t, in_double, isa);
  const bool whole_vectors =
      plan.method == ConvMethod::dot || t.oc() % lanes_of(isa) == 0;
  return whole_vectors ? plan : ConvPlan();
}

WeightGradPlan plan_weight_grad(const Conv& conv, bool in_double, Isa isa) {
  WeightGradPlan plan;
  const int lanes = lanes_of(isa);
  if (in_double || conv.stride > kMaxStride || conv.dilation != 1 ||
      !DotLanes::fit(conv, lanes)) {
    return plan;
  }
  const DotLanes dot(conv, lanes);
  // the lanes' output channels must lie in one vector
  if (dot.groups > 1 &&
      (conv.oc() * dot.groups > lanes || lanes % (conv.oc() * dot.groups))) {
    return plan;
  }
  const int taps = *std::find_if(
      std::begin(kTaps), std::end(kTaps),
      [&](int k) { return k <= conv.kernel_w; });
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

void ScratchSize::include(const Conv& conv, int64_t buffer_width) {
  if (conv.padding > border) {  // the columns so far move to the right
    width += conv.padding - border;
    border = conv.padding;
  }
  const int64_t left = border - conv.padding;
  const int64_t reach = conv.dilation * (conv.kernel_w - 1) + 1;
  width = std::max(
      {width, border + conv.width,
       left + (conv.out_width() - 1) * conv.stride + reach});
  // An odd number of lines: at a multiple of a page the rows of a kernel would
  // fall into the same sets of the cache.
  width |= 1;
  beyond =
      std::max(beyond, (buffer_width - conv.out_width()) * conv.stride);
}

Run unit_run(const Conv& conv, const ConvPlan& plan, int64_t unit) {
  if (plan.method == ConvMethod::dot) {
    const int64_t first = unit * plan.unit_channels;
    return {first, std::min(plan.unit_channels, conv.out_channels - first)};
  }
  const int64_t units = plan.units / conv.groups;  // of a group
  const int64_t first = unit % units * plan.unit_channels;
  return {
      unit / units * conv.oc() + first,
      std::min(plan.unit_channels, conv.oc() - first)};
}

}  // namespace epsa::cpu
