// Types that every layer shares: branch limits, element types, layouts, maps.
// No torch and no CUDA header, so that plans and kernels can include it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace epsa {

// Limits of a PSA module's branches. Python reads them from _C.
constexpr int kMinBranches = 2, kMaxBranches = 8;

enum class Dtype { f32, f64, bf16, f16 };
enum class Layout { contiguous, channels_last };

// Storage types of the 16-bit floats. Arithmetic is always done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The accumulation type is double for double, else float.
template <class T>
using AccumulationType = std::conditional_t<std::is_same<T, double>::value, double, float>;
constexpr Dtype accumulation_type(Dtype dtype) {
  return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
}

// Bytes of one element.
inline int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return 8;
    case Dtype::f32:
      return 4;
    case Dtype::bf16:
    case Dtype::f16:
      return 2;
  }
  throw std::invalid_argument("unknown dtype");
}

// S maps [N, C, H, W], strides in elements. In the contiguous layout the inner
// three dimensions are dense; in channels_last a pixel's C channels are.
// The S slots of an output are maps too: slices of one tensor.
struct Maps {
  void* data[kMaxBranches];  // null: not wanted (writes), zero (reads)
  int64_t batch_stride[kMaxBranches];
  int64_t pixel_stride[kMaxBranches];  // channels_last only
};

}  // namespace epsa
