// One body per instruction set: the same source, included in three target
// regions. The headers come first, so that they stay baseline code.
#include "cpu/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "cpu/kernels/multi_isa.h"

#if EPSA_MULTI_ISA
#include <immintrin.h>
#endif

#define EPSA_FN inline __attribute__((always_inline))

namespace epsa::cpu {

namespace baseline {
#define EPSA_VEC_BYTES 16
#include "ops/attention_math.inc"
#include "cpu/kernels/simd.inc"
#include "cpu/kernels/attention.inc"
#undef EPSA_VEC_BYTES
}  // namespace baseline

#if EPSA_MULTI_ISA
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define EPSA_VEC_BYTES 32
#include "ops/attention_math.inc"
#include "cpu/kernels/simd.inc"
#include "cpu/kernels/attention.inc"
#undef EPSA_VEC_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define EPSA_VEC_BYTES 64
#include "ops/attention_math.inc"
#include "cpu/kernels/simd.inc"
#include "cpu/kernels/attention.inc"
#undef EPSA_VEC_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

const Kernels& kernels(Dtype dtype, Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return baseline::kernels(dtype);
#if EPSA_MULTI_ISA
    case Isa::avx2:
      return avx2::kernels(dtype);
    case Isa::avx512:
      return avx512::kernels(dtype);
#endif
    default:
      throw std::runtime_error("no kernels were built for " + name(isa));
  }
}

Geometry make_geometry(
    int branches, int64_t channels, int64_t pixels, int64_t hidden,
    Layout layout) {
  // Work for one unit, in elements: large enough to hide what a unit costs,
  // small enough to share one small sample among a few threads. At most
  // kMaxChunks, so that the partial sums stay small beside the maps.
  constexpr int64_t kPlaneElements = 16384, kPixelElements = 8192;
  constexpr int64_t kMaxChunks = 256;
  const int64_t wanted = layout == Layout::contiguous
      ? kPlaneElements
      : std::max<int64_t>(1, kPixelElements / (branches * channels));
  const int64_t least = (pixels + kMaxChunks - 1) / kMaxChunks;
  const int64_t chunk = std::max(wanted, least);
  return {branches, channels, pixels, hidden, layout, chunk,
          (pixels + chunk - 1) / chunk};
}

}  // namespace epsa::cpu
