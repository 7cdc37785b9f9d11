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

// The worst error of one array, in units of what is allowed.
struct Error {
  double rounding;  // of the result's type
  double eps;       // of the sums
  double worst = 0;

  void see(double given, double expected, double size) {
    const double allowed = rounding * std::fabs(expected) + eps * size + 1e-30;
    worst = worse(worst, std::fabs(given - expected) / allowed);
  }
};

void report(const Case& k, const char* what, double worst) {
  if (!(worst <= 1)) {
    ++failed;
    std::printf("FAILED %s: %s: %.3g times what is allowed\n", k.name.c_str(), what, worst);
  }
}

template <class T>
Error map_error() {
  return {T::rounding, 64 * std::numeric_limits<typename T::Acc>::epsilon()};
}
template <class T>
Error vector_error() {
  return {0, 64 * std::numeric_limits<typename T::Acc>::epsilon()};
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

template <class T>
void check_reduce(const Case& k, const Kernels& kernels, bool dot) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  uint64_t state = 1;
  ++cases;
  const StoredMaps<T> x(k), y(k);
  x.draw_all(state);
  y.draw_all(state);
  Error error = vector_error<T>();
  for (int64_t n = 0; n < k.samples; ++n) {
    const auto partial = nans<A>(g.partials());
    const int64_t split = g.units() / 2;
    const Maps* other = dot ? &y.maps : nullptr;
    kernels.reduce(g, x.maps, other, partial.get(), n, 0, split);
    kernels.reduce(g, x.maps, other, partial.get(), n, split, g.units());
    for (int64_t i = 0; i < g.partials(); ++i) {
      const bool planes = g.layout == Layout::contiguous;
      const int64_t chunk = planes ? i % g.chunks : i / g.channels % g.chunks;
      const int64_t c = planes ? i / g.chunks % g.channels : i % g.channels;
      const int s = static_cast<int>(i / g.chunks / g.channels);
      double sum = 0, size = 0;
      const int64_t end = std::min((chunk + 1) * g.chunk, g.pixels);
      for (int64_t m = chunk * g.chunk; m < end; ++m) {
        const double term = x.value(s, n, c, m) * (dot ? y.value(s, n, c, m) : 1);
        sum += term;
        size += std::fabs(term);
      }
      error.see(partial[i], sum, size);
    }
  }
  report(k, dot ? "reduce of products" : "reduce", error.worst);
}

template <class T>
void check_scale(const Case& k, const Kernels& kernels, bool add, bool in_place) {
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
  const int unwanted = in_place ? -1 : g.branches - 2;  // none of one branch
  if (unwanted >= 0) {
    to.data[unwanted] = nullptr;
  }
  Error error = map_error<T>();
  for (int64_t n = 0; n < k.samples; ++n) {
    const auto mul = drawn<A>(vector, state), plus = drawn<A>(vector, state);
    const int64_t split = g.units() / 2;
    const A* added = add ? plus.get() : nullptr;
    // As callers do, the last units come first.
    if (split < g.units()) {
      kernels.scale(g, x.maps, mul.get(), added, to, n, split, g.units());
    }
    if (split > 0) {
      kernels.scale(g, x.maps, mul.get(), added, to, n, 0, split);
    }
    for (int64_t i = 0; i < vector * g.pixels; ++i) {
      const int s = static_cast<int>(i / g.pixels / g.channels);
      const int64_t sc = i / g.pixels, c = sc % g.channels, m = i % g.pixels;
      if (s != unwanted) {
        const double product = before.value(s, n, c, m) * mul[sc];
        const double shift = add ? plus[sc] : 0;
        error.see(result.value(s, n, c, m), product + shift, std::fabs(product) + std::fabs(shift));
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
  double hidden(int64_t s, int64_t j, const double* pooled, double* size) const {
    double u = k.bias ? fc1_bias[(k.shared ? 0 : s) * r + j] : 0;
    *size = std::fabs(u);
    for (int64_t c = 0; c < C; ++c) {
      u += w1(s, j, c) * pooled[s * C + c];
      *size += std::fabs(w1(s, j, c) * pooled[s * C + c]);
    }
    return std::max(u, 0.0);
  }
  // The sigmoid of the second layer.
  double excitation(int64_t s, int64_t c, const double* hidden) const {
    double v = k.bias ? fc2_bias[(k.shared ? 0 : s) * C + c] : 0;
    for (int64_t j = 0; j < r; ++j) {
      v += w2(s, c, j) * hidden[s * r + j];
    }
    return 1 / (1 + std::exp(-v));
  }
};

// Rounding errors of the second layer's sums, relative to its sigmoid: sums of hidden units
// times weights of at most a half.
double gate_size(const Case& k, const std::vector<double>& hidden_sizes) {
  double size = 1;
  for (const double h : hidden_sizes) {
    size = std::max(size, h);
  }
  return 1 + size * static_cast<double>(k.g.hidden);
}

template <class T>
void check_gate(const Case& k, const Kernels& kernels, bool of_sums) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  const int64_t S = g.branches, C = g.channels, r = g.hidden;
  uint64_t state = 3;
  ++cases;
  const Gates<A> gates(k, state);
  const auto partial = drawn<A>(g.partials(), state);
  const auto pooled = drawn<A>(S * C, state);
  std::vector<double> p(S * C), p_sizes(S * C);
  for (int64_t i = 0; i < S * C; ++i) {
    p[i] = of_sums ? 0 : pooled[i];
  }
  for (int64_t i = 0; of_sums && i < g.partials(); ++i) {
    const bool planes = g.layout == Layout::contiguous;
    const int64_t s = i / g.chunks / C;
    const int64_t c = planes ? i / g.chunks % C : i % C;
    p[s * C + c] += partial[i] / static_cast<double>(g.pixels);
    p_sizes[s * C + c] += std::fabs(partial[i] / static_cast<double>(g.pixels));
  }
  const auto hidden = nans<A>(S * r), attention = nans<A>(S * C);
  kernels.gate(
      g, gates.view(), of_sums ? partial.get() : nullptr, pooled.get(), hidden.get(),
      attention.get());
  Error pooled_error = vector_error<T>(), hidden_error = vector_error<T>();
  for (int64_t i = 0; i < S * C; ++i) {
    pooled_error.see(pooled[i], p[i], p_sizes[i]);
  }
  std::vector<double> h(S * r), sizes(S * r);
  for (int64_t i = 0; i < S * r; ++i) {
    h[i] = gates.hidden(i / r, i % r, p.data(), &sizes[i]);
    hidden_error.see(hidden[i], h[i], 1 + sizes[i]);
  }
  Error error = vector_error<T>();
  const double size = gate_size(k, sizes);
  for (int64_t c = 0; c < C; ++c) {
    double sum = 0;
    for (int64_t s = 0; s < S; ++s) {
      sum += std::exp(gates.excitation(s, c, h.data()));
    }
    for (int64_t s = 0; s < S; ++s) {
      const double a = std::exp(gates.excitation(s, c, h.data())) / sum;
      error.see(attention[s * C + c], a, a * size);
    }
  }
  report(k, "pooled", pooled_error.worst);
  report(k, "hidden", hidden_error.worst);
  report(k, "attention", error.worst);
}

// of_sums: the gradient reaches the attention through the output.
template <class T>
void check_gate_grad(
    const Case& k, const Kernels& kernels, bool of_sums, bool of_output, bool of_attention) {
  using A = typename T::Acc;
  const Geometry& g = k.g;
  const int64_t S = g.branches, C = g.channels, r = g.hidden;
  uint64_t state = 4;
  ++cases;
  const Gates<A> gates(k, state);
  const auto partial = drawn<A>(g.partials(), state);
  const auto grad_attention = drawn<A>(S * C, state);
  const auto pooled = drawn<A>(S * C, state);
  const auto attention = drawn<A>(S * C, state);
  for (int64_t i = 0; i < S * C; ++i) {
    attention[i] = (std::fabs(attention[i]) + A(0.25)) / 4;
  }
  const auto hidden = nans<A>(S * r), grad_u = nans<A>(S * r);
  const auto grad_v = nans<A>(S * C), grad_pooled = nans<A>(S * C);
  kernels.gate_grad(
      g, gates.view(), of_sums ? partial.get() : nullptr, of_output,
      of_attention ? grad_attention.get() : nullptr, pooled.get(), attention.get(), hidden.get(),
      grad_v.get(), grad_u.get(), grad_pooled.get());

  std::vector<double> p(S * C), h(S * r), sizes(S * r), da(S * C), da_size(S * C);
  for (int64_t i = 0; i < S * C; ++i) {
    p[i] = pooled[i];
  }
  Error hidden_error = vector_error<T>();
  for (int64_t i = 0; i < S * r; ++i) {
    h[i] = gates.hidden(i / r, i % r, p.data(), &sizes[i]);
    hidden_error.see(hidden[i], h[i], 1 + sizes[i]);
  }
  for (int64_t i = 0; of_sums && i < g.partials(); ++i) {
    const bool planes = g.layout == Layout::contiguous;
    const int64_t s = i / g.chunks / C;
    const int64_t sc = s * C + (planes ? i / g.chunks % C : i % C);
    const double term = partial[i] / (of_output ? attention[sc] : 1.0);
    da[sc] += term;
    da_size[sc] += std::fabs(term);
  }
  for (int64_t i = 0; of_attention && i < S * C; ++i) {
    da[i] += grad_attention[i];
    da_size[i] += std::fabs(grad_attention[i]);
  }
  const double size = gate_size(k, sizes);
  std::vector<double> dv(S * C), dv_size(S * C);
  Error v_error = vector_error<T>();
  for (int64_t i = 0; i < S * C; ++i) {
    const int64_t s = i / C, c = i % C;
    double dot = 0, dot_size = da_size[i];
    for (int64_t t = 0; t < S; ++t) {
      dot += attention[t * C + c] * da[t * C + c];
      dot_size += attention[t * C + c] * da_size[t * C + c];
    }
    const double z = gates.excitation(s, c, h.data());
    dv[i] = attention[i] * (da[i] - dot) * z * (1 - z);
    dv_size[i] = attention[i] * dot_size * size;
    v_error.see(grad_v[i], dv[i], dv_size[i]);
  }
  Error u_error = vector_error<T>(), p_error = vector_error<T>();
  std::vector<double> du(S * r), du_size(S * r);
  for (int64_t i = 0; i < S * r; ++i) {
    for (int64_t c = 0; c < C; ++c) {
      const double w = gates.w2(i / r, c, i % r);
      du[i] += w * dv[i / r * C + c];
      du_size[i] += std::fabs(w) * dv_size[i / r * C + c];
    }
    du[i] = h[i] > 0 ? du[i] : 0;
    u_error.see(grad_u[i], du[i], du_size[i]);
  }
  for (int64_t i = 0; i < S * C; ++i) {
    double dp = 0, dp_size = 0;
    for (int64_t j = 0; j < r; ++j) {
      const double w = gates.w1(i / C, j, i % C) / static_cast<double>(g.pixels);
      dp += w * du[i / C * r + j];
      dp_size += std::fabs(w) * du_size[i / C * r + j];
    }
    p_error.see(grad_pooled[i], dp, dp_size);
  }
  report(k, "hidden of the gradient", hidden_error.worst);
  report(k, "gradient of v", v_error.worst);
  report(k, "gradient of u", u_error.worst);
  report(k, "gradient of pooled", p_error.worst);
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
  Error errors[4] = {vector_error<T>(), vector_error<T>(), vector_error<T>(), vector_error<T>()};
  // Sums x[j] * y[c] over samples, and over branches that share weights. A negative index
  // stands for a factor of 1.
  const auto check = [&](int which, double given, int64_t b, const A* x, int64_t xs, int64_t j,
                         const A* y, int64_t c) {
    double sum = 0, size = 0;
    for (int64_t row = 0; row < N * S; ++row) {
      if (k.shared || row % S == b) {
        const double term = (j < 0 ? 1.0 : x[row * xs + j]) * (c < 0 ? 1.0 : y[row * C + c]);
        sum += term;
        size += std::fabs(term);
      }
    }
    if (which != without) {
      errors[which].see(given, sum, size);
    }
  };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t j = 0; j < r; ++j) {
        check(0, fc1[(b * r + j) * C + c], b, grad_u.get(), r, j, pooled.get(), c);
        check(2, fc2[(b * C + c) * r + j], b, hidden.get(), r, j, grad_v.get(), c);
      }
      check(3, fc2_bias[b * C + c], b, nullptr, 0, -1, grad_v.get(), c);
    }
    for (int64_t j = 0; j < r; ++j) {
      check(1, fc1_bias[b * r + j], b, grad_u.get(), r, j, nullptr, -1);
    }
  }
  const char* const names[] = {
      "gradient of fc1", "gradient of fc1's bias", "gradient of fc2", "gradient of fc2's bias"};
  for (int i = 0; i < 4; ++i) {
    report(k, names[i], errors[i].worst);
  }
}

// ---- the table ----

template <class T>
void run_case(const Case& k, Isa isa) {
  const Kernels& kernels = epsa::cpu::kernels(T::dtype, isa);
  for (const bool second : {false, true}) {
    check_reduce<T>(k, kernels, second);
    check_scale<T>(k, kernels, second, /*in_place=*/false);
    check_scale<T>(k, kernels, second, /*in_place=*/true);
    check_gate<T>(k, kernels, second);
  }
  check_gate_grad<T>(k, kernels, true, false, false);
  check_gate_grad<T>(k, kernels, true, true, true);
  check_gate_grad<T>(k, kernels, false, false, true);
  check_weight_grad<T>(k, kernels, static_cast<int>(k.g.pixels % 5));
}

constexpr int64_t kChannels[] = {1, 2, 3, 5, 8, 13, 16, 17, 31, 64, 67};
constexpr int64_t kPixels[] = {1, 2, 7, 9, 16, 31, 49, 65, 196, 511, 523};
constexpr int kBranches[] = {1, 2, 3, 4, kMaxBranches};
constexpr int64_t kHidden[] = {1, 2, 5, 16};

void run_table(Isa isa) {
  int64_t turn = 0;
  for (const int64_t channels : kChannels) {
    for (const int64_t pixels : kPixels) {
      for (const Layout layout : {Layout::contiguous, Layout::channels_last}) {
        Case k;
        k.g = make_geometry(kBranches[turn % 5], channels, pixels, kHidden[turn / 2 % 4], layout);
        // Chunks that large maps alone have otherwise. Short planes are never cut.
        if (turn % 3 && (pixels > 512 || layout == Layout::channels_last)) {
          k.g.chunk = turn % 3 == 1 ? 100 : 37;
          k.g.chunks = (pixels + k.g.chunk - 1) / k.g.chunk;
        }
        k.samples = 1 + turn / 4 % 2;
        k.gap = turn / 7 % 4;
        k.bias = turn / 3 % 2;
        k.shared = turn / 5 % 2;
        k.name = std::to_string(k.g.branches) + " branches of " + std::to_string(channels) + "x" +
            std::to_string(pixels) +
            (layout == Layout::contiguous ? " contiguous" : " channels_last") + " hidden " +
            std::to_string(k.g.hidden) + " chunk " + std::to_string(k.g.chunk) + " gap " +
            std::to_string(k.gap) + (k.bias ? " bias" : "") + (k.shared ? " shared" : "");
        run_case<Float>(k, isa);
        run_case<Double>(k, isa);
        run_case<Bfloat16>(k, isa);
        run_case<Float16>(k, isa);
        ++turn;
      }
    }
  }
}

}  // namespace

int main() {
  run_table(isa_in_use());
  return summary();
}
