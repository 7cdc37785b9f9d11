// Runs the CUDA kernels over a table of small problems through launch.h and
// compares them with a plain reference in double. No torch.
//
// It is compiled in two ways: with EPSA_EMULATED by a C++ compiler against
// emulated_launch.cpp, and by nvcc against csrc/cuda/launch.cu for a GPU.
// Every tensor is a piece of device memory of exactly its size, so that the
// address sanitizer or compute-sanitizer sees what lies beyond.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "test_plans.h"

#ifdef EPSA_EMULATED
#include "emulated_launch.h"
#else
#include <cuda_runtime.h>
#endif

namespace epsa::cuda {
namespace {

// ---- the machine ----

#ifdef EPSA_EMULATED

void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* p) { std::free(p); }
void copy(void* to, const void* from, size_t bytes) {
  std::memcpy(to, from, bytes);
}

const Device& device() {
  static const Device h100{
      "H100", 90, 132, 2048, 32, 233472, 232448, 50 << 20};
  return h100;
}

#else

struct Call {
  const Problem& problem;
  const Plan& plan;
  Params& params;
  void* memory;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(cudaGetErrorString(error));
  }
}

void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return p;
}
void release(void* p) { cudaFree(p); }
void copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}

const Device& device() {
  static const Device d = device_properties(0);
  return d;
}

void launch_together(const std::vector<Call>& calls) {
  std::vector<cudaStream_t> streams(calls.size());
  for (size_t i = 0; i < calls.size(); ++i) {
    check(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    const auto& [problem, plan, params, memory] = calls[i];
    launch(problem, plan, params, memory, streams[i]);
  }
  check(cudaDeviceSynchronize());
  for (const cudaStream_t stream : streams) {
    check(cudaStreamDestroy(stream));
  }
}

#endif

// Some device memory, and what the host puts there before a launch.
class Buffer {
 public:
  explicit Buffer(size_t bytes)
      : before(bytes, 0xff),  // NaN, also in gaps and in what is to be written
        written(bytes, false),
        memory_(allocate(std::max<size_t>(bytes, 1)), release) {}

  unsigned char* data() const {
    return static_cast<unsigned char*>(memory_.get());
  }
  void upload() const { copy(data(), before.data(), before.size()); }
  std::vector<unsigned char> download() const {
    std::vector<unsigned char> bytes(before.size());
    copy(bytes.data(), data(), bytes.size());
    return bytes;
  }

  std::vector<unsigned char> before;
  std::vector<bool> written;  // the bytes that a launch is to write

 private:
  std::unique_ptr<void, void (*)(void*)> memory_;
};

// ---- elements: all inputs are drawn from numbers that every type holds ----

void encode(double x, Dtype dtype, unsigned char* to) {
  if (dtype == Dtype::f64) {
    std::memcpy(to, &x, 8);
    return;
  }
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == Dtype::f32) {
    std::memcpy(to, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::f16) {  // eight bits less of exponent, three more of rest
    const uint32_t size = bits & 0x7fffffffu;
    half = static_cast<uint16_t>(
        (half & 0x8000u) | (size == 0 ? 0 : (size - 0x38000000u) >> 13));
  }
  std::memcpy(to, &half, 2);
}

double decode(Dtype dtype, const unsigned char* from) {
  if (dtype == Dtype::f64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  if (dtype == Dtype::f16) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    const int exponent = bits >> 10 & 31, rest = bits & 1023;
    const double size = exponent == 31 ? (rest ? NAN : INFINITY)
        : exponent == 0                ? std::ldexp(rest, -24)
                        : std::ldexp(1024 + rest, exponent - 25);
    return bits & 0x8000u ? -size : size;
  }
  uint32_t bits = 0;
  const size_t bytes = static_cast<size_t>(element_size(dtype));
  std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 4 - bytes, from, bytes);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest relative error of one rounding.
double unit(Dtype dtype) {
  return std::ldexp(
      1, dtype == Dtype::f64         ? -53
             : dtype == Dtype::f32   ? -24
             : dtype == Dtype::f16   ? -11
                                     : -8);
}

// ---- the cases ----

// How maps lie in memory.
enum class Storage {
  dense,  // each map by itself
  chunks,  // slices of one tensor
  gaps,  // slices of larger tensors that keep the alignment
  sliced,  // slices of larger tensors from an odd element on
};

struct Case {
  std::string name;
  int N, S, C, M, r;
  Dtype dtype = Dtype::f32;
  Layout layout = Layout::contiguous;
  bool half_weights = false;
  bool shared = true;
  bool fc1_bias = true, fc2_bias = true;
  bool reversed = true;
  Storage storage = Storage::dense;
  bool pooled_given = false;
  bool grad_out = true, grad_attention = true;
  unsigned feats_mask = ~0u, weights_mask = ~0u;  // the gradients asked for

  Dtype acc() const { return dtype == Dtype::f64 ? dtype : Dtype::f32; }
  Dtype weights() const { return half_weights ? dtype : acc(); }
  int sets() const { return shared ? 1 : S; }
};

std::string name_of(Dtype dtype) {
  return dtype == Dtype::f64 ? "f64"
      : dtype == Dtype::f32  ? "f32"
      : dtype == Dtype::bf16 ? "bf16"
                             : "f16";
}

std::vector<Case> all_cases() {
  constexpr Dtype f32 = Dtype::f32, f64 = Dtype::f64, bf16 = Dtype::bf16,
                  f16 = Dtype::f16;
  std::vector<Case> cases;
  const auto add = [&](Case k, std::initializer_list<Dtype> dtypes) {
    const std::string name = k.name;
    for (const Dtype dtype : dtypes) {
      for (const Layout layout : {Layout::contiguous, Layout::channels_last}) {
        k.dtype = dtype;
        k.layout = layout;
        k.name = name + "/" + name_of(dtype) +
            (layout == Layout::contiguous ? "/contiguous" : "/channels_last");
        cases.push_back(k);
      }
    }
  };
  // The shapes of the network's last stage; planes of whole vectors, of whole
  // halves of a bf16 vector; more than fits one turn of the threads.
  add({"stage4", 2, 4, 16, 49, 4}, {f32, f64, bf16, f16});
  add({"vectors", 3, 4, 8, 32, 3}, {f32, f64, bf16, f16});
  add({"half_vectors", 2, 2, 16, 12, 2}, {bf16, f16});
  add({"long", 1, 3, 5, 600, 2}, {f32, bf16});
  add({"wide", 2, 4, 72, 6, 40}, {f32, bf16});
  // no size a multiple of anything; one pixel, one channel, one of each
  add({"odd", 3, 3, 5, 15, 2}, {f32, f64, bf16, f16});
  add({"one_pixel", 5, 4, 24, 1, 3}, {f32, bf16});
  add({"one_channel", 2, 4, 1, 30, 1}, {f32, f16});
  add({"one_of_each", 3, 2, 1, 1, 1}, {f32, bf16});
  add({"branches_2", 2, 2, 33, 9, 4}, {f32, f16});
  add({"branches_5", 2, 5, 8, 16, 1}, {f32, bf16});
  add({"branches_6", 2, 6, 8, 9, 2}, {f32, f16});
  add({"branches_7", 1, 7, 12, 16, 5}, {f32, bf16});
  add({"branches_8", 4, 8, 16, 20, 2}, {f32, bf16});
  // groups of samples whose weight gradients are summed apart, in every mode
  add({"batch_of_17", 17, 3, 4, 4, 2}, {f32, bf16});

  const auto option = [&](const char* name, auto&& set) {
    Case k{name, 3, 4, 8, 16, 3};
    set(k);
    add(k, {f32, bf16});
  };
  option("per_branch", [](Case& k) { k.shared = false; });
  option("fc1_bias_only", [](Case& k) { k.fc2_bias = false; });
  option("fc2_bias_only", [](Case& k) { k.fc1_bias = false; });
  option("per_branch_no_bias", [](Case& k) {
    k.shared = k.fc1_bias = k.fc2_bias = false;
  });
  option("forward_order", [](Case& k) { k.reversed = false; });
  option("chunks", [](Case& k) { k.storage = Storage::chunks; });
  option("gaps", [](Case& k) { k.storage = Storage::gaps; });
  option("sliced", [](Case& k) { k.storage = Storage::sliced; });
  option("pooled_given", [](Case& k) { k.pooled_given = true; });
  option("grad_out_alone", [](Case& k) { k.grad_attention = false; });
  option("grad_attention_alone", [](Case& k) { k.grad_out = false; });
  option("frozen_feats", [](Case& k) { k.feats_mask = 0; });
  option("frozen_weights", [](Case& k) { k.weights_mask = 0; });
  option("some_frozen", [](Case& k) { k.feats_mask = 5, k.weights_mask = 6; });
  option("attention_of_frozen_feats", [](Case& k) {
    k.grad_out = false;
    k.feats_mask = 0;
    k.shared = false;
  });
  for (const Dtype dtype : {bf16, f16}) {
    Case k{"half_weights", 3, 4, 16, 25, 5};
    k.half_weights = true;
    add(k, {dtype});
    k.name = "per_branch_half_weights";
    k.shared = false;
    add(k, {dtype});
  }
  return cases;
}

// ---- the reference ----

// A value, and the size it would have if no terms of its sums cancelled: what
// the accumulation type's roundings are in proportion to.
struct Number {
  double value = 0;
  double size = std::fabs(value);

  Number() = default;
  Number(double x) : value(x) {}
  Number(double x, double of) : value(x), size(of) {}
};
Number operator+(Number x, Number y) {
  return {x.value + y.value, x.size + y.size};
}
Number operator-(Number x, Number y) {
  return {x.value - y.value, x.size + y.size};
}
Number operator*(Number x, Number y) {
  return {x.value * y.value, x.size * y.size};
}
Number operator/(Number x, Number y) {
  return {x.value / y.value, x.size / std::fabs(y.value)};
}
void operator+=(Number& x, Number y) { x = x + y; }
using Numbers = std::vector<Number>;

enum Tensor {
  kFeats, kPooled, kAttention, kOut, kGradOut, kGradAttention, kGradFeats,
  kFc1, kFc1Bias, kFc2, kFc2Bias,
  kGradFc1, kGradFc1Bias, kGradFc2, kGradFc2Bias,
  kTensors
};
const char* const kNames[] = {
    "feats", "pooled", "attention", "out", "grad_out", "grad_attention",
    "grad_feats", "fc1", "fc1_bias", "fc2", "fc2_bias", "grad_fc1",
    "grad_fc1_bias", "grad_fc2", "grad_fc2_bias"};

// [N, S, C, M], [N, S, C] or a weight's shape in params.h; empty where there
// is none.
using Values = std::vector<Numbers>;

Values make_inputs(const Case& k) {
  uint64_t state = 0x9e3779b97f4a7c15u;
  const auto draw = [&state](size_t size, double scale, double mean = 0) {
    Numbers values(size);
    for (Number& x : values) {  // eight bits, also with mean = scale
      state = state * 6364136223846793005u + 1442695040888963407u;
      x = mean + static_cast<int>((state >> 33) % 257 - 128) / 128.0 * scale;
    }
    return values;
  };
  const size_t vector = size_t(k.N) * k.S * k.C;
  const size_t matrix = size_t(k.sets()) * k.r * k.C;
  Values v(kTensors);
  v[kFeats] = draw(vector * k.M, 2);
  v[kFc1] = draw(matrix, 0.5);
  v[kFc1Bias] = draw(k.fc1_bias ? k.sets() * k.r : 0, 0.5, 0.5);  // few dead
  v[kFc2] = draw(matrix, 1);
  v[kFc2Bias] = draw(k.fc2_bias ? k.sets() * k.C : 0, 0.5);
  v[kGradOut] = draw(k.grad_out ? vector * k.M : 0, 2);
  v[kGradAttention] = draw(k.grad_attention ? vector : 0, 1);
  v[kPooled] = draw(k.pooled_given ? vector : 0, 0.5);
  return v;
}

// Fills in all results.
void reference(const Case& k, Values& v) {
  const int N = k.N, S = k.S, C = k.C, M = k.M, r = k.r;
  const bool given = k.pooled_given;
  for (const Tensor t : {kPooled, kAttention}) {
    v[t].resize(size_t(N) * S * C);
  }
  v[kOut].resize(v[kFeats].size());
  v[kGradFeats].resize(v[kFeats].size());
  v[kGradFc1].resize(v[kFc1].size());
  v[kGradFc2].resize(v[kFc2].size());
  v[kGradFc1Bias].resize(v[kFc1Bias].size());
  v[kGradFc2Bias].resize(v[kFc2Bias].size());
  const auto bias = [](const Numbers& b, int i) {
    return b.empty() ? Number() : b[i];
  };
  for (int n = 0; n < N; ++n) {
    Numbers h(S * r), z(S * C), da(S * C);
    Number* p = &v[kPooled][n * S * C];
    Number* a = &v[kAttention][n * S * C];
    const auto map = [&](Tensor t, int i) {
      return &v[t][(n * S * C + i) * M];
    };
    for (int i = 0; i < S * C; ++i) {
      for (int m = 0; !given && m < M; ++m) {
        p[i] += map(kFeats, i)[m] / M;
      }
    }
    for (int s = 0; s < S; ++s) {
      const int b = k.shared ? 0 : s;
      for (int j = 0; j < r; ++j) {
        Number u = bias(v[kFc1Bias], b * r + j);
        for (int c = 0; c < C; ++c) {
          u += v[kFc1][(b * r + j) * C + c] * p[s * C + c];
        }
        h[s * r + j] = {std::max(u.value, 0.0), u.size};
      }
      for (int c = 0; c < C; ++c) {
        Number x = bias(v[kFc2Bias], b * C + c);
        for (int j = 0; j < r; ++j) {
          x += v[kFc2][(b * C + c) * r + j] * h[s * r + j];
        }
        z[s * C + c] = {1 / (1 + std::exp(-x.value)), 1 + x.size};
      }
    }
    for (int i = 0; i < S * C; ++i) {
      double sum = 0;
      for (int t = i % C; t < S * C; t += C) {
        sum += std::exp(z[t].value);
      }
      a[i] = {std::exp(z[i].value) / sum, z[i].size};
      for (int m = 0; m < M; ++m) {
        map(kOut, i)[m] = map(kFeats, i)[m] * a[i];
        if (k.grad_out) {
          da[i] += map(kGradOut, i)[m] * map(kFeats, i)[m];
        }
      }
      if (k.grad_attention) {
        da[i] += v[kGradAttention][n * S * C + i];
      }
    }
    for (int s = 0; s < S; ++s) {
      const int b = k.shared ? 0 : s;
      Numbers dv(C), du(r);
      for (int c = 0; c < C; ++c) {
        Number dot;
        for (int t = 0; t < S; ++t) {
          dot += a[t * C + c] * da[t * C + c];
        }
        const int i = s * C + c;
        dv[c] = a[i] * (da[i] - dot) * z[i] * (1 - z[i]);
        for (int j = 0; j < r; ++j) {
          const int w = (b * C + c) * r + j;
          v[kGradFc2][w] += dv[c] * h[s * r + j];
          if (h[s * r + j].value > 0) {
            du[j] += dv[c] * v[kFc2][w];
          }
        }
        if (k.fc2_bias) {
          v[kGradFc2Bias][b * C + c] += dv[c];
        }
      }
      for (int j = 0; k.fc1_bias && j < r; ++j) {
        v[kGradFc1Bias][b * r + j] += du[j];
      }
      for (int c = 0; c < C; ++c) {
        const int i = s * C + c;
        Number dp;
        for (int j = 0; j < r; ++j) {
          const int w = (b * r + j) * C + c;
          dp += du[j] * v[kFc1][w];
          v[kGradFc1][w] += du[j] * p[i];
        }
        for (int m = 0; m < M; ++m) {
          map(kGradFeats, i)[m] = dp / M;
          if (k.grad_out) {
            map(kGradFeats, i)[m] += map(kGradOut, i)[m] * a[i];
          }
        }
      }
    }
  }
}

// ---- tensors in device memory ----

// A tensor that takes part in a launch, or the maps of all branches.
struct Field {
  Tensor tensor;
  Dtype dtype;
  bool output;
  std::vector<Buffer> buffers;
  // Where each of the values lies: an element of a buffer. No buffer, -1, where
  // a gradient is not asked for.
  std::vector<int> buffer;
  std::vector<int64_t> index;

  int64_t bytes() const { return element_size(dtype); }
  void add(int of_buffer, int64_t at) {
    buffer.push_back(of_buffer);
    index.push_back(at);
  }
  unsigned char* data(int of_buffer, int64_t at) const {
    return buffers[of_buffer].data() + at * bytes();
  }
};

Field dense(Tensor tensor, Dtype dtype, bool output, size_t elements) {
  Field f{tensor, dtype, output, {}, {}, {}};
  f.buffers.emplace_back(elements * f.bytes());
  for (size_t i = 0; i < elements; ++i) {
    f.add(0, static_cast<int64_t>(i));
  }
  return f;
}

// All branches' maps, and how the kernels are told of them. As `slots` they are
// one tensor of the whole output's shape.
Field fields_of_maps(
    const Case& k, Tensor tensor, bool output, bool slots, Maps& maps) {
  const bool one = slots || k.storage == Storage::chunks;
  // whole vectors of any type, or a part of one
  const int begin = k.storage == Storage::gaps ? 8
      : k.storage == Storage::sliced           ? 1
                                               : 0;
  const auto channels = [&](int s) {  // another number for each tensor
    const int gap = k.storage == Storage::sliced ? 3 : begin;
    return one ? k.S * k.C + gap : k.C + gap * (s + 1);
  };
  const bool planes = k.layout == Layout::contiguous;
  const auto first = [&](int s) {
    const int slot = slots && k.reversed ? k.S - 1 - s : s;
    return int64_t{begin} + (one ? slot * k.C * (planes ? k.M : 1) : 0);
  };
  const auto buffer = [&](int s) {
    const bool wanted = tensor != kGradFeats || (k.feats_mask >> s & 1);
    return !wanted ? -1 : one ? 0 : s;
  };
  Field f{tensor, k.dtype, output, {}, {}, {}};
  std::vector<int64_t> ends(one ? 1 : k.S);
  for (int n = 0; n < k.N; ++n) {
    for (int s = 0; s < k.S; ++s) {
      for (int c = 0; c < k.C; ++c) {
        for (int m = 0; m < k.M; ++m) {
          const int64_t inner = planes ? c * k.M + m : m * channels(s) + c;
          f.add(buffer(s), first(s) + n * channels(s) * k.M + inner);
          int64_t& end = ends[one ? 0 : s];
          end = std::max(end, f.index.back() + 1);
        }
      }
    }
  }
  for (const int64_t end : ends) {
    f.buffers.emplace_back(end * f.bytes());
  }
  for (int s = 0; s < k.S; ++s) {
    maps.data[s] = buffer(s) < 0 ? nullptr : f.data(buffer(s), first(s));
    maps.batch_stride[s] = int64_t{channels(s)} * k.M;
    maps.pixel_stride[s] = planes ? 1 : channels(s);
  }
  return f;
}

// Can every access to the maps be one of 16 bytes?
bool aligned(const Case& k, const Maps& maps) {
  const int64_t size = element_size(k.dtype);
  for (int s = 0; s < k.S; ++s) {
    const bool strided = k.layout == Layout::channels_last && k.M > 1;
    if (maps.data[s] &&
        (reinterpret_cast<uintptr_t>(maps.data[s]) % 16 != 0 ||
         (k.N > 1 && maps.batch_stride[s] * size % 16 != 0) ||
         (strided && maps.pixel_stride[s] * size % 16 != 0))) {
      return false;
    }
  }
  return true;
}

// ---- one pass of a case ----

class Experiment {
 public:
  Experiment(const Case& k, Pass pass) : case_(k), values_(make_inputs(k)) {
    const bool forward = pass == Pass::forward;
    reference(k, values_);
    params_.half_weights = k.half_weights;
    params_.fc1 = add(kFc1, k.weights(), false);
    params_.fc1_bias = add(kFc1Bias, k.weights(), false);
    params_.fc2 = add(kFc2, k.weights(), false);
    params_.fc2_bias = add(kFc2Bias, k.weights(), false);
    add_maps(kFeats, false, false, params_.feats);
    params_.pooled = add(kPooled, k.acc(), forward && !k.pooled_given);
    params_.attention = add(kAttention, k.acc(), forward);
    if (forward) {
      add_maps(kOut, true, true, params_.out);
    } else {
      if (k.grad_out) {
        add_maps(kGradOut, false, true, params_.grad_out);
      }
      params_.grad_attention = add(kGradAttention, k.acc(), false);
      add_maps(kGradFeats, true, false, params_.grad_feats);
      void** const grads[] = {
          &params_.grad_fc1, &params_.grad_fc1_bias, &params_.grad_fc2,
          &params_.grad_fc2_bias};
      for (int i = 0; i < 4; ++i) {
        if (k.weights_mask >> i & 1) {
          *grads[i] = add(Tensor(kGradFc1 + i), k.weights(), true);
          problem_.weights_wanted |= *grads[i] != nullptr;
        }
      }
    }
    problem_.pass = pass;
    problem_.samples = k.N;
    problem_.branches = k.S;
    problem_.channels = k.C;
    problem_.pixels = k.M;
    problem_.hidden = k.r;
    problem_.shared = k.shared;
    problem_.dtype = k.dtype;
    problem_.layout = k.layout;
    problem_.aligned = may_align(k.dtype, k.layout, k.C, k.M) &&
        aligned(k, params_.feats) && aligned(k, params_.out) &&
        aligned(k, params_.grad_out) && aligned(k, params_.grad_feats);
    problem_.pooled_given = forward && k.pooled_given;
    problem_.grad_out_given = k.grad_out;
    problem_.feats_wanted = (k.feats_mask & ((1u << k.S) - 1)) != 0;
  }

  const Problem& problem() const { return problem_; }

  // For several launches of one plan.
  void take(const Plan& plan) {
    plan_ = plan;
    workspace_ = std::make_unique<Buffer>(workspace(problem_, plan).bytes);
    first_.clear();
  }
  // All is as it was before; the launch's arguments.
  Call call() {
    for (const Field& f : fields_) {
      for (const Buffer& b : f.buffers) {
        b.upload();
      }
    }
    return {problem_, plan_, params_, workspace_->data()};
  }
  // What the launch did wrong; "" where nothing.
  std::string complaint() {
    std::vector<unsigned char> results;
    for (const Field& f : fields_) {
      std::vector<std::vector<unsigned char>> after;
      for (const Buffer& b : f.buffers) {
        after.push_back(b.download());
        for (size_t i = 0; i < b.before.size(); ++i) {
          if (!b.written[i] && after.back()[i] != b.before[i]) {
            return std::string("wrote to ") + kNames[f.tensor] +
                (f.output ? ", outside of its elements" : ", an input");
          }
        }
        results.insert(results.end(), after.back().begin(), after.back().end());
      }
      if (f.output) {
        if (std::string wrong = compare(f, after); !wrong.empty()) {
          return wrong;
        }
      }
    }
    if (first_.empty()) {
      first_ = results;
    }
    return first_ == results ? "" : "not the bits of the first run";
  }
  // The largest error so far, where 1 is as much as is allowed.
  double error() const { return error_; }

 private:
  void* add(Tensor t, Dtype dtype, bool output) {
    if (values_[t].empty()) {
      return nullptr;
    }
    fields_.push_back(dense(t, dtype, output, values_[t].size()));
    set_bytes(fields_.back());
    return fields_.back().data(0, 0);
  }
  void add_maps(Tensor t, bool output, bool slots, Maps& maps) {
    fields_.push_back(fields_of_maps(case_, t, output, slots, maps));
    set_bytes(fields_.back());
  }
  void set_bytes(Field& f) {
    for (size_t i = 0; i < f.index.size(); ++i) {
      if (f.buffer[i] < 0) {
        continue;
      }
      Buffer& b = f.buffers[f.buffer[i]];
      const int64_t at = f.index[i] * f.bytes();
      if (f.output) {
        std::fill_n(b.written.begin() + at, f.bytes(), true);
      } else {
        encode(values_[f.tensor][i].value, f.dtype, &b.before[at]);
      }
    }
  }

  // A result is computed in the accumulation type and rounded once to its own:
  // no entry may be further from the truth than half a unit in the last place
  // of the largest, and what the accumulation type's roundings add up to: 8 of
  // its epsilons (the worst seen is 1) of what the largest would be if no terms
  // cancelled.
  std::string compare(
      const Field& f, const std::vector<std::vector<unsigned char>>& after) {
    const Numbers& expected = values_[f.tensor];
    double largest = 0, size = 0;
    for (const Number& x : expected) {
      largest = std::max(largest, std::fabs(x.value));
      size = std::max(size, x.size);
    }
    // f16 has no smaller units than those of its smallest normal number
    const double least = f.dtype == Dtype::f16 ? std::ldexp(1, -14) : 0;
    const double limit = unit(f.dtype) * std::max(largest, least) +
        8 * 2 * unit(case_.acc()) * size;
    for (size_t i = 0; i < expected.size(); ++i) {
      if (f.buffer[i] < 0) {
        continue;
      }
      const double x =
          decode(f.dtype, &after[f.buffer[i]][f.index[i] * f.bytes()]);
      const double error = std::fabs(x - expected[i].value);
      if (!(error <= limit)) {
        char text[200];
        std::snprintf(
            text, sizeof text, "wrong result: %s[%zu] is %g, expected %g",
            kNames[f.tensor], i, x, expected[i].value);
        return text;
      }
      error_ = std::max(error_, limit > 0 ? error / limit : 0);
    }
    return "";
  }

  Case case_;
  Values values_;  // inputs and expected results
  std::vector<Field> fields_;
  Problem problem_{};
  Params params_{};
  Plan plan_{};
  std::unique_ptr<Buffer> workspace_;
  std::vector<unsigned char> first_;  // all bytes after the first run
  double error_ = 0;
};

// ---- the program ----

// The emulator's (emulated_launch.h); a GPU has its own, and runs all again.
struct Schedule {
  uint64_t seed;
  int max_resident;
};

struct Options {
  std::vector<std::string> names;  // parts of them; none: all
  std::vector<std::string> dtypes;  // as in names; none: all
  std::vector<std::string> modes;  // none: all
  uint64_t seed = 1;
  bool quick = false;
  bool list = false;
};

std::vector<Schedule> schedules(const Options& options) {
  // A single resident block must do; random orders with many and with few.
  std::vector<Schedule> all = {{0, 1}, {options.seed, 0}};
  if (!options.quick) {
    all.push_back({0, 0});
    for (uint64_t i = 1; i < 8; ++i) {
      all.push_back({options.seed + i, static_cast<int>(i % 4)});
    }
  }
  return all;
}

std::vector<Plan> plans_of(const Problem& problem, const std::string& mode) {
  std::vector<Plan> all = mode == "auto" ? std::vector{choose_plan(problem, 0)}
      : mode == "plans"                  ? plans(problem, device())
                                : std::vector{test_plan(problem, mode)};
  std::erase_if(all, [](const Plan& plan) {
    return plan.cluster > 1 && device().compute_capability < 90;
  });
  return all;
}

void run_together(
    const std::vector<Experiment*>& experiments, const Options& options) {
  for (const Schedule& schedule : schedules(options)) {
    setenv("EPSA_SIMT_SEED", std::to_string(schedule.seed).c_str(), 1);
    setenv(
        "EPSA_SIMT_RESIDENT", std::to_string(schedule.max_resident).c_str(), 1);
    std::vector<Call> calls;
    for (Experiment* e : experiments) {
      calls.push_back(e->call());
    }
    launch_together(calls);
    for (Experiment* e : experiments) {
      if (const std::string wrong = e->complaint(); !wrong.empty()) {
        throw std::runtime_error(
            wrong + " (seed " + std::to_string(schedule.seed) + ", resident " +
            std::to_string(schedule.max_resident) + ")");
      }
    }
  }
}

// All plans of a mode.
double run_alone(
    const Case& k, Pass pass, const std::string& mode,
    const Options& options) {
  Experiment experiment(k, pass);
  for (const Plan& plan : plans_of(experiment.problem(), mode)) {
    experiment.take(plan);
    run_together({&experiment}, options);
  }
  return experiment.error();
}

// Two launches that share the device: neither may wait for what only the
// other's end would let start.
double run_pair(const Case& k, Pass pass, const Options& options) {
  Experiment one(k, pass);
  Experiment two(
      k, pass == Pass::forward ? Pass::backward : Pass::forward);
  for (const char* mode : {"streaming", "chunks", "cluster2"}) {
    one.take(plans_of(one.problem(), mode).at(0));
    two.take(plans_of(two.problem(), "streaming").at(0));
    run_together({&one, &two}, options);
  }
  return std::max(one.error(), two.error());
}

bool contains(const std::string& text, const std::vector<std::string>& parts) {
  return parts.empty() ||
      std::any_of(parts.begin(), parts.end(), [&](const std::string& part) {
           return text.find(part) != std::string::npos;
         });
}

// Few cases that between them reach every branch of the kernels.
bool is_quick(const Case& k) {
  return contains(
      k.name,
      {"stage4/", "vectors/", "odd/", "one_pixel/", "batch_of_17/", "wide/",
       "per_branch/", "gaps/", "sliced/", "chunks/", "grad_attention_alone/",
       "some_frozen/"});
}

int run(const Options& options) {
  std::vector<std::string> modes = test_modes();
  modes.push_back("plans");
  modes.push_back("pair");
  int count = 0, failed = 0;
  for (const Case& k : all_cases()) {
    if ((options.quick && !is_quick(k)) ||
        !contains(k.name, options.dtypes)) {
      continue;
    }
    for (const std::string& mode : modes) {
      for (const Pass pass : {Pass::forward, Pass::backward}) {
        const std::string name = k.name +
            (pass == Pass::forward ? "/forward/" : "/backward/") + mode;
        if (!contains(name, options.names) ||
            !contains("/" + mode, options.modes)) {
          continue;
        }
        ++count;
        if (options.list) {
          std::printf("%s\n", name.c_str());
          continue;
        }
        try {
          const double error = mode == "pair"
              ? run_pair(k, pass, options)
              : run_alone(k, pass, mode, options);
          std::printf(
              "%s: ok, error %.2f of what is allowed\n", name.c_str(), error);
        } catch (const std::exception& e) {
          ++failed;
          std::printf("%s: FAILED: %s\n", name.c_str(), e.what());
        }
        std::fflush(stdout);
      }
    }
  }
  std::printf("%d cases, %d failed\n", count, failed);
  return failed == 0 && count > 0 ? 0 : 1;
}

constexpr const char* kUsage =
    "usage: case_program [--list] [--quick] [--seed SEED] [--mode MODE]...\n"
    "                    [--dtype DTYPE]... [PART_OF_A_NAME]...\n";

}  // namespace
}  // namespace epsa::cuda

int main(int argc, char** argv) {
  epsa::cuda::Options options;
  const std::vector<std::string> given(argv + 1, argv + argc);
  for (size_t i = 0; i < given.size(); ++i) {
    const bool last = i + 1 == given.size();
    if (given[i] == "--list") {
      options.list = true;
    } else if (given[i] == "--quick") {
      options.quick = true;
    } else if (given[i] == "--mode" && !last) {
      options.modes.push_back("/" + given[++i]);
    } else if (given[i] == "--seed" && !last) {
      options.seed = std::stoull(given[++i]);
    } else if (given[i] == "--dtype" && !last) {
      options.dtypes.push_back("/" + given[++i] + "/");
    } else if (given[i].rfind("--", 0) == 0) {
      std::fputs(epsa::cuda::kUsage, stderr);
      return 2;
    } else {
      options.names.push_back(given[i]);
    }
  }
  return epsa::cuda::run(options);
}
