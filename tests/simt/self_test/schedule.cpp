// The order in which blocks start, and the 16-bit floats.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <vector>

#include "self_test/self_test.h"

namespace epsa::cuda {
namespace {

// ---- the schedule ----

// All blocks run, whatever the order in which launches of unlike sizes take turns.
std::string unlike_launches() {
  for (uint64_t seed = 0; seed < 32; ++seed) {
    const LaunchOptions one{.seed = seed, .max_resident = 2};
    const LaunchOptions five{.blocks = 5};
    const LaunchOptions pairs{.blocks = 4, .cluster = 2};
    unsigned blocks[3] = {};
    const auto count = [&](int i) { return [counter = &blocks[i]] { arrive(counter); }; };
    const std::string report =
        launch_together({{one, count(0)}, {five, count(1)}, {pairs, count(2)}});
    if (!report.empty()) {
      return report;
    }
    if (blocks[0] != 1 || blocks[1] != 5 || blocks[2] != 4) {
      return expect(false);
    }
  }
  return "";
}

// The order in which blocks start, and how many run at once.
std::string schedule() {
  std::map<uint64_t, std::vector<int64_t>> orders;
  const LaunchOptions options{.blocks = 16, .max_resident = 3};
  const auto run = [&](const LaunchOptions& scheduled) {
    std::vector<int64_t> order(options.blocks);
    unsigned long long tickets = 0;
    std::atomic<int> running{0}, most{0};
    const std::string report = launch(scheduled, [&] {
      order[next_ticket(&tickets)] = block_id();
      most = std::max(most.load(), ++running);
      for (int i = 0; i < 10; ++i) {
        pause();
      }
      --running;
    });
    const bool again = orders.contains(scheduled.seed);
    const bool right = most == 3 && (!again || order == orders[scheduled.seed]);
    orders[scheduled.seed] = order;
    return report.empty() ? expect(right) : report;
  };
  std::string report = over_schedules(options, run);
  report = report.empty() ? over_schedules(options, run) : report;
  std::map<std::vector<int64_t>, int> different;
  for (const auto& [seed, order] : orders) {
    ++different[order];
  }
  return report.empty()
      ? expect(std::ranges::is_sorted(orders[0]) && different.size() == orders.size())
      : report;
}

// ---- 16-bit floats ----

template <class Half>
float rounded(float x) {
  Half half;
  from_float(x, half);
  return to_float(half);
}

// Checks neighbours, and the values around the middle between them. `unit` is the
// last place of the values from 1 to 2.
template <class Half>
bool rounds_to_even(float unit, float smallest, float largest) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  bool right = rounded<Half>(kInfinity) == kInfinity && rounded<Half>(-kInfinity) == -kInfinity &&
      std::isnan(rounded<Half>(std::nanf(""))) && std::signbit(rounded<Half>(-0.f)) &&
      rounded<Half>(largest) == largest &&
      rounded<Half>(std::nextafter(largest, kInfinity)) == largest;
  for (float low = smallest; low < largest;) {
    const float place = std::max(smallest, std::exp2(std::floor(std::log2(low))) * unit);
    const float high = low + place, middle = low + place / 2;
    const bool even = std::fmod(low / place, 2.f) == 0;
    right = right && rounded<Half>(low) == low && rounded<Half>(-middle) == (even ? -low : -high) &&
        rounded<Half>(std::nextafter(middle, low)) == low &&
        rounded<Half>(std::nextafter(middle, high)) == high;
    low = high;
  }
  return right;
}

std::string halves() {
  return expect(
      rounds_to_even<f16>(0x1p-10f, 0x1p-24f, 65504.f) && rounded<f16>(65519.f) == 65504.f &&
      std::isinf(rounded<f16>(65520.f)) && rounded<f16>(0x1p-25f) == 0 &&
      rounds_to_even<bf16>(0x1p-7f, 0x1p-133f, 0x1.fep127f) && rounded<bf16>(0x1p-134f) == 0 &&
      std::isinf(rounded<bf16>(0x1.ffp127f)));
}

}  // namespace

Cases schedule_cases() {
  return {
      {"unlike_launches", unlike_launches},
      {"schedule", schedule},
      {"halves", halves},
  };
}

}  // namespace epsa::cuda
