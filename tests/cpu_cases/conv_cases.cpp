// The convolutions' kernels over a table of cases.
#include <initializer_list>

#include "conv_checks.h"

namespace epsa::cpu {
bool tiles_are_emulated();  // one_isa.cpp
}

namespace {

void run_case(const Case& k, const ConvPlan& plan, Isa isa) {
  check_forward<Float>(k, k.conv, plan, conv_kernels(Dtype::f32, isa), /*add=*/false);
  check_forward<Bfloat16>(k, k.conv, plan, conv_kernels(Dtype::bf16, isa), /*add=*/false);
  check_forward<Float16>(k, k.conv, plan, conv_kernels(Dtype::f16, isa), /*add=*/false);
}

void run_in_pairs(const Case& k, const ConvPlan& plan, Isa isa) {
  for (const bool add : {false, true}) {
    check_forward<Bfloat16>(k, counted_in(k.conv, /*pairs=*/true), plan, pair_kernels(isa), add);
  }
}

void run_weight_grads(const Case& k, Isa isa) {
  check_weight_grad<Float>(k, isa);
  check_weight_grad<Bfloat16>(k, isa);
  check_weight_grad<Float16>(k, isa);
}

void run_gradients(const Case& k, Isa isa) {
  run_weight_grads(k, isa);
  check_input_grad<Float>(k, isa);
  check_input_grad<Bfloat16>(k, isa);
  check_input_grad<Float16>(k, isa);
}

// ---- the table ----

// Groups, and the input and output channels of each. Lanes are full, shared or idle.
constexpr int64_t kChannels[][3] = {
    {1, 3, 5},  {1, 16, 17}, {1, 19, 33}, {2, 8, 12}, {1, 20, 36}, {3, 5, 7},
    {3, 32, 3}, {4, 4, 4},   {2, 16, 16}, {5, 2, 6},  {6, 1, 1},   {9, 8, 2},
    {11, 1, 3}, {37, 1, 1},  {3, 16, 8},  {2, 7, 4},
};
constexpr int64_t kKernels[][2] = {{1, 1}, {3, 3}, {2, 2},   {5, 5}, {7, 7},
                                   {1, 3}, {4, 1}, {11, 11}, {2, 9}};
constexpr int64_t kImages[][2] = {{1, 1}, {2, 3}, {5, 7}, {9, 8}, {3, 29}};
// All combinations of channels, kernels, strides and two dilations.
constexpr int64_t kStrided = 2 * kMaxStride,
                  kTable = kStrided * std::size(kKernels) * std::size(kChannels);

// Sizes with an x between them.
std::string by(std::initializer_list<int64_t> sizes) {
  std::string result;
  for (const int64_t size : sizes) {
    result += (result.empty() ? "" : "x") + std::to_string(size);
  }
  return result;
}

Case table_case(int64_t turn) {
  const int64_t dilation = 1 + turn % 2, stride = 1 + turn / 2 % kMaxStride;
  const auto& [kernel_h, kernel_w] = kKernels[turn / kStrided % std::size(kKernels)];
  const auto& [groups, ic, oc] = kChannels[turn / kStrided / std::size(kKernels)];
  const auto& [height, width] = kImages[turn % 5];
  const int64_t reach_h = dilation * (kernel_h - 1) + 1;
  const int64_t reach_w = dilation * (kernel_w - 1) + 1;
  const int64_t choices[] = {0, std::min(reach_h, reach_w) / 2, std::max(reach_h, reach_w) + 1};
  const int64_t least =
      std::max<int64_t>(0, std::max(reach_h - height + 1, reach_w - width + 1) / 2);
  Case k;
  k.conv = make_conv(
      groups * ic, groups * oc, groups, kernel_h, kernel_w, stride,
      std::max(least, choices[turn / 5 % 3]), dilation, height, width);
  k.from = static_cast<Order>(turn % 4);
  k.to = static_cast<Order>(turn / 4 % 4);
  // Outputs never leave out rows of a plane.
  k.to = k.to == Order::rows_apart ? Order::planes : k.to;
  k.weights = static_cast<WeightOrder>(turn / 2 % 4);
  k.more_border = turn % 3;
  k.name = by({groups, ic, oc}) + " kernel " + by({kernel_h, kernel_w}) + " image " +
      by({height, width}) + " stride " + by({stride}) + " dilation " + by({dilation}) +
      " padding " + by({k.conv.padding_h}) + " from " + kOrders[static_cast<int>(k.from)] + " to " +
      kOrders[static_cast<int>(k.to)] + " weights " + kWeightOrders[static_cast<int>(k.weights)];
  return k;
}

// ---- pairs ----

// Groups whose channels fit matrix: a vector of one group or several, the last one partly
// idle, and one, two or four pixels of a position.
constexpr int64_t kMatrixChannels[][3] = {
    {1, 32, 16}, {2, 64, 24}, {3, 32, 8}, {2, 64, 4}, {5, 8, 2}, {17, 4, 1},
    {16, 2, 1},  {3, 16, 6},  {2, 96, 9}, {9, 16, 2}, {4, 2, 1}, {1, 32, 40},
};
constexpr int64_t kWidths[] = {1, 5, 7, 16, 17, 33};

// Groups for the gradient of x: several taps in a row of A, or several vectors; one or more
// positions; units of one group and of two.
constexpr int64_t kTurnedChannels[][3] = {
    {1, 64, 16}, {5, 8, 2}, {3, 16, 4}, {2, 32, 8}, {2, 16, 64}, {3, 4, 16}, {17, 8, 4}, {1, 80, 2},
};

// Runs a case where it has kernels of pairs. Counts the others.
void run_where_paired(const Case& k, Isa isa, int& others) {
  check_pixel_pairs(k, isa);
  check_matrix_grad(k, 1 + k.conv.width % 3, isa);
  if (in_pairs(grad_input_phase(k.conv, 0, 0).conv, isa)) {
    check_input_grad<Bfloat16>(k, isa, /*pairs=*/true);
  }
  if (in_pairs(k.conv, isa)) {
    run_in_pairs(k, plan_conv(counted_in(k.conv, /*pairs=*/true), /*in_double=*/false, isa), isa);
  } else {
    ++others;
  }
}

// The tiles of rows, sliding ones and others, in images of that width and of another.
void run_pair_rows(int pixels, int64_t kernel, int64_t stride, int64_t more, Isa isa) {
  Case k;
  k.name = "pairs in rows of " + by({pixels}) + " and " + by({more}) + " kernel " + by({kernel}) +
      " stride " + by({stride});
  const int lanes = lanes_of(isa);
  const auto set_channels = [&](int64_t ic, int64_t oc) {
    k.conv = make_conv(
        2 * ic, 2 * oc, 2, kernel, kernel, stride, kernel / 2, 1, stride * 6 - 1,
        stride * (pixels + more));
  };
  set_channels(2 * lanes, 8);
  check_pixel_pairs(k, isa);
  const auto run = [&](ConvMethod method, int64_t ic, int64_t oc, int block) {
    set_channels(ic, oc);
    run_in_pairs(k, tile_plan(counted_in(k.conv, /*pairs=*/true), method, pixels, block, isa), isa);
  };
  for (int block : {1, 2}) {
    if (fits(pixels, block, lanes)) {
      run(ConvMethod::broadcast, 2 * (lanes + 3), block * lanes, block);
      run(ConvMethod::dot, 4 * lanes, block, block);
    }
  }
}

// Returns how many cases have no kernels of pairs.
int run_pairs(Isa isa) {
  int others = 0;
  for (int64_t turn = 0; turn < kTable; ++turn) {
    run_where_paired(table_case(turn), isa, others);
  }
  for (int64_t turn = 0; turn < 2 * kTable; ++turn) {
    Case k = table_case(turn % kTable);
    const auto& [groups, ic, oc] = turn < kTable
        ? kMatrixChannels[turn % std::size(kMatrixChannels)]
        : kTurnedChannels[turn / kStrided % std::size(kTurnedChannels)];
    k.conv.groups = groups;
    k.conv.in_channels = groups * ic;
    k.conv.out_channels = groups * oc;
    k.conv.width += kWidths[turn / 7 % std::size(kWidths)];
    k.conv.out_width = conv_out_size(
        k.conv.width, k.conv.kernel_w, k.conv.stride, k.conv.padding_w, k.conv.dilation);
    k.name = "matrix " + by({groups, ic, oc}) + " width " + by({k.conv.width}) + " of " + k.name;
    run_where_paired(k, isa, others);
  }
  for (int pixels : {7, 14}) {
    for (int64_t kernel : {3, 5, 7, 9}) {
      for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
        for (int64_t more : {0, 4}) {
          run_pair_rows(pixels, kernel, stride, more, isa);
        }
      }
    }
  }
  return others;
}

// Runs the table. Returns how many of its cases are the library's.
int run_table(Isa isa) {
  int library = 0;
  for (int64_t turn = 0; turn < kTable; ++turn) {
    const Case k = table_case(turn);
    run_gradients(k, isa);
    const ConvPlan plan = plan_conv(k.conv, /*in_double=*/false, isa);
    if (plan.method == ConvMethod::library) {
      ++library;
    } else {
      run_case(k, plan, isa);
    }
  }
  return library;
}

// Cases of each method that can use the tile, whether or not a plan would choose it.
void run_tile(int pixels, int block, Isa isa) {
  const auto run = [&](ConvMethod method, int64_t stride, int64_t groups, int64_t ic, int64_t oc) {
    Case k;
    k.name = "tile of stride " + by({stride});
    k.conv =
        make_conv(groups * ic, groups * oc, groups, 3, 3, stride, 1, 1, 5, stride * (pixels + 1));
    run_case(k, tile_plan(k.conv, method, pixels, block, isa), isa);
  };
  const int lanes = lanes_of(isa);
  for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
    run(ConvMethod::broadcast, stride, 2, 3, block * lanes);
    if (block < lanes) {  // dot has fewer outputs than lanes
      run(ConvMethod::dot, stride, lanes + 1, 2, block);
    }
  }
}

// Images as wide as a row tile, with several vectors of channels and with rows that are
// reduced together; and the gradient of their weights.
void run_whole_rows(int pixels, int64_t kernel, int64_t stride, Isa isa) {
  Case k;
  k.name = "rows of " + by({pixels}) + " kernel " + by({kernel}) + " stride " + by({stride});
  const auto set_channels = [&](int64_t ic, int64_t oc) {
    k.conv = make_conv(
        2 * ic, 2 * oc, 2, kernel, kernel, stride, kernel / 2, 1, stride * 6 - 1, stride * pixels);
  };
  const int lanes = lanes_of(isa);
  set_channels(2 * lanes, 8);
  run_weight_grads(k, isa);
  for (int block : {1, 2}) {
    if (fits(pixels, block, lanes)) {
      set_channels(lanes + 3, block * lanes);
      run_case(k, tile_plan(k.conv, ConvMethod::broadcast, pixels, block, isa), isa);
      set_channels(2 * lanes, block);
      run_case(k, tile_plan(k.conv, ConvMethod::dot, pixels, block, isa), isa);
    }
  }
}

// Winograd's products. The cases have channels of several calls, units that lack some, an
// odd row and column, and more tiles in a row than one piece.
void run_winograd(int pixels, int block, int64_t turn, Isa isa) {
  constexpr int64_t kMaps[][2] = {{5, 7}, {1, 1}, {4, 2 * kWinogradTiles + 5}, {18, 14}};
  const auto& [height, width] = kMaps[turn % 4];
  const int lanes = lanes_of(isa);
  const int64_t padding = 1 + turn / 4 % 4;
  const int64_t ic = turn % 3 == 0 ? kWinogradChannels + lanes : lanes;
  Case k;
  k.conv = make_conv(2 * ic, 2 * (block * lanes - turn % 2), 2, 3, 3, 1, padding, 1, height, width);
  k.from = static_cast<Order>(turn % 4);
  k.weights = static_cast<WeightOrder>(turn / 2 % 4);
  k.more_border = turn % 3;
  k.name = "winograd " + by({height, width}) + " padding " + by({padding}) + " weights " +
      kWeightOrders[static_cast<int>(k.weights)];
  run_case(k, tile_plan(k.conv, ConvMethod::winograd, pixels, block, isa), isa);
}

// The gradients where x's is by winograd too.
void run_winograd_gradients(WeightOrder order, Isa isa) {
  const int lanes = lanes_of(isa);
  Case k;
  k.name = std::string("winograd weights ") + kWeightOrders[static_cast<int>(order)];
  k.conv = make_conv(4 * lanes, 4 * lanes, 2, 3, 3, 1, 1, 1, 9, 12);
  k.weights = order;
  const ConvPlan plan = plan_conv(grad_input_phase(k.conv, 0, 0).conv, false, isa);
  report(k, plan, "another method", plan.method == ConvMethod::winograd ? 0 : 2);
  run_gradients(k, isa);
}

void run_rows(Isa isa) {
  for (int pixels : {7, 14}) {
    for (int64_t kernel : {3, 5, 7, 9}) {
      for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
        run_whole_rows(pixels, kernel, stride, isa);
      }
    }
  }
}

void run_tiles(Isa isa) {
  int64_t turn = 0;
  for (int block : kBlocks) {
    for (int pixels : kPixels) {
      if (fits(pixels, block, lanes_of(isa))) {
        run_tile(pixels, block, isa);
        run_winograd(pixels, block, turn++, isa);
      }
    }
  }
}

}  // namespace

int main() {
  const Isa isa = tiles_are_emulated() ? Isa::amx_bf16 : isa_in_use();
  if (isa >= Isa::avx512_bf16) {
    const int others = run_pairs(isa);
    std::printf("%s: %d left to other kernels\n", name(isa).c_str(), others);
    return summary();
  }
  const int library = run_table(isa);
  run_tiles(isa);
  run_rows(isa);
  for (const WeightOrder order :
       {WeightOrder::taps_inside, WeightOrder::channels_inside, WeightOrder::gaps,
        WeightOrder::taps_apart}) {
    run_winograd_gradients(order, isa);
  }
  std::printf("%s: %d left to the library\n", name(isa).c_str(), library);
  return summary();
}
