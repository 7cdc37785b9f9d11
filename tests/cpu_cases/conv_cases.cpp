// The convolutions' kernels over a table of cases.
//
// To test a new kernel, add a function like check_forward and call it from run_case.
#include "cases.h"
#include "cpu/kernels/conv.h"

namespace {

using namespace epsa::case_program;

// ---- cases ----

enum class Order { planes, pixels, rows_apart, pixels_apart };
const char* const kOrders[] = {"planes", "pixels", "rows_apart", "pixels_apart"};
enum class WeightOrder { taps_inside, channels_inside, gaps, taps_apart };
const char* const kWeightOrders[] = {"taps_inside", "channels_inside", "gaps", "taps_apart"};

struct Case {
  std::string name;
  Conv conv;
  Order from = Order::planes, to = Order::planes;
  WeightOrder weights = WeightOrder::taps_inside;
  int64_t more_border = 0;  // for a branch with more padding
};

// An image [channels, height, width] in memory that ends right behind it.
template <class T>
struct Stored {
  int64_t channel, pixel, row, count;
  Buffer<T> data;

  Stored(Order order, int64_t channels, int64_t height, int64_t width)
      : channel(1), pixel(1), row(0), count(0), data(nullptr, std::free) {
    switch (order) {
      case Order::planes:
        row = width;
        channel = height * width;
        break;
      case Order::rows_apart:  // part of larger planes
        row = width + 3;
        channel = (height + 1) * row + 1;
        break;
      case Order::pixels:
        pixel = channels;
        row = width * channels;
        break;
      case Order::pixels_apart:  // some channels of wider pixels, cropped
        pixel = channels + 3;
        row = (width + 2) * pixel;
        break;
    }
    count = 1 + (channels - 1) * channel + (width - 1) * pixel + (height - 1) * row;
    data = allocate<T>(count);
    // All ones are NaN in each of the dtypes.
    std::memset(data.get(), 0xff, count * sizeof(T));
  }
  T& at(int64_t c, int64_t h, int64_t w) const { return data[c * channel + h * row + w * pixel]; }
  Image image(int64_t c = 0, int64_t h = 0) const {
    return {data.get() + c * channel + h * row, channel, pixel, row};
  }
};

// Weights of a case: out_channels x ic x taps.
template <class T>
struct StoredWeights {
  int64_t oc, out, in, tap;
  Buffer<T> data;

  StoredWeights(const Conv& c, WeightOrder order)
      : oc(c.oc()), out(0), in(1), tap(1), data(nullptr, std::free) {
    const int64_t ic = c.ic(), taps = c.taps();
    switch (order) {
      case WeightOrder::taps_inside:
        in = taps;
        out = ic * taps;
        break;
      case WeightOrder::channels_inside:
        tap = ic;
        out = ic * taps;
        break;
      case WeightOrder::gaps:
        in = taps + 2;
        out = ic * in + 3;
        break;
      case WeightOrder::taps_apart:
        tap = ic + 1;
        out = taps * tap + 2;
        break;
    }
    const int64_t count = 1 + (c.out_channels - 1) * out + (ic - 1) * in + (taps - 1) * tap;
    data = allocate<T>(count);
    std::memset(data.get(), 0xff, count * sizeof(T));
  }
  T& at(int64_t o, int64_t i, int64_t t) const { return data[o * out + i * in + t * tap]; }
  ConvWeights view() const { return {data.get(), oc * out, out, in, tap, /*turned=*/false}; }
  // The weights of a phase of stride 1.
  ConvWeights turned() const { return {data.get(), oc * out, in, out, tap, /*turned=*/true}; }
};

// ---- checks ----

void fail(const Case& c, const ConvPlan& plan, const char* what, double error) {
  ++failed;
  std::printf(
      "FAILED %s, %s of %d x %d: %s: %.3g times what is allowed\n", c.name.c_str(),
      name(plan.method).c_str(), plan.pixels, plan.block, what, error);
}

template <class T>
void check_forward(const Case& k, const ConvPlan& plan, Isa isa) {
  using Type = typename T::Type;
  const Conv& c = k.conv;
  const ConvKernels& kernels = conv_kernels(T::dtype, isa);
  const ConvMethodKernels method = kernels.method(plan.method);
  const int64_t H = c.out_height, W = c.out_width;
  uint64_t state = 1;
  ++cases;

  const Stored<Type> x(k.from, c.in_channels, c.height, c.width);
  for (int64_t i = 0; i < c.in_channels; ++i) {
    for (int64_t h = 0; h < c.height; ++h) {
      for (int64_t w = 0; w < c.width; ++w) {
        x.at(i, h, w) = T::of(draw(state));
      }
    }
  }
  const StoredWeights<Type> weights(c, k.weights);
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (int64_t i = 0; i < c.ic(); ++i) {
      for (int64_t t = 0; t < c.taps(); ++t) {
        weights.at(o, i, t) = T::of(draw(state));
      }
    }
  }

  ScratchSize size;
  size.include(c, plan.buffer_width);
  size.border += k.more_border;
  size.width += k.more_border;
  const int64_t blocks = (c.in_channels + kernels.lanes - 1) / kernels.lanes;
  const auto image = filled<float>(size.floats(c.in_channels, c.height, kernels.lanes), kNan);
  const Scratch scratch = size.scratch(image.get(), c.height);
  for (int64_t b = 0; b < blocks; ++b) {
    kernels.pack_image(x.image(), c.in_channels, c.width, scratch, b, b + 1);
  }

  const Stored<Type> out(k.to, c.out_channels, H, W);
  const int64_t strips = plan.strips(H);
  const auto sums = filled<float>(strips * c.out_channels, kNan);
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto packed = filled<float>(plan.unit_weights, kNan);
    method.pack_weights(c, plan, weights.view(), unit, packed.get());
    const Run run = unit_run(c, plan, unit);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const auto buffer = filled<float>(plan.strip * plan.buffer_width * plan.unit_pitch, kNan);
      const auto lanes = filled<float>(method.lane_floats(c, plan), kNan);
      const int64_t begin = strip * plan.strip;
      const int64_t end = std::min(begin + plan.strip, H);
      const Sums strip_sums{
          buffer.get(), plan.buffer_width * plan.unit_pitch, plan.unit_pitch,
          /*add=*/false};
      for (int64_t i = 0; i < c.ic();) {
        i = method.convolve(
            c, plan, scratch, packed.get(), unit, i, begin, end, strip_sums, lanes.get());
      }
      float* unit_sums = sums.get() + strip * c.out_channels + run.first;
      kernels.unpack(strip_sums, run.count, end - begin, W, out.image(run.first, begin), nullptr);
      kernels.unpack(strip_sums, run.count, end - begin, W, out.image(run.first, begin), unit_sums);
    }
  }

  // the naive loop
  constexpr double eps = 8 * 0x1p-23;
  double worst = 0, worst_sum = 0;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    const int64_t first = o / c.oc() * c.ic();
    double sum = 0, sum_size = 0;
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t w = 0; w < W; ++w) {
        double expected = 0, size = 0;
        for (int64_t i = 0; i < c.ic(); ++i) {
          for (int64_t ky = 0; ky < c.kernel_h; ++ky) {
            for (int64_t kx = 0; kx < c.kernel_w; ++kx) {
              const int64_t y = h * c.stride - c.padding_h + ky * c.dilation;
              const int64_t z = w * c.stride - c.padding_w + kx * c.dilation;
              if (y >= 0 && y < c.height && z >= 0 && z < c.width) {
                const double term = T::value(x.at(first + i, y, z)) *
                    T::value(weights.at(o, i, ky * c.kernel_w + kx));
                expected += term;
                size += std::fabs(term);
              }
            }
          }
        }
        const double error = std::fabs(T::value(out.at(o, h, w)) - expected) /
            (T::rounding * std::fabs(expected) + eps * size + 1e-30);
        worst = worse(worst, error);
        sum += expected;
        sum_size += size;
      }
    }
    double given = 0;
    for (int64_t strip = 0; strip < strips; ++strip) {
      given += sums[strip * c.out_channels + o];
    }
    const double error = std::fabs(given - sum) / (eps * sum_size + 1e-30);
    worst_sum = worse(worst_sum, error);
  }
  if (!(worst <= 1)) {
    fail(k, plan, "map", worst);
  }
  if (!(worst_sum <= 1)) {
    fail(k, plan, "sums", worst_sum);
  }
}

// The gradient of the weights, from x and the output's gradient.
template <class T>
void check_weight_grad(const Case& k, Isa isa) {
  using Type = typename T::Type;
  const Conv& c = k.conv;
  const WeightGradPlan plan = plan_weight_grad(c, /*in_double=*/false, isa);
  if (plan.library) {
    return;
  }
  ++cases;
  const ConvKernels& kernels = conv_kernels(T::dtype, isa);
  const int64_t H = c.out_height, W = c.out_width, L = kernels.lanes;
  uint64_t state = 2;
  const Stored<Type> x(k.from, c.in_channels, c.height, c.width);
  const Stored<Type> grad(k.to, c.out_channels, H, W);
  const auto fill = [&](const Stored<Type>& t, int64_t C, int64_t h, int64_t w) {
    for (int64_t i = 0; i < C * h * w; ++i) {
      t.at(i / (h * w), i / w % h, i % w) = T::of(draw(state));
    }
  };
  fill(x, c.in_channels, c.height, c.width);
  fill(grad, c.out_channels, H, W);

  ScratchSize x_size, grad_size;
  x_size.include(c, W);
  grad_size.border = k.more_border;
  grad_size.width = W + k.more_border;
  const auto x_data = filled<float>(x_size.floats(c.in_channels, c.height, L), kNan);
  const auto grad_data = filled<float>(grad_size.floats(c.out_channels, H, L), kNan);
  const Scratch xs = x_size.scratch(x_data.get(), c.height);
  const Scratch gs = grad_size.scratch(grad_data.get(), H);
  kernels.pack_image(x.image(), c.in_channels, c.width, xs, 0, (c.in_channels + L - 1) / L);
  kernels.pack_image(grad.image(), c.out_channels, W, gs, 0, (c.out_channels + L - 1) / L);

  const StoredWeights<Type> result(c, k.weights);
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto sums = filled<float>(plan.unit_sums, 0.0f);
    kernels.weight_grad(c, plan, xs, gs, unit, sums.get());
    kernels.unpack_weight_grad(c, plan, unit, sums.get(), result.view());
  }

  constexpr double eps = 8 * 0x1p-23;
  double worst = 0;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    for (int64_t i = 0; i < c.ic(); ++i) {
      for (int64_t t = 0; t < c.taps(); ++t) {
        double expected = 0, size = 0;
        for (int64_t h = 0; h < H; ++h) {
          for (int64_t w = 0; w < W; ++w) {
            const int64_t y = h * c.stride - c.padding_h + t / c.kernel_w;
            const int64_t z = w * c.stride - c.padding_w + t % c.kernel_w;
            if (y >= 0 && y < c.height && z >= 0 && z < c.width) {
              const double term =
                  T::value(grad.at(o, h, w)) * T::value(x.at(o / c.oc() * c.ic() + i, y, z));
              expected += term;
              size += std::fabs(term);
            }
          }
        }
        const double error = std::fabs(T::value(result.at(o, i, t)) - expected) /
            (T::rounding * std::fabs(expected) + eps * size + 1e-30);
        worst = worse(worst, error);
      }
    }
  }
  if (!(worst <= 1)) {
    fail(k, {}, "gradient of the weights", worst);
  }
}

// The gradient of x for stride 1. Its one phase is a convolution with the weights turned
// around.
template <class T>
void check_input_grad(const Case& k, Isa isa) {
  using Type = typename T::Type;
  const Conv& c = k.conv;
  if (c.stride != 1) {
    return;
  }
  const Conv phase = grad_input_phase(c, 0, 0).conv;
  const ConvPlan plan = plan_grad_input(phase, /*in_double=*/false, isa);
  if (plan.method == ConvMethod::library) {
    return;
  }
  ++cases;
  const ConvKernels& kernels = conv_kernels(T::dtype, isa);
  const ConvMethodKernels method = kernels.method(plan.method);
  const int64_t H = c.out_height, W = c.out_width, L = kernels.lanes;
  uint64_t state = 3;
  const Stored<Type> grad(k.from, c.out_channels, H, W);
  for (int64_t i = 0; i < c.out_channels * H * W; ++i) {
    grad.at(i / (H * W), i / W % H, i % W) = T::of(draw(state));
  }
  const StoredWeights<Type> weights(c, k.weights);
  for (int64_t i = 0; i < c.out_channels * c.ic() * c.taps(); ++i) {
    weights.at(i / (c.ic() * c.taps()), i / c.taps() % c.ic(), i % c.taps()) = T::of(draw(state));
  }
  ScratchSize size;
  size.include(phase, plan.buffer_width);
  const auto data = filled<float>(size.floats(c.out_channels, H, L), kNan);
  const Scratch scratch = size.scratch(data.get(), H);
  kernels.pack_image(grad.image(), c.out_channels, W, scratch, 0, (c.out_channels + L - 1) / L);

  const Stored<Type> result(k.to, c.in_channels, c.height, c.width);
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto packed = filled<float>(plan.unit_weights, kNan);
    method.pack_weights(phase, plan, weights.turned(), unit, packed.get());
    const auto buffer = filled<float>(c.height * plan.buffer_width * plan.unit_pitch, 0.0f);
    const auto lanes = filled<float>(method.lane_floats(phase, plan), kNan);
    const Sums sums{
        buffer.get(), plan.buffer_width * plan.unit_pitch, plan.unit_pitch,
        /*add=*/true};
    for (int64_t o = 0; o < phase.ic();) {
      o = method.convolve(
          phase, plan, scratch, packed.get(), unit, o, 0, c.height, sums, lanes.get());
    }
    const Run run = unit_run(phase, plan, unit);
    kernels.unpack(sums, run.count, c.height, c.width, result.image(run.first), nullptr);
  }

  constexpr double eps = 8 * 0x1p-23;
  double worst = 0;
  for (int64_t i = 0; i < c.in_channels; ++i) {
    const int64_t group = i / c.ic();
    for (int64_t y = 0; y < c.height; ++y) {
      for (int64_t z = 0; z < c.width; ++z) {
        double expected = 0, magnitude = 0;
        for (int64_t o = group * c.oc(); o < (group + 1) * c.oc(); ++o) {
          for (int64_t t = 0; t < c.taps(); ++t) {
            const int64_t h = y + c.padding_h - t / c.kernel_w * c.dilation;
            const int64_t w = z + c.padding_w - t % c.kernel_w * c.dilation;
            if (h >= 0 && h < H && w >= 0 && w < W) {
              const double term =
                  T::value(grad.at(o, h, w)) * T::value(weights.at(o, i % c.ic(), t));
              expected += term;
              magnitude += std::fabs(term);
            }
          }
        }
        const double error = std::fabs(T::value(result.at(i, y, z)) - expected) /
            (T::rounding * std::fabs(expected) + eps * magnitude + 1e-30);
        worst = worse(worst, error);
      }
    }
  }
  if (!(worst <= 1)) {
    fail(k, plan, "gradient of x", worst);
  }
}

template <class T>
void check_gradients(const Case& k, Isa isa) {
  check_weight_grad<T>(k, isa);
  check_input_grad<T>(k, isa);
}

void run_case(const Case& k, const ConvPlan& plan, Isa isa) {
  check_forward<Float>(k, plan, isa);
  check_forward<Bfloat16>(k, plan, isa);
  check_forward<Float16>(k, plan, isa);
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

std::vector<Case> table() {
  std::vector<Case> result;
  int64_t turn = 0;
  for (const auto& [groups, ic, oc] : kChannels) {
    for (const auto& [kernel_h, kernel_w] : kKernels) {
      for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
        for (int64_t dilation = 1; dilation <= 2; ++dilation, ++turn) {
          const auto& [height, width] = kImages[turn % 5];
          const int64_t reach_h = dilation * (kernel_h - 1) + 1;
          const int64_t reach_w = dilation * (kernel_w - 1) + 1;
          const int64_t choices[] = {
              0, std::min(reach_h, reach_w) / 2, std::max(reach_h, reach_w) + 1};
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
          const std::string sizes[] = {std::to_string(groups),   std::to_string(ic),
                                       std::to_string(oc),       std::to_string(kernel_h),
                                       std::to_string(kernel_w), std::to_string(height),
                                       std::to_string(width)};
          k.name = sizes[0] + "x" + sizes[1] + "x" + sizes[2] + " kernel " + sizes[3] + "x" +
              sizes[4] + " image " + sizes[5] + "x" + sizes[6] + " stride " +
              std::to_string(stride) + " dilation " + std::to_string(dilation) + " padding " +
              std::to_string(k.conv.padding_h) + " from " + kOrders[static_cast<int>(k.from)] +
              " to " + kOrders[static_cast<int>(k.to)] + " weights " +
              kWeightOrders[static_cast<int>(k.weights)];
          result.push_back(k);
        }
      }
    }
  }
  return result;
}

// A case for each tile, whether or not a plan would choose it.
void run_tiles(Isa isa) {
  const int lanes = lanes_of(isa);
  for (int block : kBlocks) {
    for (int pixels : kPixels) {
      if (!fits(pixels, block, lanes)) {
        continue;
      }
      for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
        for (const ConvMethod method : {ConvMethod::broadcast, ConvMethod::dot}) {
          const bool dot = method == ConvMethod::dot;
          if (dot && block >= lanes) {
            continue;  // has fewer outputs than lanes
          }
          Case k;
          k.name = std::string("tile of ") + (dot ? "dot" : "broadcast") + " stride " +
              std::to_string(stride);
          const int64_t oc = dot ? block : block * lanes;
          const int64_t groups = dot ? lanes + 1 : 2;
          const int64_t ic = dot ? 2 : 3;
          k.conv = make_conv(
              groups * ic, groups * oc, groups, 3, 3, stride, 1, 1, 5, stride * (pixels + 1));
          run_case(k, tile_plan(k.conv, method, pixels, block, isa), isa);
        }
      }
    }
  }
}

// Images as wide as a row tile, with several vectors of channels and with rows that are
// reduced together; and the gradient of their weights.
void run_whole_rows(Isa isa) {
  const int lanes = lanes_of(isa);
  for (int pixels : {7, 14}) {
    for (int64_t kernel : {3, 5, 7, 9}) {
      for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
        Case k;
        k.name = "gradients of rows of " + std::to_string(pixels) + " kernel " +
            std::to_string(kernel) + " stride " + std::to_string(stride);
        k.conv = make_conv(
            4 * lanes, 16, 2, kernel, kernel, stride, kernel / 2, 1, stride * 6 - 1,
            stride * pixels);
        check_weight_grad<Float>(k, isa);
        check_weight_grad<Bfloat16>(k, isa);
        check_weight_grad<Float16>(k, isa);
      }
    }
    for (int block : {1, 2}) {
      for (int64_t kernel : {3, 5, 7, 9}) {
        for (int64_t stride = 1; stride <= kMaxStride; ++stride) {
          for (const ConvMethod method : {ConvMethod::broadcast, ConvMethod::dot}) {
            if (!fits(pixels, block, lanes)) {
              continue;
            }
            const bool dot = method == ConvMethod::dot;
            Case k;
            k.name = std::string("rows of ") + (dot ? "dot" : "broadcast") + " kernel " +
                std::to_string(kernel) + " stride " + std::to_string(stride);
            const int64_t oc = dot ? block : block * lanes;
            const int64_t ic = dot ? 2 * lanes : lanes + 3;
            k.conv = make_conv(
                2 * ic, 2 * oc, 2, kernel, kernel, stride, kernel / 2, 1, stride * 6 - 1,
                stride * pixels);
            run_case(k, tile_plan(k.conv, method, pixels, block, isa), isa);
          }
        }
      }
    }
  }
}

// Each tile of winograd's products. The cases have channels of several calls, units that
// lack some, an odd row and column, and more tiles in a row than one piece. The gradients
// follow; x's gradient is by winograd too.
void run_winograd(Isa isa) {
  const int lanes = lanes_of(isa);
  constexpr int64_t kMaps[][2] = {{5, 7}, {1, 1}, {4, 2 * kWinogradTiles + 5}, {18, 14}};
  int64_t turn = 0;
  for (int block : kBlocks) {
    for (int pixels : kPixels) {
      if (!fits(pixels, block, lanes)) {
        continue;
      }
      Case k;
      const auto& [height, width] = kMaps[turn % 4];
      const int64_t padding = 1 + turn / 4 % 4;
      const int64_t ic = turn % 3 == 0 ? kWinogradChannels + lanes : lanes;
      k.conv =
          make_conv(2 * ic, 2 * (block * lanes - turn % 2), 2, 3, 3, 1, padding, 1, height, width);
      k.from = static_cast<Order>(turn % 4);
      k.weights = static_cast<WeightOrder>(turn / 2 % 4);
      k.more_border = turn % 3;
      k.name = "winograd " + std::to_string(height) + "x" + std::to_string(width) + " padding " +
          std::to_string(padding) + " weights " + kWeightOrders[static_cast<int>(k.weights)];
      run_case(k, tile_plan(k.conv, ConvMethod::winograd, pixels, block, isa), isa);
      ++turn;
    }
  }
  for (const WeightOrder order :
       {WeightOrder::taps_inside, WeightOrder::channels_inside, WeightOrder::gaps,
        WeightOrder::taps_apart}) {
    Case k;
    k.name = std::string("winograd weights ") + kWeightOrders[static_cast<int>(order)];
    k.conv = make_conv(4 * lanes, 4 * lanes, 2, 3, 3, 1, 1, 1, 9, 12);
    k.weights = order;
    const Conv phase = grad_input_phase(k.conv, 0, 0).conv;
    if (plan_grad_input(phase, false, isa).method != ConvMethod::winograd) {
      fail(k, {}, "not planned", 0);
    }
    check_gradients<Float>(k, isa);
    check_gradients<Bfloat16>(k, isa);
    check_gradients<Float16>(k, isa);
  }
}

}  // namespace

int main() {
  const Isa isa = isa_in_use();
  int library = 0;
  for (const Case& k : table()) {
    check_gradients<Float>(k, isa);
    check_gradients<Bfloat16>(k, isa);
    check_gradients<Float16>(k, isa);
    const ConvPlan plan = plan_conv(k.conv, /*in_double=*/false, isa);
    if (plan.method == ConvMethod::library) {
      ++library;
    } else {
      run_case(k, plan, isa);
    }
  }
  run_tiles(isa);
  run_whole_rows(isa);
  run_winograd(isa);
  std::printf("%s: %d left to the library\n", name(isa).c_str(), library);
  return summary();
}
