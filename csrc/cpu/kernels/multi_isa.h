// EPSA_MULTI_ISA: can this compiler build one body per x86 instruction set?
// GCC can, by `#pragma GCC target`. Others build the baseline body alone.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 11
#define EPSA_MULTI_ISA 1
#else
#define EPSA_MULTI_ISA 0
#endif
