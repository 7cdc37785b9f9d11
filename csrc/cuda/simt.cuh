// What the kernels need of the machine, each behind a name of its own: threads,
// barriers, clusters, device-wide arrivals, asynchronous copies, 16-bit floats.
//
// Nothing else in the kernels (psa_*.cuh) is special to CUDA, so that the same
// source runs on a CPU: with EPSA_EMULATED the bodies come from tests/simt.
#pragma once

#include <cstdint>

#ifdef EPSA_EMULATED

#include "emulated_simt.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EPSA_DEVICE __device__ __forceinline__
// Registers for at least `blocks` resident blocks of `threads` threads.
#define EPSA_KERNEL(threads, blocks) \
  __global__ void __launch_bounds__(threads, blocks)
// A parameter that is indexed at run time must stay in the constant bank: else
// the compiler copies it to the stack.
#define EPSA_PARAMETER const __grid_constant__

namespace epsa::cuda::simt {

using bf16 = __nv_bfloat16;
using f16 = __half;

EPSA_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
EPSA_DEVICE float to_float(f16 x) { return __half2float(x); }
EPSA_DEVICE void from_float(float x, bf16& to) { to = __float2bfloat16_rn(x); }
EPSA_DEVICE void from_float(float x, f16& to) { to = __float2half_rn(x); }
EPSA_DEVICE float exponential(float x) { return expf(x); }
EPSA_DEVICE double exponential(double x) { return exp(x); }

// ---- threads of a block (one-dimensional blocks and grids) ----

constexpr int kWarp = 32;

EPSA_DEVICE int thread_id() { return static_cast<int>(threadIdx.x); }
EPSA_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
EPSA_DEVICE int block_id() { return static_cast<int>(blockIdx.x); }

// The block's dynamic shared memory, aligned to 16 bytes.
EPSA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// All threads of the block; orders their accesses to shared and global memory.
EPSA_DEVICE void barrier() { __syncthreads(); }

// The value of the lane whose number differs by `mask`; all lanes take part.
template <class A>
EPSA_DEVICE A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- clusters: the blocks [k * size, (k + 1) * size) of the grid ----
// Blocks of a launch without clusters never call these; on an architecture that
// has none a call traps (the plan never asks for it).

EPSA_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  __trap();
  return 0;
#endif
}

// A barrier in two halves, over all threads of the cluster's blocks: what was
// written before the first is seen after the second.
EPSA_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
EPSA_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// This block's shared address in the block of another rank, which must not have
// exited.
template <class A>
EPSA_DEVICE const A* cluster_peer(const A* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const A*>(
      __cluster_map_shared_rank(const_cast<A*>(shared), rank));
#else
  __trap();
  return shared;
#endif
}

// ---- the whole device: one thread calls these for its block, a barrier before
// `arrive` and `publish` and one after `arrive` and `is_published` carry the
// order over to the block's other threads ----

// Adds one; returns how many had arrived before. What any of them wrote before
// it arrived is seen by those who arrive later.
EPSA_DEVICE unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(1u)
               : "memory");
  return before;
}

// Sets a flag: who sees it set sees what was written before.
EPSA_DEVICE void publish(unsigned* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1u)
               : "memory");
}
EPSA_DEVICE bool is_published(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(flag)
               : "memory");
  return value != 0;
}

// Tickets are handed out in order, and order nothing else.
EPSA_DEVICE unsigned long long next_ticket(unsigned long long* counter) {
  return atomicAdd(counter, 1ull);
}

// In a loop that waits for another block.
EPSA_DEVICE void pause() { __nanosleep(64); }

// ---- asynchronous copies ----

// 16 bytes from global to shared memory, both aligned. They have arrived for
// this thread after copy_async_wait, for the block after a barrier behind it.
EPSA_DEVICE void copy_async16(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
               "l"(global)
               : "memory");
}
EPSA_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace epsa::cuda::simt

#endif
