// EPSA_MULTI_ISA: whether this compiler builds kernels for several x86 instruction sets.
// GCC does, by `#pragma GCC target`. Others build the baseline alone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define EPSA_MULTI_ISA 1
#include <immintrin.h>
#else
#define EPSA_MULTI_ISA 0
#endif
