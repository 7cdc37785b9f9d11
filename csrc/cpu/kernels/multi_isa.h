// EPSA_MULTI_ISA: whether this compiler builds kernels for several x86 instruction sets.
// GCC and clang do. Others build the baseline alone.
//
// EPSA_TARGET_BEGIN("arch=NAME") and EPSA_TARGET_END enclose functions for one of them.
#pragma once

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define EPSA_MULTI_ISA 1
#include <immintrin.h>

#define EPSA_PRAGMA(words) _Pragma(#words)
#ifdef __clang__
#define EPSA_TARGET_BEGIN(arch) \
  EPSA_PRAGMA(clang attribute push(__attribute__((target(arch))), apply_to = function))
#define EPSA_TARGET_END EPSA_PRAGMA(clang attribute pop)
#else
#define EPSA_TARGET_BEGIN(arch) EPSA_PRAGMA(GCC push_options) EPSA_PRAGMA(GCC target(arch))
#define EPSA_TARGET_END EPSA_PRAGMA(GCC pop_options)
#endif

#else
#define EPSA_MULTI_ISA 0
#endif
