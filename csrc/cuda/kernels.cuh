// The table of the attention step's CUDA kernels: one launch forward, one backward.
//
// All sums have a fixed order: by thread number within a block, by part across
// blocks. The order in which blocks arrive never matters.
#pragma once

#include <stdexcept>

#include "cuda/resident.cuh"
#include "cuda/streaming.cuh"

// The element types that have kernels. A build for a test may name fewer: it
// compiles faster.
#ifndef EPSA_TYPES
#define EPSA_TYPES float, double, simt::bf16, simt::f16
#endif

namespace epsa::cuda {

using Kernel = void (*)(Params);

template <class T, int V, bool kLast, bool kEpilogue>
Kernel forward_kernel(Variant variant) {
  return variant == Variant::resident ? Kernel(forward_resident<T, V, kLast, kEpilogue>)
                                      : forward_streaming<T, V, kLast, kEpilogue>;
}

template <class T, int V, bool kLast>
Kernel kernel_of(const Problem& problem, Variant variant) {
  if (problem.pass == Pass::forward) {
    return problem.epilogue ? forward_kernel<T, V, kLast, true>(variant)
                            : forward_kernel<T, V, kLast, false>(variant);
  }
  return variant == Variant::resident ? Kernel(backward_resident<T, V, kLast>)
                                      : backward_streaming<T, V, kLast>;
}

template <class T>
Kernel kernel_of(const Problem& problem, const Plan& plan) {
  constexpr int kVector = full_vector(dtype_of<T>());
  const bool last = problem.layout == Layout::channels_last;
  if (plan.vector == kVector) {
    return last ? kernel_of<T, kVector, true>(problem, plan.variant)
                : kernel_of<T, kVector, false>(problem, plan.variant);
  }
  return last ? kernel_of<T, 1, true>(problem, plan.variant)
              : kernel_of<T, 1, false>(problem, plan.variant);
}

template <class... Types>
Kernel kernel_of_types(const Problem& problem, const Plan& plan) {
  Kernel kernel = nullptr;
  ((kernel = problem.dtype == dtype_of<Types>() ? kernel_of<Types>(problem, plan) : kernel), ...);
  if (!kernel) {
    throw std::runtime_error(
        "epsa_fused: no CUDA kernels for elements of type " +
        std::to_string(static_cast<int>(problem.dtype)));
  }
  return kernel;
}

// The kernel that runs a plan. Throws std::runtime_error for a dtype that has none.
inline Kernel kernel_of(const Problem& problem, const Plan& plan) {
  return kernel_of_types<EPSA_TYPES>(problem, plan);
}

}  // namespace epsa::cuda
