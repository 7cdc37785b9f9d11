// The launch plan of the attention step on a GPU: which kernel, how many blocks and
// threads, how much shared memory, how a sample is cut. A plan is a pure function of
// the problem's shape and the device's properties. It needs no torch or CUDA header.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "types.h"

namespace epsa::cuda {

enum class Pass { forward, backward };

// resident: a cluster of blocks holds a sample in shared memory and reads device
// memory once. streaming: blocks take tickets and read a sample a second time from
// the L2 cache.
enum class Variant { resident, streaming };

const char* name_of(Variant variant);
std::string kernel_name(Pass pass, Variant variant);  // such as forward_resident

// Elements of one access of 16 bytes. double, which serves gradient checks, is
// never packed.
constexpr int full_vector(Dtype dtype) {
  return dtype == Dtype::f64 ? 1 : static_cast<int>(16 / element_size(dtype));
}

// The kernels' launch bounds: the most threads of a block, and the threads of a
// multiprocessor that have their registers at once. A thread has 64 of them, 128
// for double.
constexpr int kMaxThreads = 512;
constexpr int threads_by_registers(Dtype dtype) {
  return dtype == Dtype::f64 ? 512 : 1024;
}

// The lower bits of a LaunchCounter, which count arrivals. More blocks than that never share a
// counter: the groups of weight gradients and their samples are about the root of N.
constexpr int kArrivalBits = 16;

// All that a plan depends on. Sizes are 32-bit numbers (see size_error), offsets into
// tensors are 64-bit.
struct Problem {
  Pass pass;
  int samples;   // N >= 1
  int branches;  // S
  int channels;  // C, of one branch
  int pixels;    // M = H * W
  int hidden;    // r
  bool shared;   // one set of SE weights for all branches?
  Dtype dtype;
  Layout layout;
  bool aligned;                // may all maps be read and written by 16 bytes? see may_align
  bool pooled_given = false;   // forward: nothing to squeeze
  bool epilogue = false;       // forward: do scale, shift or relu follow?
  bool grad_out_given = true;  // backward: else only the attention's gradient
  bool feats_wanted = true;    // backward: is any gradient of a map asked for?
  bool weights_wanted = true;  // backward: is any gradient of a weight?

  int weight_sets() const { return shared ? 1 : branches; }
  int vector() const { return branches * channels; }  // of one sample
};

// Why the kernels can't take a problem of these sizes; empty where they can. The
// limits are far beyond any network.
std::string size_error(
    int64_t samples, int64_t branches, int64_t channels, int64_t pixels, int64_t hidden,
    bool shared);

// Do the slots of one [N, S*C, H, W] tensor keep an alignment of 16 bytes? The maps'
// addresses and strides must keep it too.
bool may_align(Dtype dtype, Layout layout, int channels, int pixels);

struct Device {
  std::string name;
  int compute_capability;  // 90 for sm_90
  int multiprocessors;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
  int64_t shared_per_multiprocessor;  // bytes
  int64_t shared_per_block;           // bytes, the most that a launch may opt in to
  int64_t l2;                         // bytes
};

// How one sample is cut into parts. The first units % parts parts hold one unit more
// than the others. In the contiguous layout a unit is `planes` whole planes (s, c).
// If chunks > 1, a unit is one chunk of a plane, and parts = units. In channels_last
// a unit is one pixel of all branches.
struct Split {
  int parts;
  int units;
  int planes;
  int chunks;
  int chunk;  // pixels
};

struct Plan {
  Variant variant;
  int cluster;  // blocks that share a sample (resident)
  // resident: the maps that a block holds a part of. 1: the features, or in the
  // backward pass their gradients. 2: both, in the backward pass.
  int pieces;
  int threads;  // of a block
  int blocks;
  int64_t shared_bytes;  // dynamic shared memory of a block
  int vector;            // elements of one access
  Split split;
  int lag;    // streaming: samples between a pool ticket and its reweight's
  int group;  // backward: samples whose weight gradients one block sums
};

struct Candidate {
  Plan plan;
  int64_t resident;  // the blocks that the device holds at once
};

// Sorts candidates, best first, and drops those that are slower than streaming. A streaming plan
// comes last.
void rank(const Problem& problem, const Device& device, std::vector<Candidate>& candidates);

// The candidates in that order. How many blocks are resident is an estimate: only the driver knows
// where clusters have room. Any device of compute capability 8.0 or more can run the last one.
std::vector<Candidate> plans(const Problem& problem, const Device& device);

// ---- shared memory and workspace of a plan, in bytes ----

// The dynamic shared memory of a block: the sum of the pieces that the kernels take,
// each rounded up to 16 bytes.
int64_t shared_bytes(const Problem& problem, const Plan& plan);

// Offsets into the workspace in device memory, each a multiple of 16 bytes. The
// first `cleared` bytes must be zero when the kernel starts.
struct Workspace {
  int64_t ticket;          // one 64-bit counter: streaming
  int64_t arrived, ready;  // [N] 32-bit: streaming
  int64_t cleared;
  int64_t groups_arrived;  // [groups + 1] LaunchCounter: backward
  int64_t partial;         // [N, partials]: streaming, sums of the parts
  int64_t hidden;          // [N, S, r]
  int64_t scratch;         // [N, S, C]: forward scores and factors, backward gradients da
  int64_t summands;        // [N, S, C]: epilogue, streaming
  int64_t grad_v;          // [N, S, C]: backward
  int64_t grad_u;          // [N, S, r]: backward
  int64_t grad_pooled;     // [N, S, C]: backward
  int64_t group_sums;      // [groups, weight elements]: backward
  int64_t bytes;
};
Workspace workspace(const Problem& problem, const Plan& plan);

}  // namespace epsa::cuda
