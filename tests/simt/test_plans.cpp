#include "test_plans.h"

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

namespace epsa::cuda {
namespace {

// With few threads, small rows take several turns. 8 branches need no more.
constexpr int kThreads = 64;

// As their makers describe them: those with clusters of 16, with clusters of 8, and without.
const Device kDevices[] = {
    {"H100", 90, 132, 2048, 32, 233472, 232448, 50 << 20},
    {"B200", 100, 148, 2048, 32, 233472, 232448, 126 << 20},
    {"A100", 80, 108, 2048, 32, 167936, 166912, 40 << 20},
    {"RTX4090", 89, 128, 1536, 24, 102400, 101376, 72 << 20},
    {"RTX5090", 120, 170, 1536, 24, 102400, 101376, 96 << 20},
};

void set_streaming(const Problem& p, Plan& plan, bool chunks) {
  Split& split = plan.split;
  plan.variant = Variant::streaming;
  plan.cluster = 1;
  plan.pieces = 0;
  plan.blocks = 5;
  plan.lag = 1;
  if (chunks && p.layout == Layout::contiguous && p.pixels > 1) {
    if (p.pixels % plan.vector) {
      plan.vector = 1;
    }
    const int vectors = p.pixels / plan.vector;
    split.planes = 1;
    split.chunk = (vectors + 1) / 2 * plan.vector;
    split.chunks = (p.pixels + split.chunk - 1) / split.chunk;
    split.parts = split.units = p.vector() * split.chunks;
  } else {
    split.parts = std::min(split.units, 3);
  }
}

}  // namespace

const Device& test_device() {
  const char* name = std::getenv("EPSA_SIMT_DEVICE");
  if (name == nullptr) {
    return kDevices[0];
  }
  for (const Device& device : kDevices) {
    if (device.name == name) {
      return device;
    }
  }
  throw std::runtime_error(std::string("unknown device ") + name);
}

const std::vector<std::string>& test_modes() {
  static const std::vector<std::string> modes = {"auto",     "resident",  "cluster2",
                                                 "cluster4", "streaming", "chunks"};
  return modes;
}

Plan test_plan(const Problem& p, const std::string& mode) {
  const auto& modes = test_modes();
  if (std::find(modes.begin(), modes.end(), mode) == modes.end()) {
    throw std::runtime_error("unknown test plan " + mode);
  }
  const std::vector<Candidate> ranked = plans(p, test_device());
  if (mode == "auto") {
    return ranked.front().plan;
  }
  const bool resident = mode != "streaming" && mode != "chunks" &&
      (p.pass == Pass::forward ? !p.pooled_given : p.grad_out_given);
  Plan plan = ranked.back().plan;
  if (plan.split.chunks > 1) {  // start from whole planes
    Split& split = plan.split;
    split.planes = plan.vector / std::gcd(p.pixels, plan.vector);
    split.units = p.vector() / split.planes;
    split.chunks = 1;
    split.chunk = p.pixels;
  }
  plan.threads = kThreads;
  plan.group = std::min(p.samples, 2);
  if (resident) {
    const int blocks = mode == "cluster2" ? 2 : mode == "cluster4" ? 4 : 1;
    plan.variant = Variant::resident;
    plan.split.parts = plan.cluster = std::min(blocks, plan.split.units);
    plan.blocks = p.samples * plan.cluster;
    plan.pieces = p.pass == Pass::backward && mode != "cluster2" ? 2 : 1;
  } else {
    set_streaming(p, plan, mode == "chunks");
  }
  plan.shared_bytes = shared_bytes(p, plan);
  return plan;
}

}  // namespace epsa::cuda
