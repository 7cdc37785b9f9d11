// The kernels' only access to the machine: threads, barriers, clusters, device-wide
// arrivals, asynchronous copies, 16-bit floats, tensor cores.
//
// No other kernel source depends on CUDA. So the same source runs on a CPU: with
// EPSA_EMULATED, tests/simt provides these functions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/simt_types.h"

#ifdef EPSA_EMULATED

#include "emulated_simt.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EPSA_DEVICE __device__ __forceinline__
// Registers for at least `blocks` resident blocks of `threads` threads.
#define EPSA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Keeps a parameter that is indexed at run time in the constant bank. The compiler
// would copy it to the stack.
#define EPSA_PARAMETER const __grid_constant__

namespace epsa::cuda::simt {

using bf16 = __nv_bfloat16;
using f16 = __half;

EPSA_DEVICE float to_float(bf16 x) {
  return __bfloat162float(x);
}
EPSA_DEVICE float to_float(f16 x) {
  return __half2float(x);
}
EPSA_DEVICE void from_float(float x, bf16& to) {
  to = __float2bfloat16_rn(x);
}
EPSA_DEVICE void from_float(float x, f16& to) {
  to = __float2half_rn(x);
}

// Two neighbouring elements as they lie in memory, the first in the lower half.
template <class T>
EPSA_DEVICE void split_pair(unsigned pair, float& first, float& second) {
  if constexpr (std::is_same_v<T, bf16>) {  // the upper half of a float
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    first = both.x;
    second = both.y;
  }
}
template <class T>
EPSA_DEVICE unsigned make_pair(float first, float second) {
  using Pair = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
  Pair pair;
  if constexpr (std::is_same_v<T, bf16>) {
    pair = __floats2bfloat162_rn(first, second);
  } else {
    pair = __floats2half2_rn(first, second);
  }
  return *reinterpret_cast<const unsigned*>(&pair);
}
EPSA_DEVICE float exponential(float x) {
  return expf(x);
}
EPSA_DEVICE double exponential(double x) {
  return exp(x);
}

// ---- threads of a block (one-dimensional blocks and grids) ----

constexpr int kWarp = 32;

EPSA_DEVICE int thread_id() {
  return static_cast<int>(threadIdx.x);
}
EPSA_DEVICE int block_threads() {
  return static_cast<int>(blockDim.x);
}
EPSA_DEVICE int block_id() {
  return static_cast<int>(blockIdx.x);
}

// The same. The compiler does not know that, so the value takes no register before.
EPSA_DEVICE int block_id_read_again() {
  int id;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(id));
  return id;
}

// The block's dynamic shared memory, aligned to 16 bytes.
EPSA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// All threads of the block meet. It orders their accesses to shared and global
// memory.
EPSA_DEVICE void barrier() {
  __syncthreads();
}

// The value of lane `own lane ^ mask`. All lanes of the warp must call it.
template <class A>
EPSA_DEVICE A shuffle_xor(A value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- clusters: the blocks [k * size, (k + 1) * size) of the grid ----
// Only blocks of a launch with clusters call these. A call traps on an architecture
// without clusters; no plan asks for one there.

EPSA_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  return static_cast<int>(__clusterRelativeBlockRank());
#else
  __trap();
  return 0;
#endif
}

// A barrier in two halves, for all threads of the cluster's blocks. All that was
// written before the first half is seen after the second.
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

// Maps this block's shared address to the block of another rank. That block must
// not have exited.
template <class A>
EPSA_DEVICE const A* cluster_peer(const A* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return static_cast<const A*>(__cluster_map_shared_rank(const_cast<A*>(shared), rank));
#else
  __trap();
  return shared;
#endif
}

// ---- the whole device ----
// One thread calls these for its block. Barriers extend the order to the block's
// other threads: one before `arrive` and `publish`, one after `arrive` and
// `is_published`.

// Adds one and returns what the counter held. A block that arrives sees all that
// earlier ones wrote before they arrived.
EPSA_DEVICE unsigned arrive(unsigned* counter) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(1u)
               : "memory");
  return before;
}
EPSA_DEVICE unsigned long long arrive(unsigned long long* counter) {
  unsigned long long before;
  asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
               : "=l"(before)
               : "l"(counter), "l"(1ull)
               : "memory");
  return before;
}

// What a counter holds now, and its replacement where it still holds `held`. They
// order no other access.
EPSA_DEVICE unsigned long long peek(const unsigned long long* counter) {
  unsigned long long held;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(held) : "l"(counter) : "memory");
  return held;
}
EPSA_DEVICE void replace(
    unsigned long long* counter, unsigned long long held, unsigned long long by) {
  atomicCAS(counter, held, by);
}

// Sets a flag. A block that sees the flag set sees all that was written before.
EPSA_DEVICE void publish(unsigned* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1u) : "memory");
}
EPSA_DEVICE bool is_published(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}

// Is the flag set? It orders nothing. So the caches stay valid, and a loop may ask often.
EPSA_DEVICE bool is_set(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value != 0;
}

// The next number. It orders no other access.
EPSA_DEVICE unsigned long long next_ticket(unsigned long long* counter) {
  return atomicAdd(counter, 1ull);
}

// For loops that wait for another block.
EPSA_DEVICE void pause() {
  __nanosleep(64);
}

// ---- stores and asynchronous copies ----

// Writes 16 bytes, aligned, that this launch does not read. They leave the L2 cache
// before what it reads again.
template <class T, class Pack>
EPSA_DEVICE void store_evict_first(T* to, const Pack& pack) {
  static_assert(sizeof(Pack) == 16);
  __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&pack));
}

// Copies 16 bytes from global to shared memory, both aligned. They have arrived for
// this thread after copy_async_wait, for the block after the next barrier.
EPSA_DEVICE void copy_async16(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
EPSA_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- matrices of 16-bit floats on tensor cores: all lanes of a warp call these ----

EPSA_DEVICE Half4 load_once(const Half4* p) {
  const uint2 words = __ldg(reinterpret_cast<const uint2*>(p));
  return {{words.x, words.y}};
}

// Lanes 0 to 15 give the rows' first 8 elements, the others their last 8: the place in shared
// memory, in bytes.
EPSA_DEVICE Matrices load_matrices(int place) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared_memory())) +
      static_cast<unsigned>(place);
  Matrices m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.words[0]), "=r"(m.words[1]), "=r"(m.words[2]), "=r"(m.words[3])
               : "r"(from)
               : "memory");
  return m;
}

// sums [16, 8] += a b. A lane has two neighbouring columns, 2 * (l % 4), of row l / 4 and of
// the row 8 below.
template <class T>
EPSA_DEVICE void multiply_add(float (&sums)[4], const Matrices& a, const Half4& b) {
#define EPSA_MULTIPLY(type)                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
               : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]),  \
                 "r"(b.words[0]), "r"(b.words[1]))
  if constexpr (std::is_same_v<T, bf16>) {
    EPSA_MULTIPLY("bf16");
  } else {
    EPSA_MULTIPLY("f16");
  }
#undef EPSA_MULTIPLY
}

// Two neighbouring elements, the first at an even place.
template <class T>
EPSA_DEVICE void store_pair(T* to, float first, float second) {
  *reinterpret_cast<unsigned*>(to) = make_pair<T>(first, second);
}

}  // namespace epsa::cuda::simt

#endif
