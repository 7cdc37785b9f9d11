#include "cpu/isa.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>

#include "cpu/kernels/multi_isa.h"

#if EPSA_MULTI_ISA
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace epsa::cpu {
namespace {

#if EPSA_MULTI_ISA
// Whether register ecx of this leaf has all these bits. clang 16's __builtin_cpu_supports
// does not know their names.
bool cpuid_has(unsigned leaf, unsigned bits) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(leaf, &eax, &ebx, &ecx, &edx) && (ecx & bits) == bits;
}

// The features of leaf 7: eax of its second part, edx of its first.
bool has_bf16_pairs() {
  constexpr unsigned kAvx512Bf16 = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kAvx512Bf16);
}
bool has_bf16_tiles() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
      (edx & (kAmxBf16 | kAmxTile)) == (kAmxBf16 | kAmxTile);
}

// Linux saves the tiles of a process only if it has asked for them once.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

bool machine_runs(Isa isa) {
#if EPSA_MULTI_ISA
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
          cpuid_has(1, bit_F16C | bit_MOVBE) && cpuid_has(0x80000001, bit_LZCNT);
    case Isa::avx512:
      return machine_runs(Isa::avx2) && __builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
    case Isa::avx512_bf16:
      return machine_runs(Isa::avx512) && has_bf16_pairs();
    case Isa::amx_bf16:
      return machine_runs(Isa::avx512_bf16) && has_bf16_tiles() && may_use_tiles();
  }
#endif
  return isa == Isa::baseline;
}

// Whether an instruction set beats those before it here. Intel's processors make products
// of pairs at half the rate of products of floats, which leaves no gain. (Measured on
// Sapphire Rapids: the modules' convolutions took 1.1 to 1.6 times as long in pairs.)
bool pays(Isa isa) {
#if EPSA_MULTI_ISA
  return isa != Isa::avx512_bf16 || !__builtin_cpu_is("intel");
#else
  return isa == Isa::baseline;
#endif
}

std::string environment() {
  const char* value = std::getenv("EPSA_CPU_ISA");
  return value ? value : "";
}

// Read when the library is loaded. Two libraries hold this file; they are loaded together
// and must agree.
const std::string wanted = environment();

Isa choose() {
  std::string runnable;
  Isa best = Isa::baseline;
  for (Isa isa : built_isas()) {
    if (!machine_runs(isa)) {
      continue;
    }
    if (name(isa) == wanted) {
      return isa;
    }
    runnable += (runnable.empty() ? "" : ", ") + name(isa);
    best = pays(isa) ? isa : best;
  }
  if (!wanted.empty()) {
    throw std::runtime_error(
        "EPSA_CPU_ISA: expected one of {" + runnable +
        "} (what is built and what this machine runs), got '" + wanted + "'");
  }
  return best;
}

}  // namespace

std::vector<Isa> built_isas() {
#if EPSA_MULTI_ISA
  return {std::begin(kIsas), std::end(kIsas)};
#else
  return {Isa::baseline};
#endif
}

Isa isa_in_use() {
  static const Isa isa = choose();
  return isa;
}

std::string name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::amx_bf16:
      return "amx_bf16";
  }
  return "?";
}

}  // namespace epsa::cpu
