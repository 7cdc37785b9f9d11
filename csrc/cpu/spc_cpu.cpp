// The convolutions on the CPU: plans, memory and threads around the kernels.
#include "../psa_glue.h"
#include "../spc.h"
#include "conv_kernels.h"
#include "psa_cpu.h"
#include "threads.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

namespace epsa::cpu {
namespace {

using at::Tensor;

// Floats whose first one begins a line of the cache; zero where asked for.
class Floats {
 public:
  Floats() = default;
  explicit Floats(int64_t count, bool zero = false)
      : memory_(c10::GetCPUAllocator()->allocate(
            std::max<int64_t>(count, 1) * sizeof(float))) {
    TORCH_INTERNAL_ASSERT(
        reinterpret_cast<uintptr_t>(memory_.get()) % 64 == 0);
    if (zero) {
      std::memset(memory_.get(), 0, count * sizeof(float));
    }
  }
  float* get() const { return static_cast<float*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// f(i) for i in [0, count), each by whichever thread comes first.
template <class F>
void for_each(int64_t count, int64_t threads, const F& f) {
  if (threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) {
      f(i);
    }
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min(threads, count), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next++) < count;) {
      f(i);
    }
  });
}

// f(begin, end): on one thread, or on each thread a part.
template <class F>
void for_parts(int64_t count, int64_t threads, const F& f) {
  if (threads == 1) {
    if (count > 0) {
      f(0, count);
    }
  } else {
    parallel_for(0, count, 1, f);
  }
}

// Below this another thread costs more than it saves.
constexpr double kSerialFlops = 1e6;

int64_t threads_for(double flops) {
  return flops < kSerialFlops ? 1 : usable_threads();
}

double flops_of(const SpcProblem& p, const Conv& conv) {
  return 2.0 * static_cast<double>(p.N * p.C * conv.ic() * conv.taps()) *
      static_cast<double>(p.out_h * p.out_w);
}

// ---- tensors as the kernels read them ----

Image image_of(const Tensor& t, int64_t n, int64_t channel = 0) {
  const int64_t element = n * t.stride(0) + channel * t.stride(1);
  return {
      static_cast<char*>(glue::data_of(t)) + element * t.element_size(),
      // of one channel or one pixel the strides mean nothing
      t.size(1) == 1 ? t.size(2) * t.size(3) : t.stride(1),
      t.size(3) == 1 ? 1 : t.stride(3), t.stride(2)};
}

// Pixels of a row dense, or channels of a pixel: what the kernels take.
bool is_image(const Tensor& t) {
  return t.size(3) == 1 || t.stride(3) == 1 ||
      (t.size(1) > 1 && t.stride(1) == 1);
}

int64_t tap_stride(const Tensor& w) {
  return w.size(2) * w.size(3) == 1 ? 1  // never stepped
      : w.size(3) == 1              ? w.stride(2)
                                    : w.stride(3);
}

// Are a weight's taps evenly spaced, and taps or channels dense?
bool evenly_spaced(const Tensor& w) {
  const bool even =
      w.size(2) == 1 || w.size(3) == 1 || w.stride(2) == w.size(3) * w.stride(3);
  return even && (tap_stride(w) == 1 || w.stride(1) == 1);
}

ConvWeights weights_of(const Tensor& w, const Conv& conv) {
  return {
      glue::data_of(w), conv.oc() * w.stride(0), w.stride(0),
      w.size(1) == 1 ? 1 : w.stride(1), tap_stride(w), /*turned=*/false};
}

// As the weights of a phase of the input's gradient: inputs and outputs of each
// group change roles.
ConvWeights turned_weights_of(const Tensor& w, const Conv& phase) {
  return {
      glue::data_of(w), phase.ic() * w.stride(0),
      w.size(1) == 1 ? 1 : w.stride(1), w.stride(0), tap_stride(w),
      /*turned=*/true};
}

Conv conv_of(
    const SpcProblem& p, const Tensor& w, const SpcSettings& settings,
    int64_t s) {
  return make_conv(
      p.in_channels, p.C, settings.groups[s], w.size(2), w.size(3),
      settings.stride, settings.padding[s], settings.dilation[s], p.H, p.W);
}

Tensor evenly(const Tensor& w) {
  return evenly_spaced(w) ? w : w.contiguous();
}

const ConvKernels& kernels_for(const SpcProblem& p, Isa isa) {
  // there are none for double, of which nothing is asked
  return conv_kernels(
      p.dtype == at::kDouble ? Dtype::f32 : glue::dtype_of<Dtype>(p.dtype), isa);
}

// Packs the weights of all units of several plans.
struct Packed {
  Floats memory;
  std::vector<int64_t> first;  // of each branch

  float* unit(size_t s, const ConvPlan& plan, int64_t u) const {
    return memory.get() + first[s] + u * plan.unit_weights;
  }
};

Packed pack_weights(
    const ConvKernels& k, const std::vector<Conv>& convs,
    const std::vector<ConvPlan>& plans, const std::vector<ConvWeights>& weights,
    int64_t threads) {
  Packed packed;
  std::vector<std::pair<size_t, int64_t>> units;
  int64_t floats = 0;
  for (size_t s = 0; s < plans.size(); ++s) {
    packed.first.push_back(floats);
    floats += plans[s].units * plans[s].unit_weights;
    for (int64_t u = 0; u < plans[s].units; ++u) {
      units.push_back({s, u});
    }
  }
  packed.memory = Floats(floats);
  for_each(static_cast<int64_t>(units.size()), threads, [&](int64_t i) {
    const auto [s, u] = units[i];
    k.pack_weights(
        convs[s], plans[s], weights[s], u, packed.unit(s, plans[s], u));
  });
  return packed;
}

// ---- branches without kernels here: torch's convolution ----

// Half-precision tensors are computed in float and rounded once, as the kernels
// do it: torch's own convolutions round more often, and on machines without
// bfloat16 arithmetic are slow.
Tensor in_acc(const Tensor& t, const SpcProblem& p) {
  return t.scalar_type() == p.acc ? t : t.to(p.acc);
}

// t in a type and layout, with the strides of a new tensor also where a size of 1
// leaves them open.
Tensor settled(
    const Tensor& t, at::ScalarType dtype, at::MemoryFormat format) {
  Tensor result =
      at::detail::empty_cpu(t.sizes(), dtype, /*pin_memory=*/false, format);
  const bool settled =
      t.scalar_type() == dtype && t.strides() == result.strides();
  return settled ? t : result.copy_(t);
}

Tensor library_forward(
    const SpcProblem& p, const Tensor& x, const Tensor& weight,
    const SpcSettings& k, int64_t s) {
  return at::convolution(
      in_acc(x, p), in_acc(weight, p), std::nullopt, {k.stride, k.stride},
      {k.padding[s], k.padding[s]}, {k.dilation[s], k.dilation[s]},
      /*transposed=*/false, /*output_padding=*/{0, 0}, k.groups[s]);
}

// Gradients of x and of the weight in the accumulation type.
std::pair<Tensor, Tensor> library_backward(
    const SpcProblem& p, const Tensor& grad, const Tensor& x,
    const Tensor& weight, const SpcSettings& k, int64_t s, bool input_wanted,
    bool weight_wanted) {
  auto [gx, gw, gb] = at::convolution_backward(
      in_acc(grad, p), in_acc(x, p), in_acc(weight, p), std::nullopt,
      {k.stride, k.stride}, {k.padding[s], k.padding[s]},
      {k.dilation[s], k.dilation[s]}, /*transposed=*/false,
      /*output_padding=*/{0, 0}, k.groups[s],
      {input_wanted, weight_wanted, false});
  return {gx, gw};
}

// ---- forward ----

// The branches that have kernels here, on all samples.
class Forward {
 public:
  Forward(
      const SpcProblem& p, at::TensorList weights, const SpcSettings& settings)
      : p_(p), isa_(isa_in_use()), k_(kernels_for(p, isa_)) {
    for (int64_t s = 0; s < p.S; ++s) {
      const Tensor& w = weights[s];
      const Conv conv = conv_of(p, w, settings, s);
      const ConvPlan plan = plan_conv(conv, p.dtype == at::kDouble, isa_);
      convs_.push_back(conv);
      plans_.push_back(plan);
      weights_.push_back(evenly(w));
      first_sums_.push_back(sums_);
      if (plan.method == ConvMethod::library) {
        continue;
      }
      const int64_t strips = plan.strips(p.out_h);
      sums_ += strips * p.C;
      buffer_ = std::max(
          buffer_, plan.strip * plan.buffer_width * plan.unit_pitch);
      lane_floats_ = std::max(lane_floats_, k_.lane_floats(plan));
      unit_weights_ = std::max(unit_weights_, plan.unit_weights);
      weight_floats_ += plan.units * plan.unit_weights;
      flops_ += flops_of(p, conv);
      size_.include(conv, plan.buffer_width);
      for (int64_t unit = 0; unit < plan.units; ++unit) {
        units_.push_back({static_cast<int>(s), unit, 0});
        for (int64_t strip = 0; strip < strips; ++strip) {
          tasks_.push_back({static_cast<int>(s), unit, strip});
        }
      }
    }
  }

  bool has(int64_t s) const {
    return plans_[s].method != ConvMethod::library;
  }
  bool has_all() const {
    return std::none_of(
        plans_.begin(), plans_.end(),
        [](const ConvPlan& p) { return p.method == ConvMethod::library; });
  }

  // Convolves all samples of x into `feats` and writes the means of the maps to
  // `pooled` [N, S, C], both for the branches that have kernels here. When sample
  // n is complete, done(n, threads) follows, which may use so many threads. Who
  // computes what does not touch the results.
  template <class Done>
  void run(
      const Tensor& x, const std::vector<Tensor>& feats, float* pooled,
      const Done& done) const {
    const int64_t threads = threads_for(flops_);
    std::vector<ConvWeights> weights;
    for (size_t s = 0; s < convs_.size(); ++s) {
      weights.push_back(weights_of(weights_[s], convs_[s]));
    }
    Run run{*this, x, feats, weights, pooled};
    if (weight_floats_ > kCacheFloats &&
        (p_.N <= threads || weight_floats_ > 8 * image_floats())) {
      by_unit(run, threads, done);
      return;
    }
    const Packed packed = pack_weights(k_, convs_, plans_, weights, threads);
    run.packed = &packed;
    // Samples are dealt out whole; those that do not divide by the number of
    // threads are shared.
    const int64_t whole = p_.N - p_.N % threads;
    by_sample(run, whole, threads, done);
    shared(run, whole, threads, done);
  }

 private:
  // Weights beyond this leave a core's own cache before the next sample needs them:
  // then they, not the images, should be read once.
  static constexpr int64_t kCacheFloats = 1 << 18;

  // A piece of work: one unit, one strip.
  struct Task {
    int branch;
    int64_t unit, strip;
  };

  // A thread's scratch memory.
  struct Memory {
    Floats buffer, lanes;
    explicit Memory(const Forward& f)
        : buffer(f.buffer_), lanes(f.lane_floats_) {}
  };

  // One call's steps.
  struct Run {
    const Forward& self;
    const Tensor& x;
    const std::vector<Tensor>& feats;
    const std::vector<ConvWeights>& weights;
    float* pooled;
    const Packed* packed = nullptr;

    Scratch scratch(float* image) const {
      return {image, self.p_.H, self.size_.width, self.size_.border};
    }

    void pack(int64_t n, float* image, int64_t begin, int64_t end) const {
      self.k_.pack_image(
          image_of(x, n), self.p_.in_channels, self.p_.W, scratch(image), begin,
          end);
    }

    const float* unit_weights(const Task& task) const {
      return packed->unit(
          task.branch, self.plans_[task.branch], task.unit);
    }

    void task(
        const Task& task, const float* unit_weights, int64_t n, float* image,
        float* sums, const Memory& memory) const {
      const SpcProblem& p = self.p_;
      const Conv& conv = self.convs_[task.branch];
      const ConvPlan& plan = self.plans_[task.branch];
      const int64_t begin = task.strip * plan.strip;
      const int64_t end = std::min(begin + plan.strip, p.out_h);
      const Sums strip{
          memory.buffer.get(), plan.buffer_width * plan.unit_pitch,
          plan.unit_pitch, /*add=*/false};
      self.k_.convolve(
          conv, plan, scratch(image), unit_weights, task.unit, begin, end, strip,
          memory.lanes.get());
      const epsa::cpu::Run run = unit_run(conv, plan, task.unit);
      const Tensor& feat = feats[task.branch];
      Image to = image_of(feat, n, run.first);
      to.data = static_cast<char*>(to.data) +
          begin * to.row_stride * feat.element_size();
      self.k_.unpack(
          strip, run.count, end - begin, p.out_w, to,
          sums + self.first_sums_[task.branch] + task.strip * p.C + run.first);
    }

    // sums of sample n -> its means
    void finish(int64_t n, const float* sums) const {
      self.means(sums, pooled + n * self.p_.S * self.p_.C);
    }
  };

  // Each thread its own samples, up to `count`: x stays in its cache.
  template <class Done>
  void by_sample(
      const Run& run, int64_t count, int64_t threads, const Done& done) const {
    for_parts(count, threads, [&](int64_t begin, int64_t end) {
      const Floats image(image_floats(), /*zero=*/true), sums(sums_);
      const Memory memory(*this);
      for (int64_t n = begin; n < end; ++n) {
        run.pack(n, image.get(), 0, blocks());
        for (const Task& task : tasks_) {
          run.task(
              task, run.unit_weights(task), n, image.get(), sums.get(), memory);
        }
        run.finish(n, sums.get());
        done(n, 1);
      }
    });
  }

  // All threads share the samples from `first` on, strip by strip.
  template <class Done>
  void shared(
      const Run& run, int64_t first, int64_t threads, const Done& done) const {
    const int64_t count = p_.N - first;
    const int64_t tasks = static_cast<int64_t>(tasks_.size());
    if (count == 0) {
      return;
    }
    const Floats images(count * image_floats(), /*zero=*/true);
    const Floats sums(count * sums_);
    pack_images(run, first, count, images.get(), threads);
    std::atomic<int64_t> next{0};
    for_parts(threads, threads, [&](int64_t, int64_t) {
      const Memory memory(*this);
      for (int64_t i; (i = next++) < count * tasks;) {
        const int64_t n = i / tasks;
        const Task& task = tasks_[i % tasks];
        run.task(
            task, run.unit_weights(task), first + n,
            images.get() + n * image_floats(), sums.get() + n * sums_, memory);
      }
    });
    for (int64_t n = 0; n < count; ++n) {
      run.finish(first + n, sums.get() + n * sums_);
      done(first + n, threads);
    }
  }

  // All threads share the units; a unit's weights are packed where they are used,
  // and stay in the cache for all samples of a wave.
  template <class Done>
  void by_unit(const Run& run, int64_t threads, const Done& done) const {
    constexpr int64_t kWaveFloats = 1 << 20;  // of packed images
    const int64_t wave =
        std::clamp<int64_t>(kWaveFloats / image_floats(), 1, p_.N);
    const int64_t units = static_cast<int64_t>(units_.size());
    const Floats images(wave * image_floats(), /*zero=*/true);
    const Floats sums(wave * sums_);
    for (int64_t first = 0; first < p_.N; first += wave) {
      const int64_t count = std::min(wave, p_.N - first);
      pack_images(run, first, count, images.get(), threads);
      // some tasks for each thread, or they would end at very different times
      const int64_t parts =
          std::clamp<int64_t>((4 * threads + units - 1) / units, 1, count);
      std::atomic<int64_t> next{0};
      for_parts(threads, threads, [&](int64_t, int64_t) {
        const Memory memory(*this);
        const Floats unit_weights(unit_weights_);
        for (int64_t i; (i = next++) < units * parts;) {
          Task task = units_[i / parts];
          const ConvPlan& plan = plans_[task.branch];
          k_.pack_weights(
              convs_[task.branch], plan, run.weights[task.branch], task.unit,
              unit_weights.get());
          const int64_t part = i % parts;
          const int64_t end = (part + 1) * count / parts;
          for (int64_t n = part * count / parts; n < end; ++n) {
            for (task.strip = 0; task.strip < plan.strips(p_.out_h);
                 ++task.strip) {
              run.task(
                  task, unit_weights.get(), first + n,
                  images.get() + n * image_floats(), sums.get() + n * sums_,
                  memory);
            }
          }
        }
      });
      const bool alone = count < threads;
      for_each(count, alone ? 1 : threads, [&](int64_t n) {
        run.finish(first + n, sums.get() + n * sums_);
        done(first + n, alone ? threads : 1);
      });
    }
  }

  int64_t image_floats() const {
    return size_.floats(p_.in_channels, p_.H, k_.lanes);
  }
  int64_t blocks() const {  // of an image's channels
    return (p_.in_channels + k_.lanes - 1) / k_.lanes;
  }

  void pack_images(
      const Run& run, int64_t first, int64_t count, float* images,
      int64_t threads) const {
    for_each(count * blocks(), threads, [&](int64_t i) {
      const int64_t n = i / blocks(), block = i % blocks();
      run.pack(first + n, images + n * image_floats(), block, block + 1);
    });
  }

  // partial sums of one sample -> means [S, C], in the order of the strips
  void means(const float* sums, float* pooled) const {
    const float pixels = static_cast<float>(p_.out_h * p_.out_w);
    for (int64_t s = 0; s < p_.S; ++s) {
      if (!has(s)) {
        continue;
      }
      float* mean = pooled + s * p_.C;
      std::fill_n(mean, p_.C, 0.0f);
      for (int64_t strip = 0; strip < plans_[s].strips(p_.out_h); ++strip) {
        const float* part = sums + first_sums_[s] + strip * p_.C;
        for (int64_t c = 0; c < p_.C; ++c) {
          mean[c] += part[c];
        }
      }
      for (int64_t c = 0; c < p_.C; ++c) {
        mean[c] /= pixels;
      }
    }
  }

  SpcProblem p_;
  Isa isa_;
  const ConvKernels& k_;
  std::vector<Conv> convs_;
  std::vector<ConvPlan> plans_;
  std::vector<Tensor> weights_;
  std::vector<int64_t> first_sums_;  // of a branch, among a sample's
  std::vector<Task> tasks_, units_;  // of the latter the strip is open
  ScratchSize size_;
  int64_t sums_ = 0, buffer_ = 0, lane_floats_ = 0;  // floats
  int64_t unit_weights_ = 0, weight_floats_ = 0;  // of one unit at most, of all
  double flops_ = 0;
};

SpcForward forward(
    const Tensor& x_, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p = check_spc_arguments("spc_conv", x_, weights, settings);
  const at::MemoryFormat format = spc_layout(x_);
  Tensor pooled = at::detail::empty_cpu(
      {p.N, p.S, p.C}, p.acc, /*pin_memory=*/false,
      at::MemoryFormat::Contiguous);
  const Forward native(p, weights, settings);
  const Tensor x = is_image(x_) ? x_ : x_.contiguous(format);
  std::vector<Tensor> feats;
  bool any = false;
  for (int64_t s = 0; s < p.S; ++s) {
    if (native.has(s)) {
      any = true;
      feats.push_back(at::detail::empty_cpu(
          {p.N, p.C, p.out_h, p.out_w}, p.dtype, /*pin_memory=*/false, format));
      continue;
    }
    const Tensor f = library_forward(p, x, weights[s], settings, s);
    feats.push_back(settled(f, p.dtype, format));
    pooled.select(1, s).copy_(f.mean({2, 3}));
  }
  if (any && p.N > 0) {
    native.run(
        x, feats, pooled.mutable_data_ptr<float>(), [](int64_t, int64_t) {});
  }
  return {std::move(feats), std::move(pooled)};
}

// ---- the whole module, without autograd ----

// The convolutions write into the output's slots, their epilogue has the means,
// and each sample is reweighted in place while it is in the cache.
Tensor psa_forward(
    const Tensor& x_, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    const Tensor& fc1_weight, const std::optional<Tensor>& fc1_bias,
    const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias,
    bool reversed) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p = check_spc_arguments("psa_forward", x_, weights, settings);
  const Forward native(p, weights, settings);
  if (!native.has_all()) {
    // a branch without a kernel here makes a map of its own
    const auto [feats, pooled] =
        forward(x_, weights, groups, stride, padding, dilation);
    return call_psa_attention(
        feats, fc1_weight, fc1_bias, fc2_weight, fc2_bias, reversed, pooled);
  }
  const at::MemoryFormat format = spc_layout(x_);
  Tensor out = at::detail::empty_cpu(
      {p.N, p.S * p.C, p.out_h, p.out_w}, p.dtype, /*pin_memory=*/false, format);
  const AttentionStep attention(
      "psa_forward", out, p.S, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
      reversed);
  if (p.N == 0) {
    return out;
  }
  std::vector<Tensor> slots;
  for (int64_t s = 0; s < p.S; ++s) {
    const int64_t slot =
        glue::slot_of_branch(static_cast<int>(s), static_cast<int>(p.S), reversed);
    slots.push_back(out.narrow(1, slot * p.C, p.C));
  }
  const Floats pooled(p.N * p.S * p.C);
  native.run(
      is_image(x_) ? x_ : x_.contiguous(format), slots, pooled.get(),
      [&](int64_t n, int64_t threads) {
        attention.run(n, pooled.get() + n * p.S * p.C, threads);
      });
  return out;
}

// ---- backward ----

// The gradient of x, where every branch has a kernel for it: in phases, each of
// them a convolution of the branches' gradients whose results are added.
class InputGrad {
 public:
  InputGrad(
      const SpcProblem& p, at::TensorList weights, const SpcSettings& settings,
      Isa isa, bool wanted)
      : p_(p), k_(kernels_for(p, isa)), stride_(settings.stride) {
    if (!wanted) {
      return;
    }
    for (int64_t row = 0; row < std::min(stride_, p.H); ++row) {
      for (int64_t column = 0; column < std::min(stride_, p.W); ++column) {
        Part part{row, column};
        for (int64_t s = 0; s < p.S; ++s) {
          const Conv conv = conv_of(p, weights[s], settings, s);
          const Phase phase = grad_input_phase(conv, row, column);
          part.rows = phase.conv.out_height;
          part.columns = phase.conv.out_width;
          if (phase.conv.taps() == 0) {
            continue;
          }
          const ConvPlan plan =
              plan_grad_input(phase.conv, p.dtype == at::kDouble, isa);
          if (plan.method == ConvMethod::library ||
              (stride_ > 1 && conv.dilation > 1)) {
            parts_.clear();
            return;
          }
          Tensor w = weights[s];
          if (stride_ > 1) {
            w = w.slice(2, phase.tap_row, std::nullopt, stride_)
                    .slice(3, phase.tap_column, std::nullopt, stride_);
          }
          part.branches.push_back(s);
          part.convs.push_back(phase.conv);
          part.plans.push_back(plan);
          part.weights.push_back(evenly(w));
        }
        divide(part);
        parts_.push_back(std::move(part));
      }
    }
  }

  bool possible() const { return !parts_.empty(); }

  void include_in(ScratchSize& grads) const {
    for (const Part& part : parts_) {
      for (size_t i = 0; i < part.convs.size(); ++i) {
        grads.include(part.convs[i], part.plans[i].buffer_width);
      }
    }
  }

  void pack(int64_t threads) {
    for (Part& part : parts_) {
      std::vector<ConvWeights> weights;
      for (size_t i = 0; i < part.convs.size(); ++i) {
        weights.push_back(turned_weights_of(part.weights[i], part.convs[i]));
      }
      part.packed =
          pack_weights(k_, part.convs, part.plans, weights, threads);
    }
  }

  int64_t buffer_floats() const { return buffer_; }
  int64_t lane_floats() const { return lane_floats_; }
  int64_t tasks() const { return tasks_; }  // of one sample

  // grads(s): the scratch of branch s's gradient of this sample
  template <class Grads>
  void run(
      int64_t task, int64_t n, const Grads& grads, const Tensor& grad_x,
      float* buffer, float* lane_sums) const {
    size_t i = 0;
    while (task >= parts_[i].strips * parts_[i].ranges) {
      task -= parts_[i].strips * parts_[i].ranges;
      ++i;
    }
    const Part& part = parts_[i];
    const int64_t range = task % part.ranges;
    const int64_t begin = task / part.ranges * part.strip;
    const int64_t end = std::min(begin + part.strip, part.rows);
    std::memset(buffer, 0, (end - begin) * part.row * sizeof(float));
    for (const auto& [b, unit] : part.units[range]) {
      const ConvPlan& plan = part.plans[b];
      const int64_t first = unit_run(part.convs[b], plan, unit).first;
      k_.convolve(
          part.convs[b], plan, grads(part.branches[b]),
          part.packed.unit(b, plan, unit), unit, begin, end,
          {buffer + first % part.range, part.row, part.pitch, /*add=*/true},
          lane_sums);
    }
    Image to = image_of(grad_x, n, range * part.range);
    to.data = static_cast<char*>(to.data) +
        ((part.first_row + begin * stride_) * to.row_stride +
         part.first_column * to.pixel_stride) * grad_x.element_size();
    to.row_stride *= stride_;
    to.pixel_stride *= stride_;
    k_.unpack(
        {buffer, part.row, part.pitch, false}, part.range, end - begin,
        part.columns, to, nullptr);
  }

 private:
  // One phase. A task is a strip of its rows and a range of channels; all branches
  // add to it, so it holds whole units of each.
  struct Part {
    int64_t first_row, first_column;
    int64_t rows = 0, columns = 0;
    std::vector<int64_t> branches{};
    std::vector<Conv> convs{};
    std::vector<ConvPlan> plans{};
    std::vector<Tensor> weights{};
    Packed packed{};
    // of each range: places in the lists above, and units
    std::vector<std::vector<std::pair<size_t, int64_t>>> units{};
    int64_t range = 1, ranges = 0, strip = 0, strips = 0;
    int64_t pitch = 0, row = 0;  // of the strip's buffer
  };

  void divide(Part& part) {
    const int64_t lanes = k_.lanes;
    for (const ConvPlan& plan : part.plans) {
      part.range = std::lcm(part.range, plan.unit_channels);
    }
    if (part.plans.empty() || p_.in_channels % part.range) {
      part.range = p_.in_channels;
    }
    part.ranges = p_.in_channels / part.range;
    part.units.assign(part.ranges, {});
    part.pitch = part.range;
    int64_t width = part.columns;
    for (size_t b = 0; b < part.plans.size(); ++b) {
      const ConvPlan& plan = part.plans[b];
      for (int64_t unit = 0; unit < plan.units; ++unit) {
        const int64_t first = unit_run(part.convs[b], plan, unit).first;
        part.units[first / part.range].push_back({b, unit});
        // a unit may be less than full, and writes all of its lanes
        part.pitch =
            std::max(part.pitch, first % part.range + plan.unit_channels);
      }
      width = std::max(width, plan.buffer_width);
      lane_floats_ = std::max(lane_floats_, k_.lane_floats(plan));
    }
    part.pitch = (part.pitch + lanes - 1) / lanes * lanes;
    part.row = width * part.pitch;
    constexpr int64_t kBufferFloats = 8192;
    part.strip = std::clamp<int64_t>(kBufferFloats / part.row, 1, part.rows);
    part.strips = (part.rows + part.strip - 1) / part.strip;
    buffer_ = std::max(buffer_, part.strip * part.row);
    tasks_ += part.strips * part.ranges;
  }

  SpcProblem p_;
  const ConvKernels& k_;
  int64_t stride_;
  std::vector<Part> parts_;
  int64_t buffer_ = 0, lane_floats_ = 0, tasks_ = 0;
};

// The gradients that have kernels here: of x if all branches have one, and of
// those weights that have one.
class Backward {
 public:
  Backward(
      const SpcProblem& p, at::TensorList weights, const SpcSettings& settings,
      const c10::List<bool>& output_mask)
      : p_(p),
        isa_(isa_in_use()),
        k_(kernels_for(p, isa_)),
        input_grad_(p, weights, settings, isa_, output_mask.get(0)),
        input_(input_grad_.possible()) {
    for (int64_t s = 0; s < p.S; ++s) {
      const Conv conv = conv_of(p, weights[s], settings, s);
      convs_.push_back(conv);
      weight_plans_.push_back(
          output_mask.get(s + 1)
              ? plan_weight_grad(conv, p.dtype == at::kDouble, isa_)
              : WeightGradPlan());
      flops_ += flops_of(p, conv);
      const WeightGradPlan& plan = weight_plans_[s];
      first_sums_.push_back(sums_);
      if (!plan.library) {
        for (int64_t unit = 0; unit < plan.units; ++unit) {
          weight_tasks_.push_back({s, unit});
        }
        sums_ += plan.units * plan.unit_sums;
        most_sums_ = std::max(most_sums_, plan.unit_sums);
        x_size_.include(conv, p.out_w);
      }
    }
    grad_size_.width = p.out_w;  // for the weights' gradients no more is read
    if (input_) {
      input_grad_.include_in(grad_size_);
    }
  }

  bool input() const { return input_; }
  bool weight(int64_t s) const { return !weight_plans_[s].library; }
  bool any() const { return input_ || !weight_tasks_.empty(); }

  void run(
      at::TensorList grad_feats, const Tensor& x, const Tensor& grad_x,
      const std::vector<Tensor>& grad_weights) {
    const int64_t threads = threads_for(flops_);
    const int64_t lanes = k_.lanes;
    const int64_t grad_blocks = (p_.C + lanes - 1) / lanes;
    const int64_t x_blocks =
        weight_tasks_.empty() ? 0 : (p_.in_channels + lanes - 1) / lanes;
    const int64_t x_floats =
        x_blocks ? x_size_.floats(p_.in_channels, p_.H, lanes) : 0;
    const int64_t grad_floats = grad_size_.floats(p_.C, p_.out_h, lanes);
    const int64_t weight_tasks = static_cast<int64_t>(weight_tasks_.size());
    const int64_t input_tasks = input_ ? input_grad_.tasks() : 0;
    if (input_) {
      input_grad_.pack(threads);
    }
    // Several samples at a time: each thread has one, and the weights' sums are
    // fetched seldom. They are made in the samples' order, whoever makes them.
    constexpr int64_t kWaveFloats = 1 << 20;  // of packed images
    const int64_t sample_floats = x_floats + p_.S * grad_floats;
    const int64_t wave = std::min(
        p_.N,
        std::max<int64_t>(1, kWaveFloats / (threads * sample_floats)) * threads);
    // With one wave each sum is finished at once, in its thread's own memory.
    const bool at_once = wave == p_.N;
    const Floats sums(at_once ? 0 : sums_, /*zero=*/true);
    const auto finish = [&](const Unit& task, const float* unit_sums) {
      k_.unpack_weight_grad(
          convs_[task.branch], weight_plans_[task.branch], task.unit, unit_sums,
          weights_of(grad_weights[task.branch], convs_[task.branch]));
    };
    const Floats images(wave * x_floats, /*zero=*/true);
    const Floats grads(wave * p_.S * grad_floats, /*zero=*/true);
    const auto image = [&](int64_t n) {
      return Scratch{
          images.get() + n * x_floats, p_.H, x_size_.width, x_size_.border};
    };
    const auto grad = [&](int64_t n, int64_t s) {
      return Scratch{
          grads.get() + (n * p_.S + s) * grad_floats, p_.out_h,
          grad_size_.width, grad_size_.border};
    };
    for (int64_t n0 = 0; n0 < p_.N; n0 += wave) {
      const int64_t count = std::min(wave, p_.N - n0);
      const int64_t blocks = x_blocks + p_.S * grad_blocks;
      for_each(count * blocks, threads, [&](int64_t i) {
        const int64_t n = i / blocks, block = i % blocks;
        if (block < x_blocks) {
          k_.pack_image(
              image_of(x, n0 + n), p_.in_channels, p_.W, image(n), block,
              block + 1);
          return;
        }
        const int64_t s = (block - x_blocks) / grad_blocks;
        const int64_t b = (block - x_blocks) % grad_blocks;
        k_.pack_image(
            image_of(grad_feats[s], n0 + n), p_.C, p_.out_w, grad(n, s), b,
            b + 1);
      });
      const int64_t tasks = weight_tasks + count * input_tasks;
      std::atomic<int64_t> next{0};
      for_parts(threads, threads, [&](int64_t, int64_t) {
        const Floats buffer(input_grad_.buffer_floats());
        const Floats lane_sums(input_grad_.lane_floats());
        const Floats own_sums(at_once ? most_sums_ : 0);
        for (int64_t i; (i = next++) < tasks;) {
          if (i < weight_tasks) {
            const Unit& task = weight_tasks_[i];
            const int64_t s = task.branch;
            float* unit_sums = at_once ? own_sums.get() : sums_of(sums, task);
            if (at_once) {
              std::fill_n(unit_sums, weight_plans_[s].unit_sums, 0.0f);
            }
            for (int64_t n = 0; n < count; ++n) {
              k_.weight_grad(
                  convs_[s], weight_plans_[s], image(n), grad(n, s), task.unit,
                  unit_sums);
            }
            if (at_once) {
              finish(task, unit_sums);
            }
            continue;
          }
          const int64_t n = (i - weight_tasks) / input_tasks;
          input_grad_.run(
              (i - weight_tasks) % input_tasks, n0 + n,
              [&](int64_t s) { return grad(n, s); }, grad_x, buffer.get(),
              lane_sums.get());
        }
      });
    }
    if (!at_once) {
      for_each(weight_tasks, threads, [&](int64_t i) {
        finish(weight_tasks_[i], sums_of(sums, weight_tasks_[i]));
      });
    }
  }

 private:
  // Of a branch's weight gradient.
  struct Unit {
    int64_t branch, unit;
  };

  float* sums_of(const Floats& sums, const Unit& task) const {
    return sums.get() + first_sums_[task.branch] +
        task.unit * weight_plans_[task.branch].unit_sums;
  }

  SpcProblem p_;
  Isa isa_;
  const ConvKernels& k_;
  InputGrad input_grad_;
  bool input_;
  std::vector<Conv> convs_;
  std::vector<WeightGradPlan> weight_plans_;
  std::vector<Unit> weight_tasks_;
  std::vector<int64_t> first_sums_;  // of a branch's weight gradient
  ScratchSize x_size_, grad_size_;
  int64_t sums_ = 0, most_sums_ = 0;  // floats of all units, of one at most
  double flops_ = 0;
};

SpcBackward backward(
    at::TensorList grad_feats_, const Tensor& x_, at::TensorList weights,
    at::IntArrayRef groups, int64_t stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, c10::List<bool> output_mask) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p =
      check_spc_arguments("spc_conv_backward", x_, weights, settings);
  check_spc_backward_arguments(
      "spc_conv_backward", grad_feats_, x_, p, output_mask);
  const at::MemoryFormat format = spc_layout(x_);
  Backward native(p, weights, settings, output_mask);
  const Tensor x = is_image(x_) ? x_ : x_.contiguous(format);
  std::vector<Tensor> grad_feats, grad_weights;
  Tensor grad_x;
  for (int64_t s = 0; s < p.S; ++s) {
    const Tensor& g = grad_feats_[s];
    grad_feats.push_back(is_image(g) ? g : g.contiguous(format));
    grad_weights.push_back(
        output_mask.get(s + 1) ? at::empty_like(weights[s])
                               : at::empty({0}, weights[s].options()));
    const bool input = output_mask.get(0) && !native.input();
    const bool weight = output_mask.get(s + 1) && !native.weight(s);
    if (!input && !weight) {
      continue;
    }
    auto [gx, gw] = library_backward(
        p, grad_feats.back(), x, weights[s], settings, s, input, weight);
    if (input) {
      grad_x = grad_x.defined() ? grad_x.add_(gx) : gx;
    }
    if (weight) {
      grad_weights.back().copy_(gw);
    }
  }
  if (grad_x.defined()) {
    grad_x = settled(grad_x, p.dtype, format);
  } else {
    grad_x = output_mask.get(0)
        ? at::detail::empty_cpu(x.sizes(), p.dtype, /*pin_memory=*/false, format)
        : at::empty({0}, x.options());
  }
  if (p.N == 0) {
    for (Tensor& g : grad_weights) {
      g.zero_();
    }
  } else if (native.any()) {
    std::vector<Tensor> even;  // as the kernel can write them
    for (const Tensor& g : grad_weights) {
      const bool writable = g.dim() != 4 || evenly_spaced(g);
      even.push_back(writable ? g : at::empty(g.sizes(), g.options()));
    }
    native.run(grad_feats, x, grad_x, even);
    for (int64_t s = 0; s < p.S; ++s) {
      if (native.weight(s) && !even[s].is_same(grad_weights[s])) {
        grad_weights[s].copy_(even[s]);
      }
    }
  }
  return {std::move(grad_x), std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("spc_conv", forward);
  m.impl("spc_conv_backward", backward);
  m.impl("psa_forward", psa_forward);
}

}  // namespace epsa::cpu
