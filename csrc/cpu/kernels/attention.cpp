#include "cpu/kernels/attention.h"

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/kernels/multi_isa.h"

namespace epsa::cpu {
namespace attention {
#define EPSA_PER_ISA_BODY "cpu/kernels/attention.inc"
#include "cpu/kernels/per_isa.inc"
}  // namespace attention

const Kernels& kernels(Dtype dtype, Isa isa) {
  return attention::table(dtype, isa);
}

}  // namespace epsa::cpu
