// The gradient of the convolutions' input on the CPU.
#pragma once

#include "cpu/conv_grad_layout.h"

#include <numeric>

namespace epsa::cpu {

// The weights of joined(conv), where that has other groups than conv.
inline Tensor joined_weights(const Tensor& w) {
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
  bool add_branch(Part& part, const Tensor& weight, const Conv& conv, int64_t s, Isa isa) const {
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

}  // namespace epsa::cpu
