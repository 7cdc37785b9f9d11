// The convolutions of all branches, forward.
#pragma once

#include "cpu/prepack.h"

#include <functional>

namespace epsa::cpu {

// The branches that have kernels here, on all samples.
class ForwardBank {
 public:
  // prepacked: the result of prepack() for such weights, or nothing.
  ForwardBank(
      const char* op, const ConvProblem& p, at::TensorList weights, const ConvSettings& settings,
      const ConvBias& bias, const std::optional<Tensor>& prepacked = std::nullopt);

  // The packed weights with their header, for a constructor's `prepacked`. Takes the
  // constructor's weights, which it may have copied to other strides. Calls compare the
  // bytes of the weights, or, if they are `frozen`, only addresses and versions.
  Tensor prepack(at::TensorList weights, bool frozen) const;

  bool has(int64_t s) const { return plans_[s].method != ConvMethod::library; }
  bool has_any() const { return !units_.empty(); }
  bool has_all() const;

  // Sample n is complete, and the callee may use so many threads.
  using Done = std::function<void(int64_t n, int64_t threads)>;

  // Convolves all samples of x into the branches' `feats`, and writes the means of the maps to
  // `pooled` [N, S, C]. Branches without kernels here are left out. Calls `done` for each
  // sample. Where x has an infinity or NaN, it may start again, and calls `done` again for
  // samples with new maps. The results do not depend on the threads.
  void run(
      const Tensor& x, const std::vector<Images>& feats, float* pooled, const Done& done) const;

 private:
  // A piece of work: one unit, one strip of its output rows.
  struct Task {
    int branch;
    int64_t unit, strip;
  };
  struct Memory;
  struct Call;
  struct Wave;

  // Without plans. Runs in pairs if it may and all branches can.
  ForwardBank(const ConvProblem& p, std::vector<Conv> convs, bool may_pair);
  // The same convolutions without pairs, from the weights as they are.
  ForwardBank in_floats() const;

  const float* bias(int64_t s) const {
    return bias_.defined() ? bias_.const_data_ptr<float>() + s * p_.C : nullptr;
  }
  ConvPlan plan_of(int64_t s, const Packing& packing) const;
  void add_branch(int64_t s, const ConvPlan& plan);
  // run(), up to the first image that these kernels cannot compute. Returns whether there
  // was none.
  bool try_run(
      const Tensor& x, const std::vector<Images>& feats, float* pooled, const Done& done) const;
  std::vector<ConvWeights> conv_weights() const;
  int64_t image_floats() const { return size_.floats(channels_, p_.H, k_.lanes); }
  int64_t blocks() const {  // of an image's channels
    return (channels_ + k_.lanes - 1) / k_.lanes;
  }
  void means(const float* sums, float* pooled) const;

  // Orders of work, of try_run.
  bool by_sample(const Call&, int64_t count, int64_t threads, const Done&) const;
  bool shared(const Call&, int64_t first, int64_t threads, const Done&) const;
  bool by_unit(const Call&, int64_t threads, const Done&) const;

  ConvProblem p_;
  Isa isa_;
  std::vector<Conv> convs_;
  bool pairs_;        // of bfloat16 channels
  int64_t channels_;  // of x, or pairs
  const ConvKernels& k_;
  std::vector<ConvPlan> plans_;
  std::vector<Tensor> weights_;
  Tensor bias_;  // [S*C] of float, or undefined
  PrepackHeader header_;
  Tensor prepacked_;
  std::vector<int64_t> first_sums_;  // of each branch, within a sample's sums
  std::vector<Task> tasks_;          // of one sample
  std::vector<Task> units_;          // with all of their strips
  ScratchSize size_;
  int64_t sums_ = 0, buffer_ = 0, lane_floats_ = 0;  // floats
  int64_t strips_ = 0;                               // the most that a branch has
  int64_t unit_weights_ = 0, weight_floats_ = 0;     // of the largest unit, of all units
  double flops_ = 0;
};

// Computes all branches: `native` where it has a kernel, torch's convolution elsewhere.
ConvForward convolve(
    const ForwardBank& native, const ConvProblem& p, const Tensor& x, at::TensorList weights,
    const ConvSettings& settings, const ConvBias& bias);

}  // namespace epsa::cpu
