// The convolutions' kernels of bfloat16 pairs. They need instructions that only some x86
// processors have, so they are compiled for these alone.
#include "cpu/kernels/conv.h"

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "cpu/kernels/multi_isa.h"

namespace epsa::cpu {
#if EPSA_MULTI_ISA
namespace conv_pairs {
#define EPSA_FN inline __attribute__((always_inline))
#define EPSA_VEC_BYTES 64
// AMX's instructions stand only where a plan for amx_bf16 calls them.
EPSA_TARGET_BEGIN("arch=x86-64-v4,avx512bf16,amx-tile,amx-bf16")
#include "cpu/kernels/conv_pairs.inc"
EPSA_TARGET_END
#undef EPSA_VEC_BYTES
#undef EPSA_FN
}  // namespace conv_pairs
#endif

const ConvKernels& pair_kernels(Isa isa) {
#if EPSA_MULTI_ISA
  if (isa >= Isa::avx512_bf16) {
    return conv_pairs::kTable;
  }
#endif
  throw std::runtime_error("no kernels of pairs were built for " + name(isa));
}

const PixelPairKernels& pixel_pair_kernels(Isa isa) {
#if EPSA_MULTI_ISA
  if (isa >= Isa::avx512_bf16) {
    return conv_pairs::kPixelPairs;
  }
#endif
  throw std::runtime_error("no kernels of pairs were built for " + name(isa));
}

const MatrixGradKernels& matrix_grad_kernels(Isa isa) {
#if EPSA_MULTI_ISA
  if (isa >= Isa::amx_bf16) {
    return conv_pairs::kMatrixGrad;
  }
#endif
  throw std::runtime_error("no kernels of matrices were built for " + name(isa));
}

}  // namespace epsa::cpu
