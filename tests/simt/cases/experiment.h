// One pass of a case: its tensors, its launches, and what they got wrong.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cases/field.h"

namespace epsa::cuda {

class Experiment {
 public:
  Experiment(const Case& k, Pass pass);

  const Problem& problem() const { return problem_; }

  // Sets the plan of the launches that follow.
  void take(const Plan& plan);
  // Restores all memory and returns the launch's arguments.
  Call call();
  // What the launch did wrong; "" where it did nothing wrong.
  std::string complaint();
  // The largest error so far; 1 is the limit.
  double error() const { return error_; }

 private:
  void* add(Tensor t, Dtype dtype, bool output);
  void add_maps(Tensor t, bool output, bool slots, Maps& maps);
  void set_bytes(Field& f);
  void set_problem(Pass pass);
  std::string compare(const Field& f, const std::vector<std::vector<unsigned char>>& after);

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

}  // namespace epsa::cuda
