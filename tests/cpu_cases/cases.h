// What the programs of cases share: exact buffers, dtypes and counts.
//
// A program runs the CPU kernels of EPSA_CPU_ISA over a table of cases, without torch. The
// kernels are compiled with sanitizers, the table is not. Every buffer is on the heap and
// exactly as large as the kernels are told. Memory that they must not read, or must
// write, is NaN before. Plain loops in double make the expected results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cpu/kernels/attention.h"

namespace epsa::case_program {

using namespace epsa;
using namespace epsa::cpu;

// ---- memory ----

template <class T>
using Buffer = std::unique_ptr<T[], void (*)(void*)>;

// `count` items from the beginning of a cache line on, and no byte more.
template <class T>
Buffer<T> allocate(int64_t count) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, count * sizeof(T)) != 0) {
    std::abort();
  }
  return {static_cast<T*>(memory), std::free};
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
Buffer<T> filled(int64_t count, T value) {
  auto result = allocate<T>(count);
  std::fill_n(result.get(), count, value);
  return result;
}

// ---- dtypes: values with few bits, which each of them holds exactly ----

struct Float {
  using Type = float;
  using Acc = float;  // the accumulation type
  static constexpr Dtype dtype = Dtype::f32;
  static constexpr double rounding = 0x1p-24;
  static float of(float v) { return v; }
  static float value(float v) { return v; }
};

struct Double {
  using Type = double;
  using Acc = double;
  static constexpr Dtype dtype = Dtype::f64;
  static constexpr double rounding = 0x1p-53;
  static double of(float v) { return v; }
  static double value(double v) { return v; }
};

struct Bfloat16 {
  using Type = bf16;
  using Acc = float;
  static constexpr Dtype dtype = Dtype::bf16;
  static constexpr double rounding = 0x1p-8;  // up to a half in the last place
  static bf16 of(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    return {static_cast<uint16_t>(bits >> 16)};
  }
  static float value(bf16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
};

struct Float16 {
  using Type = f16;
  using Acc = float;
  static constexpr Dtype dtype = Dtype::f16;
  static constexpr double rounding = 0x1p-11;
  static f16 of(float v) {  // a normal number or zero
    if (v == 0) {
      return {0};
    }
    int exponent;
    const double mantissa = std::frexp(std::fabs(v), &exponent);  // in [1/2, 1)
    const auto fraction = static_cast<uint16_t>((2 * mantissa - 1) * 1024);
    return {static_cast<uint16_t>((v < 0) << 15 | (exponent + 14) << 10 | fraction)};
  }
  static float value(f16 v) {
    const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
    if (exponent == 31) {
      return fraction ? kNan : std::numeric_limits<float>::infinity();
    }
    const double size =
        exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return static_cast<float>(v.bits >> 15 ? -size : size);
  }
};

// k / 16 for k in -31 .. 31
inline float draw(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<float>(static_cast<int>((state >> 33) % 63) - 31) / 16;
}

// ---- errors ----

// A sum in double, and the size of its terms: what rounding errors are relative to.
struct Sum {
  double value = 0, size = 0;

  void add(double factor, const Sum& x = {1, 1}) {
    value += factor * x.value;
    size += std::fabs(factor) * x.size;
  }
};
using Expected = std::vector<Sum>;

inline double worse(double a, double b) {  // NaN is worst
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return std::isnan(b) ? infinity : std::max(a, b);
}

// The worst error of one array, in units of what is allowed.
struct Error {
  double rounding;  // of the result's type
  double eps;       // of the sums
  double worst = 0;

  void see(double given, const Sum& expected) {
    const double allowed = rounding * std::fabs(expected.value) + eps * expected.size + 1e-30;
    worst = worse(worst, std::fabs(given - expected.value) / allowed);
  }
};

// ---- results ----

inline int cases = 0, failed = 0;

// The exit status. The line is the last of a program's output.
inline int summary() {
  std::printf("%d cases, %d failed\n", cases, failed);
  return failed != 0;
}

}  // namespace epsa::case_program
