// How the grouped convolutions run on an NVIDIA GPU: which branches the kernel takes, the
// tiles of a block, and the order of the packed weights.
//
// The kernel multiplies matrices on tensor cores: 16 rows by 16 columns with 16 by 8. A row
// is a place in a tile of the image, so the columns of the first matrix are input channels,
// and those of the second output channels. A group of few channels fills neither. Its unit
// therefore holds neighbouring places and taps too:
//
//   input channels of a unit   output channels x positions   channels x taps of one step
//   8 (groups of 4 or 8)       2 x 4                          8 x 2
//   16                         4 x 2                          16 x 1
//   32 and more                8 x 1                          16 x 1, in several chunks
//
// A row with P positions stands for P neighbouring pixels of a line of the output. Position j
// has the taps of the kernel shifted by j, zeros around them.
//
// It includes no CUDA header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "types.h"

// Functions that kernels call too.
#ifdef __CUDACC__
#define EPSA_HOST_DEVICE __host__ __device__
#else
#define EPSA_HOST_DEVICE
#endif

namespace epsa::cuda {

constexpr int kConvTiles = 7;  // matrices of rows that a warp multiplies at once
constexpr int kConvHalo = 4;   // the padding of the largest kernel
constexpr int kConvThreads = 256, kConvLargeThreads = 384;  // the most of a block

// One branch's convolution: what the kernel's choice depends on.
struct ConvShape {
  int kernel;   // height and width
  int inputs;   // channels of a group
  int outputs;  // channels of a group
};

// One branch on tensor cores.
struct ConvUnit {
  int kernel;
  int positions;  // P
  int wide;       // matrices of output channels that share one of pixels: 1 or 2
  int chunks;     // of 16 input channels; 1 where P > 1

  EPSA_HOST_DEVICE constexpr int inputs() const { return positions == 4 ? 8 : 16 * chunks; }
  EPSA_HOST_DEVICE constexpr int outputs() const { return 8 / positions * wide; }
  EPSA_HOST_DEVICE constexpr int taps() const { return positions == 4 ? 2 : 1; }
  EPSA_HOST_DEVICE constexpr int steps() const {
    return (kernel + positions - 1) / taps();
  }  // of a line of taps
  // Does it need more registers for weights than the small kernel has?
  EPSA_HOST_DEVICE constexpr bool large() const { return steps() * wide > 8; }
  // Entries of the packed weights: of 4 elements for each lane.
  EPSA_HOST_DEVICE constexpr int entries() const { return chunks * kernel * steps() * wide; }
};

// A number for each instance of the kernel.
EPSA_HOST_DEVICE constexpr int conv_instance(int kernel, int positions, int wide) {
  return (kernel * 8 + positions) * 4 + wide;
}

// The instances: the kernel, the positions, the width.
#define EPSA_CONV_UNITS(ENTRY) \
  ENTRY(5, 4, 1)               \
  ENTRY(5, 2, 1)               \
  ENTRY(5, 1, 1)               \
  ENTRY(7, 4, 1)               \
  ENTRY(7, 2, 1)               \
  ENTRY(7, 1, 1)               \
  ENTRY(9, 4, 1)               \
  ENTRY(9, 2, 1)               \
  ENTRY(9, 1, 1)               \
  ENTRY(5, 1, 2)               \
  ENTRY(7, 1, 2)

// Can the kernel take the branch? Groups must have four times as many inputs as outputs, and a
// power of two of them from 4 to 256.
bool conv_supported(const ConvShape& shape);
ConvUnit conv_unit(const ConvShape& shape);

// The branches that the kernel takes, all with one stride of 1 and padding kernel / 2.
struct ConvProblem {
  int samples, height, width, channels;
  int outputs;  // of each branch
  std::vector<ConvShape> branches;
};

struct ConvPlan {
  int tile_h, tile_w, images;  // output pixels of a block
  int slab;                    // input channels of a block
  int threads;
  int rows, row;  // of the padded tile of one image, and the pixels of a row
  int plane;      // bytes of 8 channels of the padded tile
  int tiles_y, tiles_x;
  int64_t blocks;
  int64_t shared_bytes;
  int64_t shared_limit;         // the device's: the same for all plans
  std::vector<ConvUnit> units;  // of the branches
  std::vector<int> runs, hops;  // the order of the columns of a tile

  bool large() const {
    return std::any_of(units.begin(), units.end(), [](const ConvUnit& u) { return u.large(); });
  }
};

// The multiprocessors that the plan fills, and the shared memory that a block may have.
struct ConvDevice {
  int multiprocessors;
  int64_t shared_per_block, shared_per_multiprocessor;
};

// The plans that the device can run, the best first. None if no tile fits, or if the channels of
// x are no multiple of 16 and of the largest group's.
std::vector<ConvPlan> conv_plans(const ConvProblem& problem, const ConvDevice& device);

// 8 bytes for each lane and entry.
int64_t packed_bytes(const ConvUnit& unit, int outputs);

}  // namespace epsa::cuda
