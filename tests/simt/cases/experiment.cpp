#include "cases/experiment.h"

#include <cmath>
#include <cstdio>

#include "cases/elements.h"

namespace epsa::cuda {

Experiment::Experiment(const Case& k, Pass pass) : case_(k), values_(make_inputs(k)) {
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
    params_.scale = add(kScale, k.acc(), false);
    params_.shift = add(kShift, k.acc(), false);
    params_.reversed = k.reversed;
    params_.relu = k.relu;
  } else {
    if (k.grad_out) {
      add_maps(kGradOut, false, true, params_.grad_out);
    }
    params_.grad_attention = add(kGradAttention, k.acc(), false);
    add_maps(kGradFeats, true, false, params_.grad_feats);
    void** const grads[] = {
        &params_.grad_fc1, &params_.grad_fc1_bias, &params_.grad_fc2, &params_.grad_fc2_bias};
    for (int i = 0; i < 4; ++i) {
      if (k.weights_mask >> i & 1) {
        *grads[i] = add(Tensor(kGradFc1 + i), k.weights(), true);
        problem_.weights_wanted |= *grads[i] != nullptr;
      }
    }
  }
  set_problem(pass);
}

void Experiment::set_problem(Pass pass) {
  const Case& k = case_;
  problem_.pass = pass;
  problem_.samples = k.N;
  problem_.branches = k.S;
  problem_.channels = k.C;
  problem_.pixels = k.M;
  problem_.hidden = k.r;
  problem_.shared = k.shared;
  problem_.dtype = k.dtype;
  problem_.layout = k.layout;
  problem_.aligned = may_align(k.dtype, k.layout, k.C, k.M) && aligned(k, params_.feats) &&
      aligned(k, params_.out) && aligned(k, params_.grad_out) && aligned(k, params_.grad_feats);
  problem_.pooled_given = pass == Pass::forward && k.pooled_given;
  problem_.epilogue = pass == Pass::forward && (k.affine || k.relu);
  problem_.grad_out_given = k.grad_out;
  problem_.feats_wanted = (k.feats_mask & ((1u << k.S) - 1)) != 0;
}

void Experiment::take(const Plan& plan) {
  plan_ = plan;
  const Workspace w = workspace(problem_, plan);
  workspace_ = std::make_unique<Buffer>(w.bytes);
  // The kernel reads these counters, whatever they hold. No other part of the workspace may be
  // read before it is written; compute-sanitizer looks for that.
  const std::vector<unsigned char> anything(w.partial - w.groups_arrived, 0xa5);
  if (!anything.empty()) {
    copy(
        static_cast<unsigned char*>(workspace_->data()) + w.groups_arrived, anything.data(),
        anything.size());
  }
  first_.clear();
}

Call Experiment::call() {
  for (const Field& f : fields_) {
    for (const Buffer& b : f.buffers) {
      b.upload();
    }
  }
  return {problem_, plan_, params_, workspace_->data()};
}

std::string Experiment::complaint() {
  std::vector<unsigned char> results;
  for (const Field& f : fields_) {
    std::vector<std::vector<unsigned char>> after;
    for (const Buffer& b : f.buffers) {
      after.push_back(b.download());
      if (b.spoilt(after.back())) {
        return std::string("wrote to ") + kNames[f.tensor] +
            (f.output ? ", outside of its elements" : ", an input");
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

void* Experiment::add(Tensor t, Dtype dtype, bool output) {
  if (values_[t].empty()) {
    return nullptr;
  }
  fields_.push_back(dense(t, dtype, output, values_[t].size()));
  set_bytes(fields_.back());
  return fields_.back().data(0, 0);
}

void Experiment::add_maps(Tensor t, bool output, bool slots, Maps& maps) {
  fields_.push_back(fields_of_maps(case_, t, output, slots, maps));
  set_bytes(fields_.back());
}

void Experiment::set_bytes(Field& f) {
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

// A result is computed in the accumulation type and rounded once to its own. The
// limit of its error has two parts: half a unit in the last place of the largest
// entry, and 8 epsilons of the accumulation type times the size that the largest
// entry would have if no terms cancelled. The worst case seen needs 1 epsilon.
std::string Experiment::compare(
    const Field& f, const std::vector<std::vector<unsigned char>>& after) {
  const Numbers& expected = values_[f.tensor];
  double largest = 0, size = 0;
  for (const Number& x : expected) {
    largest = std::max(largest, std::fabs(x.value));
    size = std::max(size, x.size);
  }
  // The units of f16 are no smaller than those of its smallest normal number.
  const double least = f.dtype == Dtype::f16 ? std::ldexp(1, -14) : 0;
  const double limit = unit(f.dtype) * std::max(largest, least) + 8 * 2 * unit(case_.acc()) * size;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (f.buffer[i] < 0) {
      continue;
    }
    const double x = decode(f.dtype, &after[f.buffer[i]][f.index[i] * f.bytes()]);
    const double error = std::fabs(x - expected[i].value);
    if (!(error <= limit)) {
      char text[200];
      std::snprintf(
          text, sizeof text, "wrong result: %s[%zu] is %g, expected %g", kNames[f.tensor], i, x,
          expected[i].value);
      return text;
    }
    error_ = std::max(error_, limit > 0 ? error / limit : 0);
  }
  return "";
}

}  // namespace epsa::cuda
