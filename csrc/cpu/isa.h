// Which instruction set the CPU kernels use. No torch header.
#pragma once

#include <string>
#include <vector>

namespace epsa::cpu {

// In rising order: each one includes those before it. The last two add instructions for
// bfloat16: products of pairs, and products of matrices in AMX's tiles.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx_bf16 = 4 };
constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx_bf16};

// The instruction sets that this library has kernels for, in rising order.
std::vector<Isa> built_isas();

// The fastest instruction set that is built and that this machine runs. The environment
// variable EPSA_CPU_ISA, a name of the list above, overrides it; it is read when the
// library is loaded. Throws std::runtime_error where the variable names something else,
// or an instruction set that is not built or does not run here.
Isa isa_in_use();

std::string name(Isa isa);

}  // namespace epsa::cpu
