// Which instruction set the CPU kernels use. No torch header.
#pragma once

#include <string>
#include <vector>

namespace epsa::cpu {

// In rising order: each one includes those before it.
enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

// The bodies compiled into this library, in rising order.
std::vector<Isa> built_isas();

// The best body that is built and that this machine runs. The environment
// variable EPSA_CPU_ISA (baseline, avx2 or avx512; read when the library is
// loaded) overrides it. Throws std::runtime_error if it names anything else, or a body
// that was not built or that this machine cannot run.
Isa isa_in_use();

std::string name(Isa isa);

}  // namespace epsa::cpu
