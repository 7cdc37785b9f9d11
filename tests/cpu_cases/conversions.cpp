// The conversions of 16-bit floats, exactly: every value of both types, and the floats around
// the middle of every two neighbours. Plain arithmetic in double says what is right.
//
// The build defines EPSA_VEC_BYTES together with the -march flag of that instruction set. The
// program prints "N cases, M failed".
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "cpu/kernels/multi_isa.h"
#include "types.h"

#define EPSA_FN inline __attribute__((always_inline))

namespace epsa::cpu {
namespace {

#include "cpu/kernels/simd.inc"

struct Format {
  const char* name;
  int mantissa, bias;  // bits of the mantissa, bias of the exponent
  int exponents() const { return 1 << (15 - mantissa); }
};
constexpr Format kBf16{"bf16", 7, 127}, kF16{"f16", 10, 15};

// The value of a pattern, by its definition in IEEE 754.
double value_of(const Format& format, int bits) {
  const int mantissa = bits & ((1 << format.mantissa) - 1);
  const int exponent = bits >> format.mantissa & (format.exponents() - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == format.exponents() - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN()
                    : sign * std::numeric_limits<double>::infinity();
  }
  const int implicit = exponent ? 1 << format.mantissa : 0;
  return sign *
      std::ldexp(implicit + mantissa, (exponent ? exponent : 1) - format.bias - format.mantissa);
}

int count = 0, failed = 0;

void check(const Format& format, const char* what, double given, double expected, double got) {
  ++count;
  const bool same = std::isnan(expected)
      ? std::isnan(got)
      : got == expected && std::signbit(got) == std::signbit(expected);
  if (!same && ++failed < 10) {
    std::printf("%s %s %a: %a, expected %a\n", format.name, what, given, got, expected);
  }
}

// Reads `patterns` in whole vectors and a rest.
template <class T>
std::vector<float> widened(const std::vector<T>& patterns) {
  constexpr int64_t kWidth = Memory<T>::width;
  const auto size = static_cast<int64_t>(patterns.size());
  std::vector<float> result(patterns.size());
  for (int64_t i = 0; i < size; i += kWidth) {
    const int64_t n = size - i < kWidth ? size - i : kWidth;
    const auto v = n == kWidth ? Memory<T>::load(&patterns[i]) : Memory<T>::load(&patterns[i], n);
    std::memcpy(&result[i], &v, n * sizeof(float));
  }
  return result;
}

template <class T>
std::vector<T> narrowed(const std::vector<float>& values) {
  constexpr int64_t kWidth = Memory<T>::width;
  const auto size = static_cast<int64_t>(values.size());
  std::vector<T> result(values.size());
  for (int64_t i = 0; i < size; i += kWidth) {
    const int64_t n = size - i < kWidth ? size - i : kWidth;
    typename Memory<T>::V v{};
    std::memcpy(&v, &values[i], n * sizeof(float));
    if (n == kWidth) {
      Memory<T>::store(&result[i], v);
    } else {
      Memory<T>::store(&result[i], v, n);
    }
  }
  return result;
}

template <class T>
void check_all(const Format& format) {
  std::vector<T> patterns(65536 - 3);  // a rest that fills no vector
  for (size_t i = 0; i < patterns.size(); ++i) {
    patterns[i].bits = static_cast<uint16_t>(i);
  }
  const std::vector<float> wide = widened(patterns);
  for (size_t i = 0; i < wide.size(); ++i) {
    const double right = value_of(format, static_cast<int>(i));
    check(format, "read", static_cast<double>(i), right, wide[i]);
  }

  std::vector<float> values;
  std::vector<double> rounded;
  const auto add = [&](double given, double right) {
    for (const double sign : {1.0, -1.0}) {
      values.push_back(static_cast<float>(sign * given));
      rounded.push_back(sign * right);
    }
  };
  const int infinity = (format.exponents() - 1) << format.mantissa;
  for (int bits = 0; bits < infinity; ++bits) {
    const double low = value_of(format, bits);
    // what would follow the largest number, if the exponents went on
    const double high = bits + 1 < infinity ? value_of(format, bits + 1)
                                            : std::ldexp(1.0, format.exponents() - 1 - format.bias);
    const double above = bits + 1 < infinity ? high : std::numeric_limits<double>::infinity();
    const auto middle = static_cast<float>((low + high) / 2);
    add(low, low);
    add(middle, bits % 2 == 0 ? low : above);  // ties to even
    add(std::nextafter(middle, 0.0f), low);
    add(std::nextafter(middle, std::numeric_limits<float>::infinity()), above);
  }
  add(std::numeric_limits<float>::max(), std::numeric_limits<double>::infinity());
  add(std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  add(nan, nan);
  const std::vector<T> narrow = narrowed<T>(values);
  for (size_t i = 0; i < narrow.size(); ++i) {
    check(format, "written", values[i], rounded[i], value_of(format, narrow[i].bits));
  }
}

}  // namespace
}  // namespace epsa::cpu

int main() {
  using namespace epsa::cpu;
  check_all<epsa::bf16>(kBf16);
  check_all<epsa::f16>(kF16);
  std::printf("%d cases, %d failed\n", count, failed);
  return failed != 0;
}
