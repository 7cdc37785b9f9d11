// The convolutions' gradients on the CPU: the operator spc_conv_backward.
#include "cpu/conv_layout.h"
#include "ops/groups.h"
#include "ops/library.h"

#include <torch/library.h>

#include <numeric>

namespace epsa::cpu {
namespace {

// torch's gradients of x and of the weight, in the accumulation type.
std::pair<Tensor, Tensor> library_backward(
    const ConvProblem& p, const Tensor& grad, const Tensor& x, const Tensor& weight,
    const ConvSettings& k, int64_t s, bool input_wanted, bool weight_wanted) {
  return library_conv_backward(
      in_acc(grad, p), in_acc(x, p), in_acc(weight, p), k, s, input_wanted, weight_wanted);
}

// How the branches' gradients of a sample lie in scratch memory.
struct GradLayout {
  const ConvKernels* k = nullptr;  // null: nobody reads them
  int64_t channels = 0;            // of a branch, or pairs
  int64_t height = 0, width = 0;
  std::vector<int64_t> lanes{};  // of each branch's blocks
  ScratchSize size{};

  GradLayout() = default;
  GradLayout(const ConvProblem& p, const ConvKernels& kernels, bool pairs)
      : k(&kernels),
        channels(pairs ? p.C / 2 : p.C),
        height(p.out_h),
        width(p.out_w),
        lanes(p.S, kernels.lanes) {
    size.width = width;
  }

  int64_t floats() const { return first(lanes.size()); }
  Scratch scratch(float* sample, int64_t s) const {
    return size.scratch(sample + first(s), height, lanes[s]);
  }

  int64_t blocks() const {
    int64_t all = 0;
    for (const int64_t n : lanes) {
      all += blocks(n);
    }
    return all;
  }
  // Packs block i of sample n. Returns what pack_image does.
  bool pack(at::TensorList grads, int64_t n, int64_t i, float* sample) const {
    int64_t s = 0;
    for (; i >= blocks(lanes[s]); ++s) {
      i -= blocks(lanes[s]);
    }
    return k->pack_image(image_of(grads[s], n), channels, width, scratch(sample, s), i, i + 1);
  }

 private:
  int64_t blocks(int64_t of) const { return (channels + of - 1) / of; }
  int64_t first(size_t branches) const {
    int64_t floats = 0;
    for (size_t s = 0; s < branches; ++s) {
      const int64_t branch = size.floats(channels, height, lanes[s]);
      floats += (branch + k->lanes - 1) / k->lanes * k->lanes;  // begins at a whole vector
    }
    return floats;
  }
};

// The weights of joined(conv), where that has other groups than conv.
Tensor joined_weights(const Tensor& w) {
  Tensor result = at::zeros({w.size(0), 2 * w.size(1), w.size(2), w.size(3)}, w.options());
  for (const int64_t half : {0, 1}) {
    result.slice(0, half, std::nullopt, 2)
        .narrow(1, half * w.size(1), w.size(1))
        .copy_(w.slice(0, half, std::nullopt, 2));
  }
  return result;
}

// The gradient of x, if every branch has a kernel for it. It is made in phases. Each phase
// convolves the branches' gradients and adds the results.
class InputGrad {
 public:
  InputGrad(
      const ConvProblem& p, at::TensorList weights, const ConvSettings& settings, Isa isa,
      bool wanted, bool may_pair)
      : p_(p),
        stride_(settings.stride),
        pairs_(wanted && may_pair && all_phases_in_pairs(convs_of(p, weights, settings), isa)),
        k_(kernels_for(p, isa, pairs_)) {
    if (!wanted || p.dtype == at::kDouble) {
      return;  // a phase without taps has no plan that could refuse float64
    }
    std::vector<Tensor> of_branches = weights.vec();
    std::vector<Conv> convs = convs_of(p, weights, settings);
    for (int64_t s = 0; pairs_ && s < p.S; ++s) {
      const int64_t groups = convs[s].groups;
      convs[s] = joined(convs[s]);
      if (convs[s].groups != groups) {
        of_branches[s] = joined_weights(weights[s]);
      }
    }
    for (const auto& [row, column] : phases()) {
      Part part{row, column};
      for (int64_t s = 0; s < p.S; ++s) {
        if (!add_branch(part, of_branches[s], convs[s], s, isa)) {
          parts_.clear();
          return;
        }
      }
      divide(part);
      parts_.push_back(std::move(part));
    }
  }

  bool possible() const { return !parts_.empty(); }
  bool pairs() const { return pairs_; }  // of bfloat16 channels

  GradLayout layout() const { return {p_, k_, pairs_}; }

  void include_in(GradLayout& grads) const {
    for (const Part& part : parts_) {
      for (size_t i = 0; i < part.convs.size(); ++i) {
        grads.size.include(part.convs[i], part.plans[i].reach);
        grads.lanes[part.branches[i]] = part.plans[i].depth;
      }
    }
  }

  void pack(int64_t threads) {
    for (Part& part : parts_) {
      std::vector<ConvWeights> weights;
      for (size_t i = 0; i < part.convs.size(); ++i) {
        weights.push_back(turned_weights_of(part.weights[i], part.convs[i]));
      }
      part.packed = pack_weights(k_, part.convs, part.plans, weights, threads);
    }
  }

  int64_t buffer_floats() const { return buffer_; }
  int64_t lane_floats() const { return lane_floats_; }
  int64_t tasks() const { return tasks_; }  // of one sample
  int64_t weight_floats() const {           // packed
    int64_t floats = 0;
    for (const Part& part : parts_) {
      floats += part.packed.floats;
    }
    return floats;
  }

  // grads(s): the scratch that holds branch s's gradient of this sample.
  template <class Grads>
  void run(
      int64_t task, int64_t n, const Grads& grads, const Tensor& grad_x, float* buffer,
      float* lane_sums) const {
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
      const Conv& conv = part.convs[b];
      for (int64_t c = 0; c < conv.ic();) {
        c = k_.method(plan.method)
                .convolve(
                    conv, plan, grads(part.branches[b]), part.packed.unit(b, plan, unit), unit, c,
                    begin, end, {buffer + first % part.range, part.row, part.pitch, /*add=*/true},
                    lane_sums);
      }
    }
    Image to = image_of(grad_x, n, range * part.range);
    to.data = static_cast<char*>(to.data) +
        ((part.first_row + begin * stride_) * to.row_stride + part.first_column * to.pixel_stride) *
            grad_x.element_size();
    to.row_stride *= stride_;
    to.pixel_stride *= stride_;
    k_.unpack(
        {buffer, part.row, part.pitch, false}, part.range, end - begin, part.columns, to,
        /*bias=*/nullptr, /*totals=*/nullptr);
  }

 private:
  // One phase. A task is a strip of its rows and a range of channels. All branches add to
  // it, so it holds whole units of each.
  struct Part {
    int64_t first_row, first_column;
    int64_t rows = 0, columns = 0;
    std::vector<int64_t> branches{};
    std::vector<Conv> convs{};
    std::vector<ConvPlan> plans{};
    std::vector<Tensor> weights{};
    Packed packed{};
    // For each range: indices of the lists above, and units.
    std::vector<std::vector<std::pair<size_t, int64_t>>> units{};
    int64_t range = 1, ranges = 0, strip = 0, strips = 0;
    int64_t pitch = 0, row = 0;  // of the strip's buffer
  };

  // The first row and column of each phase.
  std::vector<std::pair<int64_t, int64_t>> phases() const {
    std::vector<std::pair<int64_t, int64_t>> firsts;
    for (int64_t row = 0; row < std::min(stride_, p_.H); ++row) {
      for (int64_t column = 0; column < std::min(stride_, p_.W); ++column) {
        firsts.push_back({row, column});
      }
    }
    return firsts;
  }

  // Whether kernels of pairs compute all phases, and those of floats could.
  bool all_phases_in_pairs(const std::vector<Conv>& convs, Isa isa) const {
    std::vector<Conv> pairs;
    for (const auto& [row, column] : phases()) {
      for (const Conv& conv : convs) {
        const Conv floats = grad_input_phase(conv, row, column).conv;
        if (floats.taps() > 0) {
          if (plan_conv(floats, p_.dtype == at::kDouble, isa).method == ConvMethod::library) {
            return false;
          }
          pairs.push_back(grad_input_phase(joined(conv), row, column).conv);
        }
      }
    }
    return all_in_pairs(p_, pairs, isa);
  }

  // False where branch s has no kernel for this phase.
  bool add_branch(
      Part& part, const Tensor& weight, const Conv& conv, int64_t s, Isa isa) const {
    Phase phase = grad_input_phase(conv, part.first_row, part.first_column);
    part.rows = phase.conv.out_height;
    part.columns = phase.conv.out_width;
    if (phase.conv.taps() == 0) {
      return true;  // this branch adds nothing
    }
    phase.conv = counted_in(phase.conv, pairs_);
    const ConvPlan plan = plan_conv(phase.conv, p_.dtype == at::kDouble, isa);
    if (plan.method == ConvMethod::library || (stride_ > 1 && conv.dilation > 1)) {
      return false;
    }
    Tensor w = weight;
    if (stride_ > 1) {
      w = w.slice(2, phase.tap_row, std::nullopt, stride_)
              .slice(3, phase.tap_column, std::nullopt, stride_);
    }
    part.branches.push_back(s);
    part.convs.push_back(phase.conv);
    part.plans.push_back(plan);
    // Kernels of pairs would read dense pairs as items, which need not be aligned here.
    const bool dense = pairs_ && w.stride(0) == 1;
    part.weights.push_back(dense ? w.clone(at::MemoryFormat::Contiguous) : evenly(w));
    return true;
  }

  // Cuts a phase into tasks.
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
        // A unit that lacks some channels still writes all of its lanes.
        part.pitch = std::max(part.pitch, first % part.range + plan.unit_channels);
      }
      width = std::max(width, plan.buffer_width);
    }
    part.pitch = (part.pitch + lanes - 1) / lanes * lanes;
    part.row = width * part.pitch;
    constexpr int64_t kBufferFloats = 8192;
    part.strip = std::clamp<int64_t>(kBufferFloats / part.row, 1, part.rows);
    if (part.strip > 1 && part.strip < part.rows) {
      part.strip -= part.strip % 2;  // winograd computes pairs of rows
    }
    part.strips = (part.rows + part.strip - 1) / part.strip;
    for (size_t b = 0; b < part.plans.size(); ++b) {
      part.plans[b].strip = part.strip;
      lane_floats_ = std::max(
          lane_floats_, k_.method(part.plans[b].method).lane_floats(part.convs[b], part.plans[b]));
    }
    buffer_ = std::max(buffer_, part.strip * part.row);
    tasks_ += part.strips * part.ranges;
  }

  ConvProblem p_;
  int64_t stride_;
  bool pairs_;
  const ConvKernels& k_;
  std::vector<Part> parts_;
  int64_t buffer_ = 0, lane_floats_ = 0, tasks_ = 0;
};

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
        input_(input_grad_.possible()) {
    for (int64_t s = 0; s < p.S; ++s) {
      const Conv conv = conv_of(p, weights[s], settings, s);
      convs_.push_back(conv);
      weight_plans_.push_back(
          output_mask.get(s + 1) ? plan_weight_grad(conv, p.dtype == at::kDouble, isa_)
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
    if (!weight_tasks_.empty() || !in_pairs()) {
      grads_ = GradLayout(p, k_, /*pairs=*/false);
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
    int64_t weight_tasks, input_tasks;  // of one wave, of one sample
    // Samples at a time. Each thread has at least one, and the weights' sums are fetched
    // seldom. Each sum follows the samples' order, whichever threads add to it.
    int64_t wave;
    // A single wave finishes each weight's sums in its thread's own memory.
    bool at_once;
    // The weights that a task reads, rather than a sample's gradients, stay in the cache
    // from one of the input's tasks to the next.
    bool task_first;
    Floats sums, images, grads, pairs;

    Call(const Backward& b, const Tensors& given, int64_t threads_)
        : self(b), p(b.p_), k(b.k_), tensors(given), threads(threads_) {
      grad_floats = self.grads_.floats();
      pair_floats = self.pairs_.floats();
      weight_tasks = static_cast<int64_t>(self.weight_tasks_.size());
      x_blocks = weight_tasks ? (p.in_channels + k.lanes - 1) / k.lanes : 0;
      x_floats = x_blocks ? self.x_size_.floats(p.in_channels, p.H, k.lanes) : 0;
      input_tasks = self.input_ ? self.input_grad_.tasks() : 0;
      task_first = self.input_grad_.weight_floats() > kCacheFloats;
      constexpr int64_t kWaveFloats = 1 << 20;  // of packed images
      const int64_t sample_floats = x_floats + grad_floats + pair_floats;
      const int64_t each = std::max<int64_t>(1, kWaveFloats / (threads * sample_floats));
      wave = std::min(p.N, each * threads);
      at_once = wave == p.N;
      sums = Floats(at_once ? 0 : self.sums_, /*zero=*/true);
      images = Floats(wave * x_floats);
      grads = Floats(wave * grad_floats);
      pairs = Floats(wave * pair_floats);
    }

    Scratch image(int64_t n) const {  // n: within the wave
      return self.x_size_.scratch(images.get() + n * x_floats, p.H, k.lanes);
    }
    Scratch grad(int64_t n, int64_t s) const {
      return self.grads_.scratch(grads.get() + n * grad_floats, s);
    }
    Scratch input_grad(int64_t n, int64_t s) const {  // what the gradient of x reads
      return self.in_pairs() ? self.pairs_.scratch(pairs.get() + n * pair_floats, s) : grad(n, s);
    }

    // Whether the kernels can compute them.
    bool pack_images(int64_t first, int64_t count) const {
      const int64_t grad_blocks = self.grads_.blocks();
      const int64_t blocks = x_blocks + grad_blocks + self.pairs_.blocks();
      std::atomic<bool> all{true};
      for_each(count * blocks, threads, [&](int64_t i) {
        const int64_t n = i / blocks, block = i % blocks, of_grads = block - x_blocks;
        if (block < x_blocks) {
          k.pack_image(
              image_of(tensors.x, first + n), p.in_channels, p.W, image(n), block, block + 1);
        } else if (of_grads < grad_blocks) {
          self.grads_.pack(tensors.grad_feats, first + n, of_grads, grads.get() + n * grad_floats);
        } else if (!self.pairs_.pack(
                       tensors.grad_feats, first + n, of_grads - grad_blocks,
                       pairs.get() + n * pair_floats)) {
          all = false;
        }
      });
      return all;
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
      for (int64_t n = 0; n < count; ++n) {
        k.weight_grad(self.convs_[s], plan, image(n), grad(n, s), task.unit, unit_sums);
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
      k.unpack_weight_grad(
          self.convs_[s], self.weight_plans_[s], task.unit, unit_sums,
          weights_of(tensors.grad_weights[s], self.convs_[s]));
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
  std::vector<Conv> convs_;
  std::vector<WeightGradPlan> weight_plans_;
  std::vector<Unit> weight_tasks_;
  std::vector<int64_t> first_sums_;  // of each branch's weight gradient
  ScratchSize x_size_;
  GradLayout grads_, pairs_;
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
      TORCH_INTERNAL_ASSERT(in_floats.input() && in_floats.run(grad_feats, x, grad_x, even));
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
