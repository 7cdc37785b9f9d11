// The report of a launch in which no thread can go on.
#include <array>

#include "emulator/machine.h"

namespace epsa::emulator {
namespace {

constexpr int kWaits = 5;
constexpr const char* kNames[kWaits] = {
    "polling", "at a barrier", "at a shuffle", "at a cluster barrier", "exited"};

// How many threads of a block wait for what.
using Counts = std::array<int, kWaits>;

Counts counts_of(const Block& block) {
  Counts counts{};
  for (const Fiber& fiber : block.fibers) {
    ++counts[static_cast<int>(fiber.wait)];
  }
  return counts;
}

// The mistake that a block's threads made, "" where none shows. `exits`: has any
// thread of its cluster exited?
std::string cause_of(const Counts& counts, bool exits) {
  const auto some = [&](Wait wait) { return counts[static_cast<int>(wait)] > 0; };
  const int kinds = some(Wait::barrier) + some(Wait::shuffle) + some(Wait::cluster);
  if (some(Wait::none) || kinds == 0) {
    return "";
  }
  if (kinds > 1) {
    return "divergent barriers";
  }
  return some(Wait::exited) || (exits && some(Wait::cluster)) ? "exit before a barrier" : "";
}

std::string list(const Block& block, const Counts& counts) {
  std::string text = "block " + std::to_string(block.fibers[0].block) + ":";
  const char* comma = " ";
  for (int i = 0; i < kWaits; ++i) {
    if (counts[i] > 0) {
      text += comma + std::to_string(counts[i]) + " " + kNames[i];
      comma = ", ";
    }
  }
  return text;
}

}  // namespace

std::string Machine::stuck(const char* otherwise) const {
  constexpr int kMostListed = 8;
  std::string cause;
  std::string listing;
  int blocks = 0;
  for (const Cluster& cluster : clusters_) {
    const bool exits = std::ranges::any_of(cluster.blocks, &Block::exited);
    for (const Block& block : cluster.blocks) {
      const Counts counts = counts_of(block);
      if (cause.empty()) {
        cause = cause_of(counts, exits);
      }
      if (++blocks <= kMostListed) {
        listing += blocks > 1 ? "; " : "";
        listing += launches_.size() > 1 ? "launch " + std::to_string(cluster.number) + ", " : "";
        listing += list(block, counts);
      }
    }
  }
  return (cause.empty() ? otherwise : cause) + ": " + listing +
      (blocks > kMostListed ? "; ..." : "");
}

}  // namespace epsa::emulator
