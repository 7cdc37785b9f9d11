// The convolutions' gradients on the CPU: the operator spc_conv_backward.
#include "cpu/conv_input_grad.h"
#include "ops/groups.h"
#include "ops/library.h"

#include <torch/library.h>

namespace epsa::cpu {
namespace {

// torch's gradients of x and of the weight, in the accumulation type.
std::pair<Tensor, Tensor> library_backward(
    const ConvProblem& p, const Tensor& grad, const Tensor& x, const Tensor& weight,
    const ConvSettings& k, int64_t s, bool input_wanted, bool weight_wanted) {
  return library_conv_backward(
      in_acc(grad, p), in_acc(x, p), in_acc(weight, p), k, s, input_wanted, weight_wanted);
}

// The gradients that have kernels here: of x, if all branches have one, and of each weight
// that has one.
class Backward {
 public:
  Backward(
      const ConvProblem& p, at::TensorList weights, const ConvSettings& settings,
      const c10::List<bool>& output_mask, bool may_pair = true)
      : p_(p),
        isa_(isa_in_use()),
        k_(kernels_for(p, isa_)),
        input_grad_(p, weights, settings, isa_, output_mask.get(0), may_pair),
        input_(input_grad_.possible()),
        convs_(convs_of(p, weights, settings)) {
    plan_weights(output_mask, may_pair && p.dtype == at::kBFloat16);
    for (int64_t s = 0; s < p.S; ++s) {
      const Conv& conv = convs_[s];
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
    const bool weight_reads_floats = !weight_tasks_.empty() && !matrix_ && !pixels_;
    if (weight_reads_floats || (input_ && !in_pairs())) {
      grads_ = GradLayout(p, k_, /*pairs=*/false);
    }
    if (pixels_) {
      pixel_grads_ = GradLayout(p, *pixels_);
    }
    if (in_pairs()) {
      pairs_ = input_grad_.layout();
    }
    if (input_) {
      input_grad_.include_in(in_pairs() ? pairs_ : grads_);
    }
  }

  bool input() const { return input_; }
  bool weight(int64_t s) const { return !weight_plans_[s].library; }
  bool any() const { return input_ || !weight_tasks_.empty(); }
  // Whether the same gradients have kernels here.
  bool same_kernels_as(const Backward& other) const {
    bool same = input_ == other.input_;
    for (int64_t s = 0; s < p_.S; ++s) {
      same = same && weight(s) == other.weight(s);
    }
    return same;
  }

  // Returns whether the kernels could: those of pairs cannot where a gradient has an
  // infinity or NaN. Others can, where may_pair is false.
  bool run(
      at::TensorList grad_feats, const Tensor& x, const Tensor& grad_x,
      const std::vector<Tensor>& grad_weights) {
    const int64_t threads = threads_for(flops_);
    if (input_) {
      input_grad_.pack(threads);
    }
    const Call call(*this, {grad_feats, x, grad_x, grad_weights}, threads);
    for (int64_t n = 0; n < p_.N; n += call.wave) {
      const int64_t count = std::min(call.wave, p_.N - n);
      if (!call.pack_images(n, count)) {
        return false;
      }
      call.compute(n, count);
    }
    if (!call.at_once) {
      call.finish_weights();
    }
    return true;
  }

 private:
  bool in_pairs() const { return input_ && input_grad_.pairs(); }

  // By matrix if it can compute all gradients of weights that are wanted: they share x.
  // Where there is no AMX, pairs of pixels compute those that have kernels.
  void plan_weights(const c10::List<bool>& output_mask, bool may_pair) {
    const auto plan_all = [&](auto plan) {
      weight_plans_.assign(convs_.size(), {});
      for (size_t s = 0; s < convs_.size(); ++s) {
        if (output_mask.get(s + 1)) {
          weight_plans_[s] = plan(convs_[s]);
        }
      }
    };
    plan_all(
        [&](const Conv& c) { return may_pair ? plan_matrix_grad(c, isa_) : WeightGradPlan(); });
    std::vector<int64_t> branches;
    bool all = true;
    for (size_t s = 0; s < convs_.size(); ++s) {
      if (output_mask.get(s + 1)) {
        branches.push_back(static_cast<int64_t>(s));
        all = all && weight_plans_[s].matrix;
      }
    }
    matrix_ = all && !branches.empty();
    if (matrix_) {
      planes_ = GradPlanes(p_, matrix_grad_kernels(isa_), convs_, std::move(branches));
    } else {
      plan_all([&](const Conv& c) { return plan_weight_grad(c, p_.dtype == at::kDouble, isa_); });
      const bool any = std::any_of(
          weight_plans_.begin(), weight_plans_.end(),
          [](const WeightGradPlan& plan) { return !plan.library; });
      if (any && may_pair && isa_ == Isa::avx512_bf16) {
        pixels_ = &pixel_pair_kernels(isa_);
      }
    }
  }

  // A piece of work on a branch's weight gradient.
  struct Unit {
    int64_t branch, unit;
  };

  struct Tensors {
    at::TensorList grad_feats;
    const Tensor& x;
    const Tensor& grad_x;
    const std::vector<Tensor>& grad_weights;
  };

  // A thread's scratch memory.
  struct Memory {
    Floats buffer, lanes;  // of the gradient of x
    Floats sums;           // of one unit of a weight's gradient
  };

  // One call's arguments, memory and steps.
  struct Call {
    const Backward& self;
    const ConvProblem& p;
    const ConvKernels& k;
    Tensors tensors;
    int64_t threads;
    int64_t x_blocks, x_floats;         // blocks of channels of one image, packed floats
    int64_t grad_floats, pair_floats;   // of one sample's gradients
    int64_t pixel_floats;               // of those in pairs of pixels
    int64_t plane_floats;               // of those that matrix reads
    int64_t weight_tasks, input_tasks;  // of one wave, of one sample
    // Samples at a time. Each thread has at least one, and the weights' sums are fetched
    // seldom. Each sum follows the samples' order, whichever threads add to it.
    int64_t wave;
    // A single wave finishes each weight's sums in its thread's own memory.
    bool at_once;
    // The weights that a task reads, rather than a sample's gradients, stay in the cache
    // from one of the input's tasks to the next.
    bool task_first;
    Floats sums, images, grads, pairs, pixels, planes;

    Call(const Backward& b, const Tensors& given, int64_t threads_)
        : self(b), p(b.p_), k(b.k_), tensors(given), threads(threads_) {
      grad_floats = self.grads_.floats();
      pair_floats = self.pairs_.floats();
      pixel_floats = self.pixel_grads_.floats();
      weight_tasks = static_cast<int64_t>(self.weight_tasks_.size());
      x_blocks = weight_tasks ? (p.in_channels + k.lanes - 1) / k.lanes : 0;
      x_floats = !x_blocks ? 0
          : self.matrix_   ? self.planes_.runs.x_floats(p.in_channels, k.lanes)
                           : self.x_size_.floats(p.in_channels, p.H, k.lanes);
      plane_floats = self.planes_.floats();
      input_tasks = self.input_ ? self.input_grad_.tasks() : 0;
      task_first = self.input_grad_.weight_floats() > kCacheFloats;
      constexpr int64_t kWaveFloats = 1 << 20;  // of packed images
      const int64_t sample_floats =
          x_floats + grad_floats + pair_floats + pixel_floats + plane_floats;
      const int64_t each = std::max<int64_t>(1, kWaveFloats / (threads * sample_floats));
      wave = std::min(p.N, each * threads);
      at_once = wave == p.N;
      sums = Floats(at_once ? 0 : self.sums_, /*zero=*/true);
      images = Floats(wave * x_floats);
      grads = Floats(wave * grad_floats);
      pairs = Floats(wave * pair_floats);
      pixels = Floats(wave * pixel_floats);
      planes = Floats(wave * plane_floats);
    }

    Scratch image(int64_t n) const {  // n: within the wave
      return self.x_size_.scratch(images.get() + n * x_floats, p.H, k.lanes);
    }
    Scratch grad(int64_t n, int64_t s) const {
      return self.grads_.scratch(grads.get() + n * grad_floats, s);
    }
    Scratch weight_grad(int64_t n, int64_t s) const {  // what a weight's gradient reads
      return self.pixels_ ? self.pixel_grads_.scratch(pixels.get() + n * pixel_floats, s)
                          : grad(n, s);
    }
    Scratch input_grad(int64_t n, int64_t s) const {  // what the gradient of x reads
      return self.in_pairs() ? self.pairs_.scratch(pairs.get() + n * pair_floats, s) : grad(n, s);
    }

    // Whether the kernels can compute them.
    bool pack_images(int64_t first, int64_t count) const {
      const int64_t blocks = x_blocks + self.grads_.blocks() + self.pairs_.blocks() +
          self.pixel_grads_.blocks() + self.planes_.blocks();
      std::atomic<bool> all{true};
      for_each(count * blocks, threads, [&](int64_t i) {
        const int64_t n = i / blocks;
        if (!pack_block(n, first + n, i % blocks)) {
          all = false;
        }
      });
      return all;
    }

    // Packs a block of sample n of the wave. Blocks are those of x and of each layout.
    bool pack_block(int64_t n, int64_t sample, int64_t block) const {
      if (block < x_blocks) {
        return pack_x(n, sample, block);
      }
      block -= x_blocks;
      const auto pack = [&](const auto& layout, float* to) {
        return layout.pack(tensors.grad_feats, sample, block, to);
      };
      if (block < self.grads_.blocks()) {
        return pack(self.grads_, grads.get() + n * grad_floats);
      }
      block -= self.grads_.blocks();
      if (block < self.pairs_.blocks()) {
        return pack(self.pairs_, pairs.get() + n * pair_floats);
      }
      block -= self.pairs_.blocks();
      if (block < self.pixel_grads_.blocks()) {
        return pack(self.pixel_grads_, pixels.get() + n * pixel_floats);
      }
      block -= self.pixel_grads_.blocks();
      return pack(self.planes_, planes.get() + n * plane_floats);
    }

    bool pack_x(int64_t n, int64_t sample, int64_t block) const {
      const Image x = image_of(tensors.x, sample);
      if (self.matrix_) {
        return self.planes_.k->pack_x(
            x, p.in_channels, p.H, p.W, self.planes_.runs, block, block + 1,
            images.get() + n * x_floats);
      }
      if (self.pixels_) {
        const int64_t stride = self.convs_[0].stride;  // of all branches
        return self.pixels_->pack_x(x, p.in_channels, p.W, stride, image(n), block, block + 1);
      }
      return k.pack_image(x, p.in_channels, p.W, image(n), block, block + 1);
    }

    void compute(int64_t first, int64_t count) const {
      const auto memory = [&] {
        return Memory{
            Floats(self.input_grad_.buffer_floats()), Floats(self.input_grad_.lane_floats()),
            Floats(at_once ? self.most_sums_ : 0)};
      };
      for_each_with(
          weight_tasks + count * input_tasks, threads, memory, [&](int64_t i, const Memory& own) {
            if (i < weight_tasks) {
              weight_task(self.weight_tasks_[i], count, own);
            } else {
              input_task(i - weight_tasks, first, count, own);
            }
          });
    }

    void weight_task(const Unit& task, int64_t count, const Memory& own) const {
      const int64_t s = task.branch;
      const WeightGradPlan& plan = self.weight_plans_[s];
      float* unit_sums = at_once ? own.sums.get() : sums_of(task);
      if (at_once) {
        std::fill_n(unit_sums, plan.unit_sums, 0.0f);
      }
      if (self.matrix_) {
        self.planes_.k->multiply(
            self.convs_[s], self.planes_.runs, images.get(), x_floats,
            planes.get() + self.planes_.first_of(s), plane_floats, count, task.unit, unit_sums);
      } else {
        const auto add = self.pixels_ ? self.pixels_->weight_grad : k.weight_grad;
        for (int64_t n = 0; n < count; ++n) {
          add(self.convs_[s], plan, image(n), weight_grad(n, s), task.unit, unit_sums);
        }
      }
      if (at_once) {
        finish(task, unit_sums);
      }
    }

    void input_task(int64_t i, int64_t first, int64_t count, const Memory& own) const {
      const int64_t n = task_first ? i % count : i / input_tasks;
      const int64_t task = task_first ? i / count : i % input_tasks;
      self.input_grad_.run(
          task, first + n, [&](int64_t s) { return input_grad(n, s); }, tensors.grad_x,
          own.buffer.get(), own.lanes.get());
    }

    float* sums_of(const Unit& task) const {
      return sums.get() + self.first_sums_[task.branch] +
          task.unit * self.weight_plans_[task.branch].unit_sums;
    }

    void finish(const Unit& task, const float* unit_sums) const {
      const int64_t s = task.branch;
      const ConvWeights to = weights_of(tensors.grad_weights[s], self.convs_[s]);
      if (self.matrix_) {
        self.planes_.k->unpack(self.convs_[s], task.unit, unit_sums, to);
      } else {
        const auto unpack = self.pixels_ ? self.pixels_->unpack_weight_grad : k.unpack_weight_grad;
        unpack(self.convs_[s], self.weight_plans_[s], task.unit, unit_sums, to);
      }
    }

    void finish_weights() const {
      for_each(weight_tasks, threads, [&](int64_t i) {
        const Unit& task = self.weight_tasks_[i];
        finish(task, sums_of(task));
      });
    }
  };

  ConvProblem p_;
  Isa isa_;
  const ConvKernels& k_;
  InputGrad input_grad_;
  bool input_;
  bool matrix_ = false;                       // whether the weights' gradients are by matrix
  const PixelPairKernels* pixels_ = nullptr;  // null: they are not by pairs of pixels
  std::vector<Conv> convs_;
  std::vector<WeightGradPlan> weight_plans_;
  std::vector<Unit> weight_tasks_;
  std::vector<int64_t> first_sums_;  // of each branch's weight gradient
  ScratchSize x_size_;
  GradLayout grads_, pairs_, pixel_grads_;
  GradPlanes planes_;
  int64_t sums_ = 0, most_sums_ = 0;  // floats of all units, of the largest unit
  double flops_ = 0;
};

}  // namespace

ConvBackward conv_backward(
    at::TensorList grad_feats_, const Tensor& x_, at::TensorList weights,
    const ConvSettings& settings, c10::List<bool> output_mask) {
  const ConvProblem p = check_conv_arguments("spc_conv_backward", x_, weights, settings);
  check_conv_backward_arguments("spc_conv_backward", grad_feats_, x_, p, output_mask);
  const at::MemoryFormat format = conv_layout(x_);
  Backward native(p, weights, settings, output_mask);
  const Tensor x = is_image(x_) ? x_ : x_.contiguous(format);
  std::vector<Tensor> grad_feats, grad_weights;
  Tensor grad_x;
  for (int64_t s = 0; s < p.S; ++s) {
    const Tensor& g = grad_feats_[s];
    grad_feats.push_back(is_image(g) ? g : g.contiguous(format));
    grad_weights.push_back(
        output_mask.get(s + 1) ? at::empty_like(weights[s]) : at::empty({0}, weights[s].options()));
    const bool input = output_mask.get(0) && !native.input();
    const bool weight = output_mask.get(s + 1) && !native.weight(s);
    if (!input && !weight) {
      continue;
    }
    auto [gx, gw] =
        library_backward(p, grad_feats.back(), x, weights[s], settings, s, input, weight);
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
    std::vector<Tensor> even;  // in strides that the kernels can write
    for (const Tensor& g : grad_weights) {
      const bool writable = g.dim() != 4 || evenly_spaced(g);
      even.push_back(writable ? g : at::empty(g.sizes(), g.options()));
    }
    if (!native.run(grad_feats, x, grad_x, even)) {
      Backward in_floats(p, weights, settings, output_mask, /*may_pair=*/false);
      TORCH_INTERNAL_ASSERT(in_floats.same_kernels_as(native));
      in_floats.run(grad_feats, x, grad_x, even);
    }
    for (int64_t s = 0; s < p.S; ++s) {
      if (native.weight(s) && !even[s].is_same(grad_weights[s])) {
        grad_weights[s].copy_(even[s]);
      }
    }
  }
  return {std::move(grad_x), std::move(grad_weights)};
}

TORCH_LIBRARY_IMPL(epsa_fused, CPU, m) {
  m.impl("spc_conv_backward", flat<conv_backward>());
}

}  // namespace epsa::cpu
