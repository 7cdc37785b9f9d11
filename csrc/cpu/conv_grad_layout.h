// Where the convolutions' gradients on the CPU keep the branches' gradients of a sample.
#pragma once

#include "cpu/conv_layout.h"

#include <numeric>

namespace epsa::cpu {

// How the branches' gradients of a sample lie in scratch memory.
struct GradLayout {
  decltype(ConvKernels::pack_image) pack_image = nullptr;  // null: nobody reads them
  int64_t channels = 0;                                    // of a branch, or pairs
  int64_t height = 0, width = 0;                           // of a map
  int64_t vector = 1;                                      // floats
  std::vector<int64_t> lanes{};                            // of each branch's blocks
  ScratchSize size{};

  GradLayout() = default;
  GradLayout(const ConvProblem& p, const ConvKernels& kernels, bool pairs)
      : GradLayout(p, kernels.pack_image, kernels.lanes, pairs ? p.C / 2 : p.C, p.out_w) {}
  GradLayout(const ConvProblem& p, const PixelPairKernels& kernels)
      : GradLayout(p, kernels.pack_grad, kPairLanes, p.C, (p.out_w + 1) / 2) {}

  int64_t floats() const { return first(lanes.size()); }
  Scratch scratch(float* sample, int64_t s) const {
    return size.scratch(sample + first(s), height, lanes[s]);
  }

  int64_t blocks() const {
    int64_t all = 0;
    for (const int64_t n : lanes) {
      all += blocks(n);
    }
    return all;
  }
  // Packs block i of sample n. Returns what pack_image does.
  bool pack(at::TensorList grads, int64_t n, int64_t i, float* sample) const {
    int64_t s = 0;
    for (; i >= blocks(lanes[s]); ++s) {
      i -= blocks(lanes[s]);
    }
    return pack_image(image_of(grads[s], n), channels, width, scratch(sample, s), i, i + 1);
  }

 private:
  // columns: of a row in the scratch.
  GradLayout(
      const ConvProblem& p, decltype(ConvKernels::pack_image) pack, int64_t lanes_,
      int64_t channels_, int64_t columns)
      : pack_image(pack),
        channels(channels_),
        height(p.out_h),
        width(p.out_w),
        vector(lanes_),
        lanes(p.S, lanes_) {
    size.width = columns;
  }

  int64_t blocks(int64_t of) const { return (channels + of - 1) / of; }
  int64_t first(size_t branches) const {
    int64_t floats = 0;
    for (size_t s = 0; s < branches; ++s) {
      const int64_t branch = size.floats(channels, height, lanes[s]);
      floats += (branch + vector - 1) / vector * vector;  // begins at a whole vector
    }
    return floats;
  }
};

// The same for the weights' gradients by matrix: the planes of each branch that needs one.
struct GradPlanes {
  const MatrixGradKernels* k = nullptr;  // null: nobody reads them
  PixelRuns runs{};
  int64_t channels = 0, height = 0, width = 0;
  std::vector<int64_t> branches{};
  std::vector<int64_t> moved{};  // copies of each branch's planes

  GradPlanes() = default;
  GradPlanes(
      const ConvProblem& p, const MatrixGradKernels& kernels, const std::vector<Conv>& convs,
      std::vector<int64_t> branches_)
      : k(&kernels),
        runs(convs, kMatrixLanes),
        channels(p.C),
        height(p.out_h),
        width(p.out_w),
        branches(std::move(branches_)) {
    for (const int64_t s : branches) {
      moved.push_back(MatrixGradRows(convs[s], kMatrixLanes).moved);
    }
  }

  int64_t floats() const { return first(branches.size()); }
  int64_t first_of(int64_t s) const {  // of branch s
    return first(std::find(branches.begin(), branches.end(), s) - branches.begin());
  }
  int64_t blocks_of_one() const { return (channels + kMatrixLanes - 1) / kMatrixLanes; }
  int64_t blocks() const { return static_cast<int64_t>(branches.size()) * blocks_of_one(); }

  // Packs block i of sample n. Returns what pack_image does.
  bool pack(at::TensorList grads, int64_t n, int64_t i, float* sample) const {
    const int64_t b = i / blocks_of_one(), block = i % blocks_of_one();
    return k->pack_grad(
        image_of(grads[branches[b]], n), channels, height, width, runs, moved[b], block, block + 1,
        sample + first(b));
  }

 private:
  int64_t first(size_t before) const {
    return channels * runs.plane_floats() *
        std::accumulate(moved.begin(), moved.begin() + before, int64_t{0});
  }
};

}  // namespace epsa::cpu
