#include "cases/elements.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace epsa::cuda {

void encode(double x, Dtype dtype, unsigned char* to) {
  if (dtype == Dtype::f64) {
    std::memcpy(to, &x, 8);
    return;
  }
  const float value = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == Dtype::f32) {
    std::memcpy(to, &bits, 4);
    return;
  }
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::f16) {  // three bits less of exponent, three more of fraction
    const uint32_t size = bits & 0x7fffffffu;
    half = static_cast<uint16_t>((half & 0x8000u) | (size == 0 ? 0 : (size - 0x38000000u) >> 13));
  }
  std::memcpy(to, &half, 2);
}

double decode(Dtype dtype, const unsigned char* from) {
  if (dtype == Dtype::f64) {
    double x;
    std::memcpy(&x, from, 8);
    return x;
  }
  if (dtype == Dtype::f16) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    const int exponent = bits >> 10 & 31, rest = bits & 1023;
    const double size = exponent == 31 ? (rest ? NAN : INFINITY)
        : exponent == 0                ? std::ldexp(rest, -24)
                                       : std::ldexp(1024 + rest, exponent - 25);
    return bits & 0x8000u ? -size : size;
  }
  uint32_t bits = 0;
  const size_t bytes = static_cast<size_t>(element_size(dtype));
  std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 4 - bytes, from, bytes);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

double unit(Dtype dtype) {
  return std::ldexp(
      1,
      dtype == Dtype::f64       ? -53
          : dtype == Dtype::f32 ? -24
          : dtype == Dtype::f16 ? -11
                                : -8);
}

}  // namespace epsa::cuda
