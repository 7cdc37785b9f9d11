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
