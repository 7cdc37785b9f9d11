// The plain types of simt.cuh, the same on a GPU and in the emulator.
#pragma once

#include <cstdint>

namespace epsa::cuda::simt {

struct alignas(16) Zeros16 {
  uint32_t words[4] = {0, 0, 0, 0};
};

// A lane's part of a matrix [16, 16] of 16-bit floats, as four matrices [8, 8]: above, below, and
// the same of the right half. Lane l has the elements 2 * (l % 4) and one more of row l / 4.
struct Matrices {
  uint32_t words[4];
};

// A lane's part of a matrix [16, 8]: of column l / 4, rows 2 * (l % 4) and one more, and the
// same of the lower half.
struct alignas(8) Half4 {
  uint32_t words[2];
};

}  // namespace epsa::cuda::simt
