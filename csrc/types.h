// Types that every layer shares: branch limits, element types, layouts, maps.
// No torch and no CUDA header, so that plans and kernels can include it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

namespace epsa {

// Limits of a PSA module's branches. Python reads them from _C.
constexpr int kMinBranches = 2, kMaxBranches = 8;

// Storage types of the 16-bit floats. Arithmetic is always done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Every element type: its entry in Dtype, its storage type, and torch's names for
// it in C++ and in Python. Switches over dtypes are made of this list.
#define EPSA_DTYPES(ENTRY)                \
  ENTRY(f32, float, Float, "float32")     \
  ENTRY(f64, double, Double, "float64")   \
  ENTRY(bf16, bf16, BFloat16, "bfloat16") \
  ENTRY(f16, f16, Half, "float16")

#define EPSA_ENTRY(entry, type, torch_name, python_name) entry,
enum class Dtype { EPSA_DTYPES(EPSA_ENTRY) };
#undef EPSA_ENTRY
enum class Layout { contiguous, channels_last };

// The accumulation type is double for double, else float.
template <class T>
using AccumulationType = std::conditional_t<std::is_same<T, double>::value, double, float>;
constexpr Dtype accumulation_type(Dtype dtype) {
  return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
}

// Bytes of one element.
constexpr int64_t element_size(Dtype dtype) {
  switch (dtype) {
#define EPSA_ENTRY(entry, type, torch_name, python_name) \
  case Dtype::entry:                                     \
    return sizeof(type);
    EPSA_DTYPES(EPSA_ENTRY)
#undef EPSA_ENTRY
  }
  throw std::invalid_argument("unknown dtype");
}

// The size of a convolution's output, 0 where the kernel does not fit. Int: int64_t or
// c10::SymInt.
template <class Int>
Int conv_out_size(
    const Int& size, const Int& kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const Int room = size + 2 * padding - (kernel - 1) * dilation - 1;
  return room < 0 ? Int(0) : room / stride + 1;
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
