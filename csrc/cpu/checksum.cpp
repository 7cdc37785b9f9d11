#include "cpu/checksum.h"

#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace epsa::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int64_t kStripe = kLanes * sizeof(uint64_t);
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;  // 2^64 / the golden ratio, odd

// Every bit of the result depends on every bit of x (the finaliser of MurmurHash3).
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 33)) * 0xff51afd7ed558ccd;
  x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53;
  return x ^ (x >> 33);
}

// Two lanes: what every processor's vectors hold.
typedef uint64_t Pair __attribute__((vector_size(2 * sizeof(uint64_t))));
constexpr int kPairs = kLanes / 2;

struct Lanes {
  Pair sum[kPairs] = {}, key[kPairs], step[kPairs];

  explicit Lanes(uint64_t seed) {
    for (int l = 0; l < kLanes; ++l) {
      key[l / 2][l % 2] = mixed(seed + l * kGolden);
      step[l / 2][l % 2] = mixed(key[l / 2][l % 2]) | 1;
    }
  }
};

// The low halves' product with the high halves.
Pair product_of_halves(Pair x) {
#ifdef __SSE2__
  return (Pair)_mm_mul_epu32((__m128i)x, _mm_srli_epi64((__m128i)x, 32));
#else
  return (x & 0xffffffff) * (x >> 32);
#endif
}

// The keys of all stripes differ, so their order counts. The plain words make a word
// count whose product is zero.
Lanes add(Lanes lanes, const char* stripes, int64_t count) {
  for (const char* end = stripes + count * kStripe; stripes < end; stripes += kStripe) {
    for (int i = 0; i < kPairs; ++i) {
      Pair words;
      std::memcpy(&words, stripes + i * sizeof(Pair), sizeof(Pair));
      lanes.sum[i] += product_of_halves(words ^ lanes.key[i]) + Pair{words[1], words[0]};
      lanes.key[i] += lanes.step[i];
    }
  }
  return lanes;
}

}  // namespace

uint64_t checksum(const void* data, int64_t bytes, uint64_t seed) {
  const char* begin = static_cast<const char*>(data);
  const int64_t stripes = bytes / kStripe, rest = bytes % kStripe;
  Lanes lanes(seed);
  lanes = add(lanes, begin, stripes);
  char last[kStripe] = {};
  if (rest > 0) {
    std::memcpy(last, begin + stripes * kStripe, rest);
    lanes = add(lanes, last, 1);
  }
  uint64_t result = mixed(seed ^ static_cast<uint64_t>(bytes));
  for (int l = 0; l < kLanes; ++l) {
    result = mixed(result + lanes.sum[l / 2][l % 2]) + kGolden;
  }
  return result;
}

}  // namespace epsa::cpu
