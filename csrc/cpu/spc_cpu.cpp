// The convolutions on the CPU: plans, memory and threads around the kernels.
#include "../psa_glue.h"
#include "../spc.h"
#include "conv_kernels.h"
#include "threads.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>

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

// A weight whose taps are evenly spaced and dense, or whose channels are dense.
Tensor evenly_spaced(const Tensor& w) {
  const bool even =
      w.size(2) == 1 || w.size(3) == 1 || w.stride(2) == w.size(3) * w.stride(3);
  const int64_t tap = w.size(3) == 1 ? w.stride(2) : w.stride(3);
  return even && (tap == 1 || w.stride(1) == 1) ? w : w.contiguous();
}

ConvWeights weights_of(const Tensor& w) {
  int64_t tap = w.size(3) == 1 ? w.stride(2) : w.stride(3);
  if (w.size(2) * w.size(3) == 1) {
    tap = 1;  // never stepped
  }
  return {glue::data_of(w), w.stride(0), w.size(1) == 1 ? 1 : w.stride(1), tap};
}

// ---- a bank of convolutions that share their input ----

struct Branch {
  Conv conv;
  ConvPlan plan;
  Tensor weight;
  int64_t packed;  // where its packed weights begin
  int64_t sums;  // where its partial sums begin, of one sample
};

// A piece of work: one unit, one strip.
struct Task {
  int branch;
  int64_t unit, strip;
};

class Bank {
 public:
  Bank(
      const SpcProblem& p, at::TensorList weights, const SpcSettings& settings)
      : p_(p), isa_(isa_in_use()) {
    for (int64_t s = 0; s < p.S; ++s) {
      const Tensor& w = weights[s];
      const Conv conv{
          p.in_channels, p.C, settings.groups[s], w.size(2), w.size(3),
          settings.stride, settings.padding[s], settings.dilation[s], p.H, p.W};
      Branch b{
          conv, plan_conv(conv, p.dtype == at::kDouble, isa_), w, packed_, sums_};
      if (b.plan.method != ConvMethod::library) {
        b.weight = evenly_spaced(w);
        const int64_t strips = b.plan.strips(p.out_h);
        packed_ += b.plan.units * b.plan.unit_weights;
        sums_ += strips * p.C;
        buffer_ = std::max(buffer_, kernels().buffer_floats(b.plan));
        border_ = std::max(border_, conv.padding);
        flops_ += 2.0 * p.C * conv.ic() * conv.taps() * p.out_h * p.out_w;
        for (int64_t unit = 0; unit < b.plan.units; ++unit) {
          for (int64_t strip = 0; strip < strips; ++strip) {
            tasks_.push_back({static_cast<int>(s), unit, strip});
          }
        }
      }
      branches_.push_back(std::move(b));
    }
    if (tasks_.empty()) {
      return;
    }
    // Rows are as wide as the widest branch reads, and an odd number of lines:
    // at a multiple of a page the kernel's rows would fall into the same sets of
    // the cache.
    width_ = border_ + p.W;
    int64_t beyond = 0;  // pixels that the last row's last tile reads too many
    for (const Branch& b : branches_) {
      if (b.plan.method != ConvMethod::library) {
        const Conv& c = b.conv;
        const int64_t left = border_ - c.padding;
        const int64_t reach = c.dilation * (c.kernel_w - 1) + 1;
        width_ = std::max(width_, left + (p.out_w - 1) * c.stride + reach);
        beyond = std::max(beyond, (b.plan.buffer_width - p.out_w) * c.stride);
      }
    }
    width_ |= 1;
    blocks_ = (p.in_channels + lanes() - 1) / lanes();
    scratch_ = (blocks_ * p.H * width_ + beyond) * lanes();
    weights_ = Floats(packed_);
  }

  const ConvKernels& kernels() const {
    static_assert(static_cast<int>(Dtype::f32) == 0);
    return conv_kernels(
        p_.dtype == at::kDouble ? Dtype::f32 : glue::dtype_of<Dtype>(p_.dtype),
        isa_);
  }

  // Convolves all samples of x into `feats` and writes the means of the maps to
  // `pooled` [N, S, C], both for the branches that have kernels here. done(n)
  // follows when sample n is complete.
  template <class Done>
  void run(
      const Tensor& x, const std::vector<Tensor>& feats, float* pooled,
      const Done& done) const {
    if (tasks_.empty() || p_.N == 0) {
      for (int64_t n = 0; n < p_.N; ++n) {
        done(n);
      }
      return;
    }
    const int64_t threads =
        flops_ * static_cast<double>(p_.N) < kSerialFlops ? 1 : usable_threads();
    pack_weights(threads);
    // Samples are dealt out whole; those that do not divide by the number of
    // threads are shared. Who computes what does not touch the results.
    const int64_t whole = p_.N - p_.N % threads;
    parallel_or_serial(whole, threads, [&](int64_t begin, int64_t end) {
      const Worker worker(*this);
      const Floats image(scratch_, /*zero=*/true);
      const Floats sums(sums_);
      for (int64_t n = begin; n < end; ++n) {
        pack_image(x, n, image.get(), 0, blocks_);
        for (const Task& task : tasks_) {
          worker.run(task, feats, n, image.get(), sums.get());
        }
        finish(sums.get(), pooled + n * p_.S * p_.C);
        done(n);
      }
    });
    const int64_t rest = p_.N - whole;
    if (rest == 0) {
      return;
    }
    const int64_t tasks = static_cast<int64_t>(tasks_.size());
    const Floats images(rest * scratch_, /*zero=*/true);
    const Floats sums(rest * sums_);
    for_each(rest * blocks_, threads, [&](int64_t i) {
      const int64_t n = i / blocks_, block = i % blocks_;
      pack_image(x, whole + n, images.get() + n * scratch_, block, block + 1);
    });
    std::atomic<int64_t> next{0};
    parallel_or_serial(threads, threads, [&](int64_t, int64_t) {
      const Worker worker(*this);
      for (int64_t i; (i = next++) < rest * tasks;) {
        const int64_t n = i / tasks;
        worker.run(
            tasks_[i % tasks], feats, whole + n, images.get() + n * scratch_,
            sums.get() + n * sums_);
      }
    });
    for (int64_t n = 0; n < rest; ++n) {
      finish(sums.get() + n * sums_, pooled + (whole + n) * p_.S * p_.C);
      done(whole + n);
    }
  }

  const std::vector<Branch>& branches() const { return branches_; }

 private:
  // Below this another thread costs more than it saves.
  static constexpr double kSerialFlops = 1e6;

  int64_t lanes() const { return kernels().lanes; }

  template <class F>
  static void parallel_or_serial(
      int64_t count, int64_t threads, const F& f) {
    if (threads == 1) {
      f(0, count);
    } else {
      parallel_for(0, count, 1, f);
    }
  }

  void pack_weights(int64_t threads) const {
    std::vector<std::pair<int, int64_t>> units;
    for (size_t s = 0; s < branches_.size(); ++s) {
      for (int64_t u = 0; u < branches_[s].plan.units; ++u) {
        units.push_back({static_cast<int>(s), u});
      }
    }
    for_each(units.size(), threads, [&](int64_t i) {
      const auto [s, unit] = units[i];
      const Branch& b = branches_[s];
      kernels().pack_weights(
          b.conv, b.plan, weights_of(b.weight), unit, packed(b, unit));
    });
  }

  float* packed(const Branch& b, int64_t unit) const {
    return weights_.get() + b.packed + unit * b.plan.unit_weights;
  }

  void pack_image(
      const Tensor& x, int64_t n, float* image, int64_t begin,
      int64_t end) const {
    kernels().pack_image(
        image_of(x, n), p_.in_channels, p_.W, scratch(image), begin, end);
  }

  Scratch scratch(float* image) const {
    return {image, p_.H, width_, border_};
  }

  // partial sums of one sample -> means [S, C], in the order of the strips
  void finish(const float* sums, float* pooled) const {
    const float pixels = static_cast<float>(p_.out_h * p_.out_w);
    for (size_t s = 0; s < branches_.size(); ++s) {
      const Branch& b = branches_[s];
      if (b.plan.method == ConvMethod::library) {
        continue;
      }
      float* mean = pooled + s * p_.C;
      std::fill_n(mean, p_.C, 0.0f);
      for (int64_t strip = 0; strip < b.plan.strips(p_.out_h); ++strip) {
        const float* part = sums + b.sums + strip * p_.C;
        for (int64_t c = 0; c < p_.C; ++c) {
          mean[c] += part[c];
        }
      }
      for (int64_t c = 0; c < p_.C; ++c) {
        mean[c] /= pixels;
      }
    }
  }

  // A thread's own memory.
  class Worker {
   public:
    explicit Worker(const Bank& bank) : bank_(bank), buffer_(bank.buffer_) {}

    void run(
        const Task& task, const std::vector<Tensor>& feats, int64_t n,
        float* image, float* sums) const {
      const Branch& b = bank_.branches_[task.branch];
      const SpcProblem& p = bank_.p_;
      const ConvKernels& k = bank_.kernels();
      const int64_t begin = task.strip * b.plan.strip;
      const int64_t end = std::min(begin + b.plan.strip, p.out_h);
      k.convolve(
          b.conv, b.plan, bank_.scratch(image), bank_.packed(b, task.unit),
          task.unit, begin, end, buffer_.get());
      const Run run = unit_run(b.conv, b.plan, task.unit);
      const Tensor& feat = feats[task.branch];
      Image to = image_of(feat, n, run.first);
      to.data = static_cast<char*>(to.data) +
          begin * to.row_stride * feat.element_size();
      k.unpack(
          buffer_.get(), b.plan, run.count, end - begin, p.out_w, to,
          sums + b.sums + task.strip * p.C + run.first);
    }

   private:
    const Bank& bank_;
    Floats buffer_;
  };

  SpcProblem p_;
  Isa isa_;
  std::vector<Branch> branches_;
  std::vector<Task> tasks_;
  Floats weights_;
  int64_t packed_ = 0, sums_ = 0, buffer_ = 0;  // floats
  int64_t border_ = 0, width_ = 0, blocks_ = 0, scratch_ = 0;
  double flops_ = 0;  // of one sample
};

// ---- forward ----

SpcForward forward(
    const Tensor& x_, at::TensorList weights, at::IntArrayRef groups,
    int64_t stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p = check_spc_arguments("spc_conv", x_, weights, settings);
  const at::MemoryFormat format = spc_layout(x_);
  Tensor pooled = at::detail::empty_cpu(
      {p.N, p.S, p.C}, p.acc, /*pin_memory=*/false, at::MemoryFormat::Contiguous);
  const Bank bank(p, weights, settings);
  const Tensor x = is_image(x_) ? x_ : x_.contiguous(format);
  std::vector<Tensor> feats;
  for (int64_t s = 0; s < p.S; ++s) {
    if (bank.branches()[s].plan.method != ConvMethod::library) {
      feats.push_back(at::detail::empty_cpu(
          {p.N, p.C, p.out_h, p.out_w}, p.dtype, /*pin_memory=*/false, format));
      continue;
    }
    Tensor f = at::convolution(
        x, weights[s], std::nullopt, {stride, stride}, {padding[s], padding[s]},
        {dilation[s], dilation[s]}, /*transposed=*/false,
        /*output_padding=*/{0, 0}, groups[s]);
    feats.push_back(f.contiguous(format));
    pooled.select(1, s).copy_(at::mean(f, {2, 3}, false, p.acc));
  }
  if (p.acc == at::kFloat) {
    bank.run(x, feats, pooled.mutable_data_ptr<float>(), [](int64_t) {});
  }
  return {std::move(feats), std::move(pooled)};
}

// ---- backward ----

SpcBackward backward(
    at::TensorList grad_feats, const Tensor& x, at::TensorList weights,
    at::IntArrayRef groups, int64_t stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, c10::List<bool> output_mask) {
  const SpcSettings settings{groups, stride, padding, dilation};
  const SpcProblem p =
      check_spc_arguments("spc_conv_backward", x, weights, settings);
  check_spc_backward_arguments(
      "spc_conv_backward", grad_feats, x, p, output_mask);
  const at::MemoryFormat format = spc_layout(x);
  Tensor grad_x;
  std::vector<Tensor> grad_weights;
  for (int64_t s = 0; s < p.S; ++s) {
    const bool weight_wanted = output_mask.get(s + 1);
    auto [gx, gw, gb] = at::convolution_backward(
        grad_feats[s], x, weights[s], std::nullopt, {stride, stride},
        {padding[s], padding[s]}, {dilation[s], dilation[s]},
        /*transposed=*/false, /*output_padding=*/{0, 0}, groups[s],
        {output_mask.get(0), weight_wanted, false});
    if (gx.defined()) {
      grad_x = grad_x.defined() ? grad_x.add_(gx) : gx.contiguous(format);
    }
    grad_weights.push_back(
        weight_wanted ? gw.contiguous() : at::empty({0}, weights[s].options()));
  }
  if (!grad_x.defined()) {
    grad_x = at::empty({0}, x.options());
  }
  return {std::move(grad_x), std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("spc_conv", forward);
  m.impl("spc_conv_backward", backward);
}

}  // namespace epsa::cpu
