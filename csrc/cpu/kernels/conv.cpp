#include "cpu/kernels/conv.h"

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "cpu/kernels/multi_isa.h"

namespace epsa::cpu {
namespace conv {
#define EPSA_PER_ISA_BODY "cpu/kernels/conv.inc"
#include "cpu/kernels/per_isa.inc"
}  // namespace conv

const ConvKernels& conv_kernels(Dtype dtype, Isa isa) {
  return conv::table(dtype, isa);
}

}  // namespace epsa::cpu
