// The choice of tiles for the grouped convolutions (conv_plan.h).
#include "cuda/conv_params.h"

#include <numeric>

namespace epsa::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRows = 16;
constexpr int kMaxSlab = 256;  // a plane for each lane of a warp

int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

struct Tile {
  int height, width, images;
};

// The passes of a branch over one tile: each of a unit and of up to kConvTiles matrices.
int parts(const ConvUnit& unit, const Tile& tile) {
  return ceil_div(tile.height * tile.width / unit.positions * tile.images, kRows * kConvTiles);
}

// Inputs are four times the outputs.
int units_of_slab(const ConvUnit& unit, int slab) {
  return slab / 4 / unit.outputs();
}

// Shared memory has 8 places of 16 bytes side by side. Eight rows of a matrix fall into
// different ones where a line's length is 7 modulo 8, and where the step from the end of a
// column of the tile to the start of the next one keeps that up.
void order_columns(const Tile& tile, const ConvUnit& unit, int& run, int& hop) {
  const int columns = tile.width / unit.positions;
  const int step = tile.height * 7 % 8;
  hop = std::max(1, step / unit.positions);
  while (columns % hop != 0) {
    --hop;
  }
  run = columns / hop;
}

ConvPlan plan_of(
    const ConvProblem& p, const Tile& tile, int slab, int threads,
    const std::vector<ConvUnit>& units) {
  ConvPlan plan{};
  plan.tile_h = tile.height;
  plan.tile_w = tile.width;
  plan.images = tile.images;
  plan.slab = slab;
  plan.threads = threads;
  plan.rows = tile.height + 2 * kConvHalo;
  plan.row = tile.width + 2 * kConvHalo;
  plan.row += (15 - plan.row % 8) % 8;
  plan.plane = (tile.images * plan.rows * plan.row | 1) * 16;
  plan.tiles_y = ceil_div(p.height, tile.height);
  plan.tiles_x = ceil_div(p.width, tile.width);
  plan.blocks =
      int64_t{p.channels / slab} * plan.tiles_y * plan.tiles_x * ceil_div(p.samples, tile.images);
  plan.shared_bytes = int64_t{plan.plane} * (slab / 8);
  plan.units = units;
  for (const ConvUnit& unit : units) {
    int run, hop;
    order_columns(tile, unit, run, hop);
    plan.runs.push_back(run);
    plan.hops.push_back(hop);
  }
  return plan;
}

// Cycles of a launch, fitted to measured times of an H200: within 15% of them.
double cost(const ConvPlan& plan, const ConvDevice& device) {
  // A step multiplies kConvTiles matrices, once for each of the unit's width.
  constexpr double kStart = 4000, kBytes = 12, kOfAll = 28, kOfOne = 90, kPass = 1500;
  std::vector<double> warps(plan.threads / kWarp);
  double all = 0;
  size_t warp = 0;
  for (const ConvUnit& unit : plan.units) {
    const int passes =
        units_of_slab(unit, plan.slab) * parts(unit, {plan.tile_h, plan.tile_w, plan.images});
    const double steps = unit.chunks * unit.kernel * unit.steps();
    for (int i = 0; i < passes; ++i) {
      warps[warp++ % warps.size()] +=
          steps * (unit.wide > 1 ? 1.35 : 1) * kOfOne + kPass / static_cast<double>(warps.size());
      all += steps * kOfAll;
    }
  }
  const double longest = *std::max_element(warps.begin(), warps.end());
  const int64_t by_registers = (plan.large() ? kConvLargeThreads : 2 * kConvThreads) / plan.threads;
  const int64_t by_memory = device.shared_per_multiprocessor / (plan.shared_bytes + 1024);
  const int64_t held =
      std::max<int64_t>(1, std::min(by_registers, by_memory)) * device.multiprocessors;
  const auto wave = [&](int64_t blocks) {
    const double share = std::max(1.0, static_cast<double>(blocks) / device.multiprocessors);
    const double work = share * all;
    return kStart + share * static_cast<double>(plan.shared_bytes) / kBytes +
        0.75 * std::max(work, longest) + 0.25 * std::min(work, longest);
  };
  const int64_t rest = plan.blocks % held;
  return static_cast<double>(plan.blocks / held) * wave(held) + (rest > 0 ? wave(rest) : 0);
}

}  // namespace

bool conv_supported(const ConvShape& s) {
  const bool power = (s.inputs & (s.inputs - 1)) == 0;  // so that planes share a warp evenly
  return (s.kernel == 5 || s.kernel == 7 || s.kernel == 9) && s.inputs == 4 * s.outputs && power &&
      s.inputs >= 4 && s.inputs <= kMaxSlab;
}

ConvUnit conv_unit(const ConvShape& s) {
  if (s.inputs <= 8) {
    return {s.kernel, 4, 1, 1};
  }
  if (s.inputs == 16) {
    return {s.kernel, 2, 1, 1};
  }
  return {s.kernel, 1, s.outputs % 16 == 0 && s.kernel < 9 ? 2 : 1, s.inputs / 16};
}

int64_t packed_bytes(const ConvUnit& unit, int outputs) {
  return int64_t{outputs / unit.outputs()} * unit.entries() * kWarp * 8;
}

void set_conv_plan(ConvParams& params, const ConvProblem& problem, const ConvPlan& plan) {
  params.samples = problem.samples;
  params.height = problem.height;
  params.width = problem.width;
  params.channels = problem.channels;
  params.outputs = problem.outputs;
  params.tile_h = plan.tile_h;
  params.tile_w = plan.tile_w;
  params.images = plan.images;
  params.slab = plan.slab;
  params.rows = plan.rows;
  params.row = plan.row;
  params.plane = plan.plane;
  params.tiles_y = plan.tiles_y;
  params.tiles_x = plan.tiles_x;
  params.branches = static_cast<int>(plan.units.size());
  params.entries = 0;
  for (int s = 0; s < params.branches; ++s) {
    const ConvUnit& unit = plan.units[s];
    ConvBranch& b = params.branch[s];
    b.first = params.entries;
    b.unit = unit;
    b.inputs = problem.branches[s].inputs;
    b.outputs = problem.branches[s].outputs;
    b.units = units_of_slab(unit, plan.slab);
    b.parts = parts(unit, {plan.tile_h, plan.tile_w, plan.images});
    b.run = plan.runs[s];
    b.hop = plan.hops[s];
    params.entries += int64_t{problem.outputs / unit.outputs()} * unit.entries();
  }
}

std::vector<ConvPlan> conv_plans(const ConvProblem& p, const ConvDevice& device) {
  std::vector<ConvUnit> units;
  int least = 16, positions = 1;  // channels of a slab; pixels of a row of a matrix
  for (const ConvShape& shape : p.branches) {
    units.push_back(conv_unit(shape));
    least = std::lcm(least, units.back().inputs());
    positions = std::max(positions, units.back().positions);
  }
  const int width = ceil_div(p.width, positions) * positions;
  std::vector<int> widths{8, 16, 28, 56};
  if (width < 56 && std::count(widths.begin(), widths.end(), width) == 0) {
    widths.push_back(width);
  }
  std::vector<Tile> tiles;
  for (const int h : {7, 8, 14, 16, 28}) {
    for (const int w : widths) {
      if (h < p.height + 7 && w <= width && w % positions == 0 && h * w <= 1024) {
        tiles.push_back({h, w, 1});
        if (h >= p.height && w >= p.width && h * w <= 256 && p.samples > 1) {
          tiles.push_back({h, w, 2});
        }
      }
    }
  }
  std::vector<std::pair<double, ConvPlan>> found;
  for (const Tile& tile : tiles) {
    // Whole slabs: a block cannot hold a part of one.
    for (int slab = least; slab <= kMaxSlab && p.channels % slab == 0; slab *= 2) {
      for (const int threads : {128, 192, 256, 384}) {
        ConvPlan plan = plan_of(p, tile, slab, threads, units);
        plan.shared_limit = device.shared_per_block;
        if (plan.shared_bytes <= plan.shared_limit && (threads <= kConvThreads || plan.large())) {
          found.emplace_back(cost(plan, device), plan);
        }
      }
    }
  }
  std::stable_sort(
      found.begin(), found.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<ConvPlan> plans;
  for (auto& [cycles, plan] : found) {
    plans.push_back(std::move(plan));
  }
  return plans;
}

}  // namespace epsa::cuda
