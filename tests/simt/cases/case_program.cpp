// Runs the CUDA kernels over a table of small problems through launch.h and
// compares them with a plain reference in double. It needs no torch.
//
// With EPSA_EMULATED, a C++ compiler builds it against emulated_launch.cpp. For a
// GPU, nvcc builds it against csrc/cuda/launch.cu.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cases/experiment.h"
#include "test_plans.h"

namespace epsa::cuda {
namespace {

// The emulator's order of blocks and threads (emulated_launch.h). A GPU has its own
// order, and simply runs all launches again.
struct Schedule {
  uint64_t seed;
  int max_resident;
};

struct Options {
  std::vector<std::string> names;   // parts of names; none: all
  std::vector<std::string> dtypes;  // as in names; none: all
  std::vector<std::string> modes;   // none: all
  uint64_t seed = 1;
  int part = 0, parts = 1;  // of the cases, every parts-th one, from this one on
  bool quick = false;
  bool list = false;
};

std::vector<Schedule> schedules(const Options& options) {
  // One resident block must be enough. Random orders have many blocks or few.
  std::vector<Schedule> all = {{0, 1}, {options.seed, 0}};
  if (!options.quick) {
    all.push_back({0, 0});
    for (uint64_t i = 1; i < 8; ++i) {
      all.push_back({options.seed + i, static_cast<int>(i % 4)});
    }
  }
  return all;
}

// Must the device admit a plan? Only clusters may be missing, on devices before 9.0.
bool must_run(const Plan& plan) {
  return plan.cluster == 1 || device().compute_capability >= 90;
}

// The plans of a mode that the device admits. Admission also prepares a kernel: no other may start.
std::vector<Plan> plans_of(const Problem& problem, const std::string& mode) {
  std::vector<Plan> admitted;
  if (mode == "plans") {
    for (const Candidate& candidate : admitted_plans(problem, device())) {
      admitted.push_back(candidate.plan);
    }
  } else {
    Plan plan = mode == "auto" ? choose_plan(problem, 0) : test_plan(problem, mode);
    if (admit(problem, plan, device()) > 0) {
      admitted.push_back(plan);
    } else if (must_run(plan)) {
      throw std::runtime_error("not admitted: " + describe(plan));
    }
  }
  return admitted;
}

// Calls run(complain) for each schedule; complain(experiment) throws where a result is wrong.
template <class Run>
void for_schedules(const Options& options, const Run& run) {
  for (const Schedule& schedule : schedules(options)) {
    setenv("EPSA_SIMT_SEED", std::to_string(schedule.seed).c_str(), 1);
    setenv("EPSA_SIMT_RESIDENT", std::to_string(schedule.max_resident).c_str(), 1);
    run([&](Experiment& e) {
      if (const std::string wrong = e.complaint(); !wrong.empty()) {
        throw std::runtime_error(
            wrong + " (seed " + std::to_string(schedule.seed) + ", resident " +
            std::to_string(schedule.max_resident) + ")");
      }
    });
  }
}

void run_together(const std::vector<Experiment*>& experiments, const Options& options) {
  for_schedules(options, [&](const auto& complain) {
    std::vector<Call> calls;
    for (Experiment* e : experiments) {
      calls.push_back(e->call());
    }
    launch_together(calls);
    for (Experiment* e : experiments) {
      complain(*e);
    }
  });
}

// All plans of a mode.
double run_alone(const Case& k, Pass pass, const std::string& mode, const Options& options) {
  Experiment experiment(k, pass);
  for (const Plan& plan : plans_of(experiment.problem(), mode)) {
    experiment.take(plan);
    run_together({&experiment}, options);
  }
  return experiment.error();
}

// Two launches that share the device. Neither may wait for a block that can start
// only after the other launch has ended.
double run_pair(const Case& k, Pass pass, const Options& options) {
  Experiment one(k, pass);
  Experiment two(k, pass == Pass::forward ? Pass::backward : Pass::forward);
  for (const char* mode : {"streaming", "chunks", "cluster2"}) {
    for (const Plan& plan : plans_of(one.problem(), mode)) {
      one.take(plan);
      two.take(plans_of(two.problem(), "streaming").at(0));
      run_together({&one, &two}, options);
    }
  }
  return std::max(one.error(), two.error());
}

// A launch and its repetition by a CUDA graph, which may rely on nothing but the first one's end.
double run_replay(const Case& k, Pass pass, const Options& options) {
  Experiment experiment(k, pass);
  for (const char* mode : {"streaming", "resident", "cluster2"}) {
    for (const Plan& plan : plans_of(experiment.problem(), mode)) {
      experiment.take(plan);
      for_schedules(options, [&](const auto& complain) {
        launch_twice(experiment.call(), [&] {
          complain(experiment);
          experiment.call();  // resets what the first launch wrote
        });
        complain(experiment);
      });
    }
  }
  return experiment.error();
}

// Runs one case; false where it failed.
bool run_case(
    const Case& k, Pass pass, const std::string& mode, const std::string& name,
    const Options& options) {
  try {
    const double error = mode == "pair" ? run_pair(k, pass, options)
        : mode == "replay"              ? run_replay(k, pass, options)
                                        : run_alone(k, pass, mode, options);
    std::printf("%s: ok, error %.2f of what is allowed\n", name.c_str(), error);
  } catch (const std::exception& e) {
    std::printf("%s: FAILED: %s\n", name.c_str(), e.what());
    std::fflush(stdout);
    return false;
  }
  std::fflush(stdout);
  return true;
}

int run(const Options& options) {
  std::vector<std::string> modes = test_modes();
  modes.push_back("plans");
  modes.push_back("pair");
  modes.push_back("replay");
  int found = 0, count = 0, failed = 0;
  const auto visit = [&](const Case& k, const std::string& mode, Pass pass) {
    const std::string name = k.name + (pass == Pass::forward ? "/forward/" : "/backward/") + mode;
    if (!contains(name, options.names) || !contains("/" + mode, options.modes) ||
        found++ % options.parts != options.part) {
      return;
    }
    ++count;
    if (options.list) {
      std::printf("%s\n", name.c_str());
    } else {
      failed += !run_case(k, pass, mode, name, options);
    }
  };
  for (const Case& k : all_cases()) {
    if ((options.quick && !is_quick(k)) || !contains(k.name, options.dtypes)) {
      continue;
    }
    for (const std::string& mode : modes) {
      visit(k, mode, Pass::forward);
      visit(k, mode, Pass::backward);
    }
  }
  std::printf("%d cases, %d failed\n", count, failed);
  return failed == 0 && count > 0 ? 0 : 1;
}

constexpr const char* kUsage =
    "usage: case_program [--list] [--quick] [--seed SEED] [--part I/N] [--mode MODE]...\n"
    "                    [--dtype DTYPE]... [PART_OF_A_NAME]...\n"
    "--part 0/3: the first of three equal parts of the cases\n";

// "I/N" with 0 <= I < N.
bool read_part(const std::string& given, Options& options) {
  char end;
  return std::sscanf(given.c_str(), "%d/%d%c", &options.part, &options.parts, &end) == 2 &&
      0 <= options.part && options.part < options.parts;
}

}  // namespace
}  // namespace epsa::cuda

int main(int argc, char** argv) {
  epsa::cuda::Options options;
  const std::vector<std::string> given(argv + 1, argv + argc);
  bool understood = true;
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
    } else if (given[i] == "--part" && !last) {
      understood = understood && epsa::cuda::read_part(given[++i], options);
    } else if (given[i].rfind("--", 0) == 0) {
      understood = false;
    } else {
      options.names.push_back(given[i]);
    }
  }
  if (!understood) {
    std::fputs(epsa::cuda::kUsage, stderr);
    return 2;
  }
  return epsa::cuda::run(options);
}
