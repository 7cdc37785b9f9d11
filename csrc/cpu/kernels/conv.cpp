// One body per instruction set, as in attention.cpp.
#include "cpu/kernels/conv.h"

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
namespace conv {

namespace baseline {
#define EPSA_VEC_BYTES 16
#include "cpu/kernels/simd.inc"
#include "cpu/kernels/conv.inc"
#undef EPSA_VEC_BYTES
}  // namespace baseline

#if EPSA_MULTI_ISA
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define EPSA_VEC_BYTES 32
#include "cpu/kernels/simd.inc"
#include "cpu/kernels/conv.inc"
#undef EPSA_VEC_BYTES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define EPSA_VEC_BYTES 64
#include "cpu/kernels/simd.inc"
#include "cpu/kernels/conv.inc"
#undef EPSA_VEC_BYTES
}  // namespace avx512
#pragma GCC pop_options
#endif

}  // namespace conv

const ConvKernels& conv_kernels(Dtype dtype, Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return conv::baseline::conv_kernels(dtype);
#if EPSA_MULTI_ISA
    case Isa::avx2:
      return conv::avx2::conv_kernels(dtype);
    case Isa::avx512:
      return conv::avx512::conv_kernels(dtype);
#endif
    default:
      throw std::runtime_error("no kernels were built for " + name(isa));
  }
}

}  // namespace epsa::cpu
