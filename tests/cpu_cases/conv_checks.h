// A case of a convolution, and the checks of its kernels against the naive loop.
#pragma once

#include <array>

#include "cases.h"
#include "cpu/kernels/conv.h"

namespace {

using namespace epsa::case_program;

constexpr double kEps = 8 * 0x1p-23;  // of a sum

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

// ---- tensors: images [channels, height, width], weights [out_channels, ic, taps] ----

using Axes = std::array<int64_t, 3>;

Axes input_axes(const Conv& c) {
  return {c.in_channels, c.height, c.width};
}
Axes output_axes(const Conv& c) {
  return {c.out_channels, c.out_height, c.out_width};
}
Axes weight_axes(const Conv& c) {
  return {c.out_channels, c.ic(), c.taps()};
}

Axes strides_of(Order order, const Axes& image) {
  const auto& [channels, height, width] = image;
  const Axes strides[] = {
      {height * width, width, 1},
      {1, width * channels, channels},
      {(height + 1) * (width + 3) + 1, width + 3, 1},    // part of larger planes
      {1, (width + 2) * (channels + 3), channels + 3}};  // some channels of wider pixels, cropped
  return strides[static_cast<int>(order)];
}

Axes strides_of(WeightOrder order, const Axes& weights) {
  const auto& [outputs, ic, taps] = weights;
  const Axes strides[] = {
      {ic * taps, taps, 1},
      {ic * taps, 1, ic},
      {ic * (taps + 2) + 3, taps + 2, 1},
      {taps * (ic + 2) + 2, 1, ic + 2}};
  return strides[static_cast<int>(order)];
}

template <class Visit>
void each(const Axes& sizes, const Visit& visit) {
  for (int64_t i = 0; i < sizes[0]; ++i) {
    for (int64_t j = 0; j < sizes[1]; ++j) {
      for (int64_t k = 0; k < sizes[2]; ++k) {
        visit(i, j, k);
      }
    }
  }
}

// A tensor in memory that ends right behind it.
template <class T>
struct Stored {
  using Type = typename T::Type;
  Axes sizes, strides;
  Buffer<Type> data;

  template <class AnyOrder>
  Stored(AnyOrder order, const Axes& axes)
      : sizes(axes), strides(strides_of(order, axes)), data(nullptr, std::free) {
    int64_t count = 1;
    for (int a = 0; a < 3; ++a) {
      count += (sizes[a] - 1) * strides[a];
    }
    data = allocate<Type>(count);
    // All ones are NaN in each of the dtypes.
    std::memset(data.get(), 0xff, count * sizeof(Type));
  }
  Type& at(int64_t i, int64_t j, int64_t k) const {
    return data[i * strides[0] + j * strides[1] + k * strides[2]];
  }
  std::vector<double> values() const {
    std::vector<double> result;
    each(sizes, [&](auto... place) { result.push_back(T::value(at(place...))); });
    return result;
  }
  double worst_error(const Expected& expected) const {
    Error error{T::rounding, kEps};
    const std::vector<double> given = values();
    for (size_t i = 0; i < given.size(); ++i) {
      error.see(given[i], expected[i]);
    }
    return error.worst;
  }
  Image image(int64_t c = 0, int64_t h = 0) const {
    return {&at(c, h, 0), strides[0], strides[2], strides[1]};
  }
  ConvWeights weights(const Conv& c) const {
    const int64_t step = c.pairs ? 2 : 1;
    return {data.get(), c.oc() * strides[0], strides[0], step * strides[1],
            strides[2], /*turned=*/false,    strides[1]};
  }
  // The weights of a phase of stride 1, which has other inputs and outputs than c.
  ConvWeights turned(const Conv& c, bool pairs) const {
    const int64_t step = pairs ? 2 : 1;
    return {data.get(), c.oc() * strides[0], strides[1], step * strides[0],
            strides[2], /*turned=*/true,     strides[0]};
  }
};

template <class T, class AnyOrder>
Stored<T> drawn(AnyOrder order, const Axes& axes, uint64_t& state) {
  Stored<T> result(order, axes);
  each(axes, [&](auto... place) { result.at(place...) = T::of(draw(state)); });
  return result;
}

// Packs blocks [0, count) in two calls, by pack(begin, end). It must see finite numbers.
template <class Pack>
void pack_in_two_calls(int64_t count, const Pack& pack) {
  if (!pack(0, count / 2) || !pack(count / 2, count)) {
    std::abort();
  }
}

// An image as the kernels read it.
struct Packed {
  Buffer<float> data;
  Scratch scratch;

  // in_channels: as the kernels count them. lanes: of a block.
  template <class T>
  Packed(
      const ConvKernels& kernels, const Stored<T>& x, int64_t in_channels, const ScratchSize& size,
      int64_t lanes)
      : data(filled<float>(size.floats(in_channels, x.sizes[1], lanes), kNan)),
        scratch(size.scratch(data.get(), x.sizes[1], lanes)) {
    const int64_t blocks = (in_channels + lanes - 1) / lanes;
    pack_in_two_calls(blocks, [&](int64_t begin, int64_t end) {
      return kernels.pack_image(x.image(), in_channels, x.sizes[2], scratch, begin, end);
    });
  }
};

// ---- checks ----

void report(const Case& c, const ConvPlan& plan, const char* what, double worst) {
  if (!(worst <= 1)) {
    ++failed;
    std::printf(
        "FAILED %s, %s of %d x %d: %s: %.3g times what is allowed\n", c.name.c_str(),
        name(plan.method).c_str(), plan.pixels, plan.block, what, worst);
  }
}

// The naive loop: visits the places of an output, and of the input and the weight whose
// product it sums. Places count the elements of a dense tensor.
template <class Visit>
void each_product(const Conv& c, const Visit& visit) {
  each(output_axes(c), [&](int64_t o, int64_t h, int64_t w) {
    each({c.ic(), c.kernel_h, c.kernel_w}, [&](int64_t i, int64_t ky, int64_t kx) {
      const int64_t channel = o / c.oc() * c.ic() + i;
      const int64_t y = h * c.stride - c.padding_h + ky * c.dilation;
      const int64_t x = w * c.stride - c.padding_w + kx * c.dilation;
      if (y >= 0 && y < c.height && x >= 0 && x < c.width) {
        visit(
            (o * c.out_height + h) * c.out_width + w, (channel * c.height + y) * c.width + x,
            (o * c.ic() + i) * c.taps() + ky * c.kernel_w + kx);
      }
    });
  });
}

// Convolves unit by unit and strip by strip. add: to zeros. bias: of the outputs, or null.
// totals: the sums of each strip's outputs, or null.
template <class T>
void convolve(
    const ConvKernels& kernels, const Conv& c, const ConvPlan& plan, const Scratch& image,
    const ConvWeights& weights, bool add, const Stored<T>& out, const float* bias, float* totals) {
  const ConvMethodKernels method = kernels.method(plan.method);
  const int64_t row = plan.buffer_width * plan.unit_pitch;
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto packed = filled<float>(plan.unit_weights, kNan);
    method.pack_weights(c, plan, weights, unit, packed.get());
    const auto [first, count] = unit_run(c, plan, unit);
    for (int64_t strip = 0; strip < plan.strips(c.out_height); ++strip) {
      const auto buffer = filled<float>(plan.strip * row, add ? 0.0f : kNan);
      const auto lanes = filled<float>(method.lane_floats(c, plan), kNan);
      const int64_t begin = strip * plan.strip, end = std::min(begin + plan.strip, c.out_height);
      const Sums sums{buffer.get(), row, plan.unit_pitch, add};
      for (int64_t i = 0; i < c.ic();) {
        i = method.convolve(c, plan, image, packed.get(), unit, i, begin, end, sums, lanes.get());
      }
      const Image to = out.image(first, begin);
      const float* own = bias ? bias + first : nullptr;
      kernels.unpack(sums, count, end - begin, c.out_width, to, own, nullptr);
      if (totals) {
        float* strip_totals = totals + strip * c.out_channels + first;
        kernels.unpack(sums, count, end - begin, c.out_width, to, own, strip_totals);
      }
    }
  }
}

// The worst error of the outputs' sums, given those of each strip.
double worst_total(const Conv& c, const float* totals, int64_t strips, const Expected& outputs) {
  Error error{0, kEps};
  const int64_t pixels = c.out_height * c.out_width;
  for (int64_t o = 0; o < c.out_channels; ++o) {
    Sum expected;
    for (int64_t m = 0; m < pixels; ++m) {
      expected.add(1, outputs[o * pixels + m]);
    }
    double given = 0;
    for (int64_t strip = 0; strip < strips; ++strip) {
      given += totals[strip * c.out_channels + o];
    }
    error.see(given, expected);
  }
  return error.worst;
}

// counted: k.conv, with the inputs as the kernels count them.
template <class T>
void check_forward(
    const Case& k, const Conv& counted, const ConvPlan& plan, const ConvKernels& kernels,
    bool add) {
  const Conv& c = k.conv;
  uint64_t state = 1;
  const bool with_bias = ++cases % 2;
  const auto x = drawn<T>(k.from, input_axes(c), state);
  const auto weights = drawn<T>(k.weights, weight_axes(c), state);
  ScratchSize size;
  size.include(counted, plan.reach);
  size.border += k.more_border;
  size.width += k.more_border;
  const Packed image(kernels, x, counted.in_channels, size, plan.depth);
  const Stored<T> out(k.to, output_axes(c));
  const int64_t strips = plan.strips(c.out_height);
  const auto totals = filled<float>(strips * c.out_channels, kNan);
  const auto bias = filled<float>(c.out_channels, 0.0f);
  for (int64_t o = 0; with_bias && o < c.out_channels; ++o) {
    bias[o] = draw(state);
  }
  convolve(
      kernels, counted, plan, image.scratch, weights.weights(counted), add, out,
      with_bias ? bias.get() : nullptr, totals.get());

  const auto inputs = x.values(), factors = weights.values();
  Expected expected(c.out_channels * c.out_height * c.out_width);
  each(output_axes(c), [&](int64_t o, int64_t h, int64_t w) {
    expected[(o * c.out_height + h) * c.out_width + w].add(bias[o]);
  });
  each_product(c, [&](int64_t output, int64_t input, int64_t weight) {
    expected[output].add(inputs[input] * factors[weight]);
  });
  report(k, plan, "map", out.worst_error(expected));
  report(k, plan, "sums", worst_total(c, totals.get(), strips, expected));
}

// Adds what a sample gives to the gradient of the weights, by the naive loop.
template <class T>
void add_weight_grads(const Conv& c, const Stored<T>& x, const Stored<T>& grad, Expected& to) {
  const auto inputs = x.values(), grads = grad.values();
  each_product(c, [&](int64_t output, int64_t input, int64_t weight) {
    to[weight].add(inputs[input] * grads[output]);
  });
}

// The gradient of the weights, from x and the output's gradient.
template <class T>
void check_weight_grad(const Case& k, Isa isa) {
  const Conv& c = k.conv;
  const WeightGradPlan plan = plan_weight_grad(c, /*in_double=*/false, isa);
  if (plan.library) {
    return;
  }
  ++cases;
  const ConvKernels& kernels = conv_kernels(T::dtype, isa);
  uint64_t state = 2;
  const auto x = drawn<T>(k.from, input_axes(c), state);
  const auto grad = drawn<T>(k.to, output_axes(c), state);
  ScratchSize x_size, grad_size;
  x_size.include(c, c.out_width);
  grad_size.border = k.more_border;
  grad_size.width = c.out_width + k.more_border;
  const Packed packed_x(kernels, x, c.in_channels, x_size, kernels.lanes),
      packed_grad(kernels, grad, c.out_channels, grad_size, kernels.lanes);
  const Stored<T> result(k.weights, weight_axes(c));
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto sums = filled<float>(plan.unit_sums, 0.0f);
    kernels.weight_grad(c, plan, packed_x.scratch, packed_grad.scratch, unit, sums.get());
    kernels.unpack_weight_grad(c, plan, unit, sums.get(), result.weights(c));
  }

  Expected expected(c.out_channels * c.ic() * c.taps());
  add_weight_grads(c, x, grad, expected);
  report(k, {}, "gradient of the weights", result.worst_error(expected));
}

// The same by pairs of pixels.
void check_pixel_pairs(const Case& k, Isa isa) {
  const Conv& c = k.conv;
  const WeightGradPlan plan = plan_weight_grad(c, /*in_double=*/false, isa);
  if (plan.library) {
    return;
  }
  ++cases;
  const PixelPairKernels& kernels = pixel_pair_kernels(isa);
  uint64_t state = 5;
  const auto x = drawn<Bfloat16>(k.from, input_axes(c), state);
  const auto grad = drawn<Bfloat16>(k.to, output_axes(c), state);
  Conv other = c;  // a branch with more padding
  other.padding_w += k.more_border;
  ScratchSize x_size, grad_size;
  x_size.include(c, c.out_width);
  x_size.include(other, c.out_width);
  grad_size.width = (c.out_width + 1) / 2;
  const auto packed = [](const auto& t, const ScratchSize& size, const auto& pack) {
    auto data = filled<float>(size.floats(t.sizes[0], t.sizes[1], kPairLanes), kNan);
    const Scratch scratch = size.scratch(data.get(), t.sizes[1], kPairLanes);
    pack_in_two_calls((t.sizes[0] + kPairLanes - 1) / kPairLanes, [&](int64_t begin, int64_t end) {
      return pack(scratch, begin, end);
    });
    return std::pair(std::move(data), scratch);
  };
  const auto packed_x = packed(x, x_size, [&](const Scratch& s, int64_t begin, int64_t end) {
    return kernels.pack_x(x.image(), c.in_channels, c.width, c.stride, s, begin, end);
  });
  const auto packed_grad =
      packed(grad, grad_size, [&](const Scratch& s, int64_t begin, int64_t end) {
        return kernels.pack_grad(grad.image(), c.out_channels, c.out_width, s, begin, end);
      });
  const Stored<Bfloat16> result(k.weights, weight_axes(c));
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto sums = filled<float>(plan.unit_sums, 0.0f);
    kernels.weight_grad(c, plan, packed_x.second, packed_grad.second, unit, sums.get());
    kernels.unpack_weight_grad(c, plan, unit, sums.get(), result.weights(c));
  }

  Expected expected(c.out_channels * c.ic() * c.taps());
  add_weight_grads(c, x, grad, expected);
  report(k, {}, "gradient of the weights by pairs of pixels", result.worst_error(expected));
}

// The gradient of the weights by matrix, from some samples of x and the output's gradient.
void check_matrix_grad(const Case& k, int64_t samples, Isa isa) {
  const Conv& c = k.conv;
  const WeightGradPlan plan = plan_matrix_grad(c, isa);
  if (plan.library) {
    return;
  }
  ++cases;
  Conv other = c;  // a branch with more padding
  other.padding_h += k.more_border;
  other.padding_w += k.more_border;
  const PixelRuns runs({c, other}, kMatrixLanes);
  const int64_t moved = MatrixGradRows(c, kMatrixLanes).moved;
  const MatrixGradKernels& kernels = matrix_grad_kernels(isa);
  const int64_t x_floats = runs.x_floats(c.in_channels, kMatrixLanes);
  const int64_t grad_floats = c.out_channels * moved * runs.plane_floats();
  const auto packed_x = filled<float>(samples * x_floats, kNan);
  const auto packed_grad = filled<float>(samples * grad_floats, kNan);
  uint64_t state = 4;
  Expected expected(c.out_channels * c.ic() * c.taps());
  const auto pack = [&](const auto& t, const auto& blocks_of) {
    pack_in_two_calls((t.sizes[0] + kMatrixLanes - 1) / kMatrixLanes, blocks_of);
  };
  for (int64_t n = 0; n < samples; ++n) {
    const auto x = drawn<Bfloat16>(k.from, input_axes(c), state);
    const auto grad = drawn<Bfloat16>(k.to, output_axes(c), state);
    pack(x, [&](int64_t begin, int64_t end) {
      return kernels.pack_x(
          x.image(), c.in_channels, c.height, c.width, runs, begin, end,
          packed_x.get() + n * x_floats);
    });
    pack(grad, [&](int64_t begin, int64_t end) {
      return kernels.pack_grad(
          grad.image(), c.out_channels, c.out_height, c.out_width, runs, moved, begin, end,
          packed_grad.get() + n * grad_floats);
    });
    add_weight_grads(c, x, grad, expected);
  }
  const Stored<Bfloat16> result(k.weights, weight_axes(c));
  for (int64_t unit = 0; unit < plan.units; ++unit) {
    const auto sums = filled<float>(plan.unit_sums, 0.0f);
    kernels.multiply(
        c, runs, packed_x.get(), x_floats, packed_grad.get(), grad_floats, samples, unit,
        sums.get());
    kernels.unpack(c, unit, sums.get(), result.weights(c));
  }
  report(k, {}, "gradient of the weights by matrix", result.worst_error(expected));
}

// The gradient of x for stride 1. Its one phase is a convolution with the weights turned
// around.
template <class T>
void check_input_grad(const Case& k, Isa isa, bool pairs = false) {
  const Conv& c = k.conv;
  if (c.stride != 1) {
    return;
  }
  const Conv phase = counted_in(grad_input_phase(c, 0, 0).conv, pairs);
  ConvPlan plan = plan_conv(phase, /*in_double=*/false, isa);
  if (plan.method == ConvMethod::library) {
    return;
  }
  plan.strip = c.height;
  ++cases;
  const ConvKernels& kernels = pairs ? pair_kernels(isa) : conv_kernels(T::dtype, isa);
  uint64_t state = 3;
  const auto grad = drawn<T>(k.from, output_axes(c), state);
  const auto weights = drawn<T>(k.weights, weight_axes(c), state);
  ScratchSize size;
  size.include(phase, plan.reach);
  const Packed packed(kernels, grad, phase.in_channels, size, plan.depth);
  const Stored<T> result(k.to, input_axes(c));
  convolve(
      kernels, phase, plan, packed.scratch, weights.turned(c, pairs), /*add=*/true, result,
      /*bias=*/nullptr, /*totals=*/nullptr);

  const auto grads = grad.values(), factors = weights.values();
  Expected expected(c.in_channels * c.height * c.width);
  each_product(c, [&](int64_t output, int64_t input, int64_t weight) {
    expected[input].add(grads[output] * factors[weight]);
  });
  report(k, plan, "gradient of x", result.worst_error(expected));
}

}  // namespace
