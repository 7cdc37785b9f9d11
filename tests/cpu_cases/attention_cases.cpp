// The attention's kernels over a table of cases: every dtype, layout and odd shape.
#include "cases.h"

namespace {

using namespace epsa::case_program;

struct Case {
  std::string name;
  Geometry g;
  int64_t samples, gap;  // gap: elements between a pixel's, or a sample's, neighbours
  bool bias, shared;
};

// ---- errors ----

void report(const Case& k, const char* what, double worst) {
  if (!(worst <= 1)) {
    ++failed;
    std::printf("FAILED %s: %s: %.3g times what is allowed\n", k.name.c_str(), what, worst);
  }
}

// Reports the worst error of a vector in the accumulation type.
template <class A>
void compare(const Case& k, const char* what, const Buffer<A>& given, const Expected& expected) {
  Error error{0, 64 * std::numeric_limits<A>::epsilon()};
  for (size_t i = 0; i < expected.size(); ++i) {
    error.see(given[i], expected[i]);
  }
  report(k, what, error.worst);
}

// ---- memory ----

// The maps of all branches, each in memory that ends right behind it.
template <class T>
struct StoredMaps {
  using Type = typename T::Type;
  const Case& k;
  Maps maps{};
  std::vector<Buffer<Type>> data;
  int64_t channel, pixel, count;

  explicit StoredMaps(const Case& c) : k(c) {
    const Geometry& g = c.g;
    const bool planes = g.layout == Layout::contiguous;
    pixel = planes ? 1 : g.channels + c.gap;
    channel = planes ? g.pixels : 1;
    const int64_t batch = planes ? g.channels * g.pixels + c.gap : g.pixels * pixel + c.gap;
    count = (c.samples - 1) * batch + (g.channels - 1) * channel + (g.pixels - 1) * pixel + 1;
    for (int s = 0; s < g.branches; ++s) {
      data.push_back(allocate<Type>(count));
      // All ones are NaN in each of the dtypes.
      std::memset(data[s].get(), 0xff, count * sizeof(Type));
      maps.data[s] = data[s].get();
      maps.batch_stride[s] = batch;
      maps.pixel_stride[s] = pixel;
    }
  }
  Type& at(int s, int64_t n, int64_t c, int64_t m) const {
    return data[s][n * maps.batch_stride[s] + c * channel + m * pixel];
  }
  double value(int s, int64_t n, int64_t c, int64_t m) const { return T::value(at(s, n, c, m)); }
  void draw_all(uint64_t& state) const {
    for (int s = 0; s < k.g.branches; ++s) {
      for (int64_t i = 0; i < k.samples * k.g.channels * k.g.pixels; ++i) {
        at(s, i / (k.g.channels * k.g.pixels), i / k.g.pixels % k.g.channels, i % k.g.pixels) =
            T::of(draw(state));
      }
    }
  }
  // Counts the elements that are not all ones: what was written.
  int64_t written(int s) const {
    Type untouched;
    std::memset(&untouched, 0xff, sizeof untouched);
    int64_t result = 0;
    for (int64_t i = 0; i < count; ++i) {
      result += std::memcmp(&data[s][i], &untouched, sizeof untouched) != 0;
    }
    return result;
  }
};

template <class A>
Buffer<A> drawn(int64_t count, uint64_t& state, A scale = 1) {
  auto result = allocate<A>(count);
  for (int64_t i = 0; i < count; ++i) {
    result[i] = draw(state) * scale;
  }
  return result;
}

template <class A>
Buffer<A> nans(int64_t count) {
  return filled<A>(count, std::numeric_limits<A>::quiet_NaN());
}

// ---- the maps' two passes ----

// Where a partial sum belongs.
struct Place {
  int64_t chunk, c, s, sc;

  Place(const Geometry& g, int64_t i) {
    const bool planes = g.layout == Layout::contiguous;
    chunk = planes ? i % g.chunks : i / g.channels % g.chunks;
    c = planes ? i / g.chunks % g.channels : i % g.channels;
    s = i / g.chunks / g.channels;
    sc = s * g.channels + c;
  }
};

template <class T>
void check_reduce(const Case& k, const Kernels& kernels, bool dot) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  uint64_t state = 1;
  ++cases;
  const StoredMaps<T> x(k), y(k);
  x.draw_all(state);
  y.draw_all(state);
  for (int64_t n = 0; n < k.samples; ++n) {
    const auto partial = nans<A>(g.partials());
    const int64_t split = g.units() / 2;
    const Maps* other = dot ? &y.maps : nullptr;
    kernels.reduce(g, x.maps, other, partial.get(), n, 0, split);
    kernels.reduce(g, x.maps, other, partial.get(), n, split, g.units());
    Expected expected(g.partials());
    for (int64_t i = 0; i < g.partials(); ++i) {
      const Place p(g, i);
      const int64_t end = std::min((p.chunk + 1) * g.chunk, g.pixels);
      for (int64_t m = p.chunk * g.chunk; m < end; ++m) {
        expected[i].add(x.value(p.s, n, p.c, m) * (dot ? y.value(p.s, n, p.c, m) : 1));
      }
    }
    compare(k, dot ? "reduce of products" : "reduce", partial, expected);
  }
}

template <class T>
void check_scale(const Case& k, const Kernels& kernels, bool add, bool relu, bool in_place) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  const int64_t vector = g.branches * g.channels;
  uint64_t state = 2;
  ++cases;
  const StoredMaps<T> x(k), before(k), separate(k);
  x.draw_all(state);
  for (int s = 0; s < g.branches; ++s) {
    std::copy_n(x.data[s].get(), x.count, before.data[s].get());
  }
  const StoredMaps<T>& result = in_place ? x : separate;
  Maps to = result.maps;
  const bool all = in_place || k.samples == 2;
  const int unwanted = all ? -1 : g.branches - 2;  // none of one branch
  if (unwanted >= 0) {
    to.data[unwanted] = nullptr;
  }
  Error error{T::rounding, 64 * std::numeric_limits<A>::epsilon()};
  for (int64_t n = 0; n < k.samples; ++n) {
    const auto mul = drawn<A>(vector, state), plus = drawn<A>(vector, state);
    const int64_t split = g.units() / 2;
    const A* added = add ? plus.get() : nullptr;
    // As callers do, the last units come first.
    if (split < g.units()) {
      kernels.scale(g, x.maps, mul.get(), added, relu, to, n, split, g.units());
    }
    if (split > 0) {
      kernels.scale(g, x.maps, mul.get(), added, relu, to, n, 0, split);
    }
    for (int64_t i = 0; i < vector * g.pixels; ++i) {
      const int s = static_cast<int>(i / g.pixels / g.channels);
      const int64_t sc = i / g.pixels, c = sc % g.channels, m = i % g.pixels;
      if (s != unwanted) {
        Sum expected;
        expected.add(before.value(s, n, c, m) * mul[sc]);
        expected.add(add ? plus[sc] : 0);
        expected.value = relu ? std::max(expected.value, 0.0) : expected.value;
        error.see(result.value(s, n, c, m), expected);
      }
    }
  }
  report(k, add ? "scale with a sum" : "scale", error.worst);
  for (int s = 0; s < g.branches; ++s) {
    const int64_t wanted = s == unwanted ? 0 : k.samples * g.channels * g.pixels;
    report(k, "scale's writes between the elements", result.written(s) == wanted ? 0 : 2);
  }
}

// ---- the gate ----

// Weights in exact buffers, and the gate's values in double.
template <class A>
struct Gates {
  const Case& k;
  int64_t B, C, r, S;
  Buffer<A> fc1, fc1_bias, fc2t, fc2_bias;

  Gates(const Case& c, uint64_t& state)
      : k(c),
        B(c.shared ? 1 : c.g.branches),
        C(c.g.channels),
        r(c.g.hidden),
        S(c.g.branches),
        fc1(drawn<A>(B * r * C, state, A(0.25))),
        fc1_bias(drawn<A>(B * r, state, A(0.25))),
        fc2t(drawn<A>(B * r * C, state, A(0.25))),
        fc2_bias(drawn<A>(B * C, state, A(0.25))) {}

  Weights view() const {
    return {
        fc1.get(),
        k.bias ? fc1_bias.get() : nullptr,
        fc2t.get(),
        k.bias ? fc2_bias.get() : nullptr,
        k.shared ? 0 : r * C,
        k.shared ? 0 : r,
        k.shared ? 0 : C};
  }
  double w1(int64_t s, int64_t j, int64_t c) const {
    return fc1[((k.shared ? 0 : s) * r + j) * C + c];
  }
  double w2(int64_t s, int64_t c, int64_t j) const {
    return fc2t[((k.shared ? 0 : s) * r + j) * C + c];
  }
  // The hidden units after their ReLU. Each size begins at 1, for the rounding of means.
  Expected hidden(const Expected& pooled) const {
    Expected result(S * r, {0, 1});
    for (int64_t i = 0; i < S * r; ++i) {
      const int64_t s = i / r, j = i % r;
      result[i].add(k.bias ? fc1_bias[(k.shared ? 0 : s) * r + j] : 0);
      for (int64_t c = 0; c < C; ++c) {
        result[i].add(w1(s, j, c) * pooled[s * C + c].value);
      }
      result[i].value = std::max(result[i].value, 0.0);
    }
    return result;
  }
  // The sigmoid of the second layer.
  double excitation(int64_t s, int64_t c, const Expected& hidden) const {
    double v = k.bias ? fc2_bias[(k.shared ? 0 : s) * C + c] : 0;
    for (int64_t j = 0; j < r; ++j) {
      v += w2(s, c, j) * hidden[s * r + j].value;
    }
    return 1 / (1 + std::exp(-v));
  }
  // Rounding errors of the second layer's sums, relative to its sigmoid: sums of hidden
  // units times weights of at most a half.
  double excitation_size(const Expected& hidden) const {
    double size = 1;
    for (const Sum& h : hidden) {
      size = std::max(size, h.size - 1);
    }
    return 1 + size * static_cast<double>(r);
  }
  Expected attention(const Expected& hidden) const {
    const double size = excitation_size(hidden);
    Expected result(S * C);
    for (int64_t c = 0; c < C; ++c) {
      double sum = 0;
      for (int64_t s = 0; s < S; ++s) {
        sum += std::exp(excitation(s, c, hidden));
      }
      for (int64_t s = 0; s < S; ++s) {
        const double a = std::exp(excitation(s, c, hidden)) / sum;
        result[s * C + c] = {a, a * size};
      }
    }
    return result;
  }

  // ---- gradients of what goes into the sigmoid, into the ReLU, and into the gate ----

  Expected grad_v(
      const Buffer<A>& attention, const Expected& grad_attention, const Expected& hidden) const {
    const double size = excitation_size(hidden);
    Expected result(S * C);
    for (int64_t i = 0; i < S * C; ++i) {
      Sum rest = grad_attention[i];
      for (int64_t at = i % C; at < S * C; at += C) {
        rest.add(-attention[at], grad_attention[at]);
      }
      const double z = excitation(i / C, i % C, hidden);
      result[i] = {attention[i] * rest.value * z * (1 - z), attention[i] * rest.size * size};
    }
    return result;
  }
  Expected grad_u(const Expected& grad_v, const Expected& hidden) const {
    Expected result(S * r);
    for (int64_t i = 0; i < S * r; ++i) {
      for (int64_t c = 0; c < C; ++c) {
        result[i].add(w2(i / r, c, i % r), grad_v[i / r * C + c]);
      }
      result[i].value *= hidden[i].value > 0;
    }
    return result;
  }
  Expected grad_pooled(const Expected& grad_u) const {
    Expected result(S * C);
    for (int64_t i = 0; i < S * C; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        const double w = w1(i / C, j, i % C) / static_cast<double>(k.g.pixels);
        result[i].add(w, grad_u[i / C * r + j]);
      }
    }
    return result;
  }
};

template <class A>
Expected exactly(const Buffer<A>& values, int64_t count) {
  Expected result(count);
  for (int64_t i = 0; i < count; ++i) {
    result[i].value = values[i];
  }
  return result;
}

template <class T>
void check_gate(const Case& k, const Kernels& kernels, bool of_sums) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  const int64_t vector = g.branches * g.channels;
  uint64_t state = 3;
  ++cases;
  const Gates<A> gates(k, state);
  const auto partial = drawn<A>(g.partials(), state);
  const auto pooled = drawn<A>(vector, state);
  Expected means = of_sums ? Expected(vector) : exactly(pooled, vector);
  for (int64_t i = 0; of_sums && i < g.partials(); ++i) {
    means[Place(g, i).sc].add(partial[i] / static_cast<double>(g.pixels));
  }
  const auto hidden = nans<A>(g.branches * g.hidden), attention = nans<A>(vector);
  kernels.gate(
      g, gates.view(), of_sums ? partial.get() : nullptr, pooled.get(), hidden.get(),
      attention.get());
  const Expected units = gates.hidden(means);
  compare(k, "pooled", pooled, means);
  compare(k, "hidden", hidden, units);
  compare(k, "attention", attention, gates.attention(units));
}

// of_sums: the gradient reaches the attention through the output.
template <class T>
void check_gate_grad(
    const Case& k, const Kernels& kernels, bool of_sums, bool of_output, bool of_attention) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  const int64_t vector = g.branches * g.channels, units = g.branches * g.hidden;
  uint64_t state = 4;
  ++cases;
  const Gates<A> gates(k, state);
  const auto partial = drawn<A>(g.partials(), state);
  const auto grad_attention = drawn<A>(vector, state);
  const auto pooled = drawn<A>(vector, state);
  const auto attention = drawn<A>(vector, state);
  for (int64_t i = 0; i < vector; ++i) {
    attention[i] = (std::fabs(attention[i]) + A(0.25)) / 4;
  }
  const auto hidden = nans<A>(units), grad_u = nans<A>(units);
  const auto grad_v = nans<A>(vector), grad_pooled = nans<A>(vector);
  kernels.gate_grad(
      g, gates.view(), of_sums ? partial.get() : nullptr, of_output,
      of_attention ? grad_attention.get() : nullptr, pooled.get(), attention.get(), hidden.get(),
      grad_v.get(), grad_u.get(), grad_pooled.get());

  Expected da(vector);
  for (int64_t i = 0; of_sums && i < g.partials(); ++i) {
    const int64_t sc = Place(g, i).sc;
    da[sc].add(partial[i] / (of_output ? attention[sc] : 1.0));
  }
  for (int64_t i = 0; of_attention && i < vector; ++i) {
    da[i].add(grad_attention[i]);
  }
  const Expected h = gates.hidden(exactly(pooled, vector));
  const Expected dv = gates.grad_v(attention, da, h), du = gates.grad_u(dv, h);
  compare(k, "hidden of the gradient", hidden, h);
  compare(k, "gradient of v", grad_v, dv);
  compare(k, "gradient of u", grad_u, du);
  compare(k, "gradient of pooled", grad_pooled, gates.grad_pooled(du));
}

// without: the index of a gradient that is not wanted.
template <class T>
void check_weight_grad(const Case& k, const Kernels& kernels, int without) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  const int64_t S = g.branches, C = g.channels, r = g.hidden;
  const int64_t N = k.samples, B = k.shared ? 1 : S;
  uint64_t state = 5;
  ++cases;
  const auto pooled = drawn<A>(N * S * C, state), hidden = drawn<A>(N * S * r, state);
  const auto grad_v = drawn<A>(N * S * C, state), grad_u = drawn<A>(N * S * r, state);
  const auto fc1 = nans<A>(B * r * C), fc2 = nans<A>(B * r * C);
  const auto fc1_bias = nans<A>(B * r), fc2_bias = nans<A>(B * C);
  const auto wanted = [&](int i, const Buffer<A>& b) { return i == without ? nullptr : b.get(); };
  const WeightGrads grads{wanted(0, fc1), wanted(1, fc1_bias), wanted(2, fc2), wanted(3, fc2_bias)};
  const int64_t split = B * r / 2;
  for (const auto& [begin, end] : {std::pair{split, B * r}, {int64_t{0}, split}}) {
    kernels.weight_grad(
        g, N, k.shared, pooled.get(), hidden.get(), grad_v.get(), grad_u.get(), grads, begin, end);
  }
  Expected of_fc1(B * r * C), of_fc1_bias(B * r), of_fc2(B * r * C), of_fc2_bias(B * C);
  for (int64_t row = 0; row < N * S; ++row) {
    const int64_t b = k.shared ? 0 : row % S;
    for (int64_t i = 0; i < r * C; ++i) {
      const int64_t j = i / C, c = i % C;
      of_fc1[b * r * C + i].add(double{grad_u[row * r + j]} * pooled[row * C + c]);
      of_fc2[(b * C + c) * r + j].add(double{hidden[row * r + j]} * grad_v[row * C + c]);
    }
    for (int64_t j = 0; j < r; ++j) {
      of_fc1_bias[b * r + j].add(grad_u[row * r + j]);
    }
    for (int64_t c = 0; c < C; ++c) {
      of_fc2_bias[b * C + c].add(grad_v[row * C + c]);
    }
  }
  const auto check = [&](int i, const char* what, const auto& given, const Expected& expected) {
    if (i != without) {
      compare(k, what, given, expected);
    }
  };
  check(0, "gradient of fc1", fc1, of_fc1);
  check(1, "gradient of fc1's bias", fc1_bias, of_fc1_bias);
  check(2, "gradient of fc2", fc2, of_fc2);
  check(3, "gradient of fc2's bias", fc2_bias, of_fc2_bias);
}

// ---- the table ----

template <class T>
void run_case(const Case& k, Isa isa) {
  const Kernels& kernels = epsa::cpu::kernels(T::dtype, isa);
  for (const bool second : {false, true}) {
    check_reduce<T>(k, kernels, second);
    check_scale<T>(k, kernels, second, /*relu=*/false, /*in_place=*/false);
    check_scale<T>(k, kernels, second, /*relu=*/false, /*in_place=*/true);
    check_gate<T>(k, kernels, second);
  }
  check_scale<T>(k, kernels, /*add=*/true, /*relu=*/true, /*in_place=*/false);
  check_scale<T>(k, kernels, /*add=*/true, /*relu=*/true, /*in_place=*/true);
  check_gate_grad<T>(k, kernels, true, false, false);
  check_gate_grad<T>(k, kernels, true, true, true);
  check_gate_grad<T>(k, kernels, false, false, true);
  check_weight_grad<T>(k, kernels, static_cast<int>(k.g.pixels % 5));
}

constexpr int64_t kChannels[] = {1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 64, 67};
constexpr int64_t kPixels[] = {1, 2, 7, 9, 16, 31, 49, 65, 196, 511, 523};
constexpr int kBranches[] = {1, 2, 3, 4, kMaxBranches};
constexpr int64_t kHidden[] = {1, 2, 5, 16};

Case table_case(int64_t turn) {
  const Layout layout = turn % 2 ? Layout::channels_last : Layout::contiguous;
  const int64_t pixels = kPixels[turn / 2 % 11];
  Case k;
  k.g = make_geometry(
      kBranches[turn % 5], kChannels[turn / 22], pixels, kHidden[turn / 2 % 4], layout);
  // Chunks that large maps alone have otherwise. Short planes are never cut.
  if (turn % 3 && (pixels > 512 || layout == Layout::channels_last)) {
    k.g.chunk = turn % 3 == 1 ? 100 : 37;
    k.g.chunks = (pixels + k.g.chunk - 1) / k.g.chunk;
  }
  k.samples = 1 + turn / 4 % 2;
  k.gap = turn / 7 % 4;
  k.bias = turn / 3 % 2;
  k.shared = turn / 5 % 2;
  k.name = std::to_string(k.g.branches) + " branches of " + std::to_string(k.g.channels) + "x" +
      std::to_string(pixels) + (layout == Layout::contiguous ? " contiguous" : " channels_last") +
      " hidden " + std::to_string(k.g.hidden) + " chunk " + std::to_string(k.g.chunk) + " gap " +
      std::to_string(k.gap) + (k.bias ? " bias" : "") + (k.shared ? " shared" : "");
  return k;
}

}  // namespace

int main() {
  const Isa isa = isa_in_use();
  for (int64_t turn = 0; turn < 2 * 11 * 12; ++turn) {
    const Case k = table_case(turn);
    run_case<Float>(k, isa);
    run_case<Double>(k, isa);
    run_case<Bfloat16>(k, isa);
    run_case<Float16>(k, isa);
  }
  return summary();
}
