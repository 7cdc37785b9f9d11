// The numbers of launches. Counters in device memory that nobody clears hold them.
//
// A kernel takes a counter for its own where the upper bits are its launch's number. So
// no other content of the memory may look like that. Numbers are drawn from 2^48, and
// the process begins at a random one. Neighbouring launches have distant numbers: a
// counter, an index or a small integer of the user's is no likely number.
#pragma once

#include <atomic>
#include <cstdint>
#include <random>

#include "cuda/plan.h"

namespace epsa::cuda {

// Never zero, and never the same number again within 2^48 launches of the process.
inline unsigned long long new_launch_number() {
  constexpr unsigned long long kMask = (1ull << (64 - kArrivalBits)) - 1;
  static std::atomic<unsigned long long> next{[] {
    std::random_device random;
    return static_cast<unsigned long long>(random()) << 32 | random();
  }()};
  for (;;) {
    // An odd factor permutes the numbers. This one is 2^48 over the golden ratio.
    const unsigned long long number =
        next.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b97f4bull & kMask;
    if (number != 0) {
      return number;
    }
  }
}

}  // namespace epsa::cuda
