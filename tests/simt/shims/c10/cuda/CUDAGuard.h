// For the emulated build of csrc/cuda/attention.cpp: tensors lie in host memory.
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(Device) {}
};
}  // namespace c10::cuda
