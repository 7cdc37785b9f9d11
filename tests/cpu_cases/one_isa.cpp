// The kernels of one instruction set, in place of the .cpp that compiles them for all.
// Builds with sanitizers take long, and a program of cases runs one instruction set.
//
// The build defines EPSA_CASES_ATTENTION or EPSA_CASES_CONV, and EPSA_VEC_BYTES together
// with the -march flag of that instruction set. Where that has kernels of bfloat16 pairs,
// they are compiled alone.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/conv.h"
#include "cpu/kernels/multi_isa.h"

#ifdef EPSA_TILE_INSTRUCTIONS  // conv_pairs.inc defines it, too
[[maybe_unused]] constexpr bool kTilesAreEmulated = true;
#else
[[maybe_unused]] constexpr bool kTilesAreEmulated = false;
#endif

#define EPSA_FN inline __attribute__((always_inline))

namespace epsa::cpu {
namespace one_isa {
#ifdef EPSA_CASES_ATTENTION
#include "cpu/kernels/attention.inc"
#elif defined(__AVX512BF16__)
#include "cpu/kernels/conv_pairs.inc"
const ConvKernels* table(Dtype) {
  return nullptr;
}
#else
#include "cpu/kernels/conv.inc"
#endif

auto& checked_table(Dtype dtype, Isa isa) {
  const auto* found = table(dtype);
  if (!found || lanes_of(isa) * sizeof(float) != EPSA_VEC_BYTES) {
    std::abort();
  }
  return *found;
}
}  // namespace one_isa

#ifdef EPSA_CASES_ATTENTION
const Kernels& kernels(Dtype dtype, Isa isa) {
  return one_isa::checked_table(dtype, isa);
}
#else
bool tiles_are_emulated() {
  return kTilesAreEmulated;
}

const ConvKernels& conv_kernels(Dtype dtype, Isa isa) {
  return one_isa::checked_table(dtype, isa);
}
const ConvKernels& pair_kernels(Isa) {
#ifdef __AVX512BF16__
  return one_isa::kTable;
#else
  std::abort();
#endif
}
const PixelPairKernels& pixel_pair_kernels(Isa) {
#ifdef __AVX512BF16__
  return one_isa::kPixelPairs;
#else
  std::abort();
#endif
}
const MatrixGradKernels& matrix_grad_kernels(Isa) {
#ifdef __AVX512BF16__
  return one_isa::kMatrixGrad;
#else
  std::abort();
#endif
}
#endif

}  // namespace epsa::cpu
