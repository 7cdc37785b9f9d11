// The functions of csrc/cuda/simt.cuh for a CPU. Every CUDA thread is a fiber that
// runs until a primitive below hands over to another fiber.
//
// All accesses to the kernels' own memory stand in this header and not in emulator/:
// the sanitizers watch this header.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/simt_types.h"
#include "types.h"

#define EPSA_DEVICE inline
#define EPSA_KERNEL(threads, blocks) void
#define EPSA_PARAMETER const

namespace epsa::cuda::simt {

namespace detail {

// A copy to shared memory that has not arrived, with the source's value at its start.
struct Copy {
  void* to;
  const void* from;
  uint64_t value[2];
};

// A thread's own numbers and memory.
struct Place {
  int thread = 0;
  int threads = 0;
  int64_t block = 0;
  unsigned char* shared = nullptr;
  std::vector<Copy> copies;
};
extern Place* here;  // the running thread's

// Another thread may go on here. `polled`: this thread must wait for another one; if
// all threads only poll, the launch is in a livelock. `progress`: this thread did
// something that others may wait for.
enum class Step { polled, neutral, progress };
void step(Step kind);

// Ends the launch with a report.
[[noreturn]] void fail(const char* what);

uint64_t exchange(uint64_t bits, int mask);
const void* peer(const void* shared, int rank);
bool in_shared_memory(const void* begin, int64_t bytes);

// All lanes of the warp show each other an object, until all of them have called `seen`.
void show(const void* mine, const void* (&of_lanes)[32]);
void seen();

}  // namespace detail

// ---- 16-bit floats: rounded to nearest even; NaN becomes CUDA's 0x7fff ----

using epsa::bf16;
using epsa::f16;

EPSA_DEVICE float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
EPSA_DEVICE float to_float(f16 x) {
  const uint32_t size = x.bits & 0x7fffu;
  const uint32_t shifted = size << 13;  // the exponent's bias is still f16's
  const float value = size >= 0x7c00u ? std::bit_cast<float>(shifted | 0x7f800000u)
                                      : std::bit_cast<float>(shifted) * 0x1p112f;
  return x.bits & 0x8000u ? -value : value;
}
EPSA_DEVICE void from_float(float x, bf16& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(x != x ? 0x7fffu : rounded);
}
EPSA_DEVICE void from_float(float x, f16& to) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t size = bits & 0x7fffffffu;
  uint32_t half = bits >> 16 & 0x8000u;
  if (x != x) {
    half = 0x7fffu;
  } else if (size >= 0x477ff000u) {  // 65520 and more round to infinity
    half |= 0x7c00u;
  } else if (size >= 0x38800000u) {  // normal: from 2^-14 on
    half |= (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
  } else {  // the unit of 0.5f is 2^-24, that of a subnormal f16
    const float sum = std::bit_cast<float>(size) + 0.5f;
    half |= std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f);
  }
  to.bits = static_cast<uint16_t>(half);
}
template <class T>
EPSA_DEVICE void split_pair(unsigned pair, float& first, float& second) {
  T halves[2];
  std::memcpy(halves, &pair, sizeof pair);
  first = to_float(halves[0]);
  second = to_float(halves[1]);
}
template <class T>
EPSA_DEVICE unsigned make_pair(float first, float second) {
  T halves[2];
  from_float(first, halves[0]);
  from_float(second, halves[1]);
  unsigned pair;
  std::memcpy(&pair, halves, sizeof pair);
  return pair;
}
EPSA_DEVICE float exponential(float x) {
  return std::exp(x);
}
EPSA_DEVICE double exponential(double x) {
  return std::exp(x);
}

// ---- threads of a block ----

constexpr int kWarp = 32;

EPSA_DEVICE int thread_id() {
  return detail::here->thread;
}
EPSA_DEVICE int block_threads() {
  return detail::here->threads;
}
EPSA_DEVICE int64_t block_id() {
  return detail::here->block;
}
EPSA_DEVICE int64_t block_id_read_again() {
  return detail::here->block;
}
EPSA_DEVICE unsigned char* shared_memory() {
  return detail::here->shared;
}

void barrier();

template <class A>
EPSA_DEVICE A shuffle_xor(A value, int mask) {
  static_assert(sizeof(A) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(A));
  bits = detail::exchange(bits, mask);
  std::memcpy(&value, &bits, sizeof(A));
  return value;
}

// ---- clusters ----

int cluster_rank();
void cluster_arrive();
void cluster_wait();

template <class A>
EPSA_DEVICE const A* cluster_peer(const A* shared, int rank) {
  return static_cast<const A*>(detail::peer(shared, rank));
}

// ---- the whole device ----

template <class Counter>
EPSA_DEVICE Counter arrive(Counter* counter) {
  const Counter before = __atomic_fetch_add(counter, Counter(1), __ATOMIC_ACQ_REL);
  detail::step(detail::Step::progress);
  return before;
}

EPSA_DEVICE unsigned long long peek(const unsigned long long* counter) {
  const unsigned long long held = __atomic_load_n(counter, __ATOMIC_RELAXED);
  detail::step(detail::Step::neutral);
  return held;
}
EPSA_DEVICE void replace(
    unsigned long long* counter, unsigned long long held, unsigned long long by) {
  __atomic_compare_exchange_n(counter, &held, by, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  detail::step(detail::Step::progress);
}

EPSA_DEVICE void publish(unsigned* flag) {
  __atomic_store_n(flag, 1u, __ATOMIC_RELEASE);
  detail::step(detail::Step::progress);
}
EPSA_DEVICE bool is_published(const unsigned* flag) {
  const bool set = __atomic_load_n(flag, __ATOMIC_ACQUIRE) != 0;
  detail::step(set ? detail::Step::neutral : detail::Step::polled);
  return set;
}

EPSA_DEVICE bool is_set(const unsigned* flag) {
  const bool set = __atomic_load_n(flag, __ATOMIC_RELAXED) != 0;
  detail::step(set ? detail::Step::neutral : detail::Step::polled);
  return set;
}

EPSA_DEVICE unsigned long long next_ticket(unsigned long long* counter) {
  const auto ticket = __atomic_fetch_add(counter, 1ull, __ATOMIC_RELAXED);
  detail::step(detail::Step::progress);
  return ticket;
}

EPSA_DEVICE void pause() {
  detail::step(detail::Step::polled);
}

// ---- stores, and asynchronous copies: they arrive as late as CUDA allows ----

template <class T, class Pack>
EPSA_DEVICE void store_evict_first(T* to, const Pack& pack) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) {
    detail::fail("misaligned store_evict_first");
  }
  *reinterpret_cast<Pack*>(to) = pack;
}

EPSA_DEVICE void copy_async16(void* shared, const void* global) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if (address(shared) % 16 != 0 || address(global) % 16 != 0) {
    detail::fail("misaligned copy_async16");
  }
  if (!detail::in_shared_memory(shared, 16)) {
    detail::fail("copy_async16 to outside of the block's shared memory");
  }
  detail::Copy copy{shared, global, {}};
  std::memcpy(copy.value, global, 16);
  std::memset(shared, 0xff, 16);  // until the wait, neither old nor new
  detail::here->copies.push_back(copy);
}
EPSA_DEVICE void copy_async_wait() {
  for (const detail::Copy& copy : detail::here->copies) {
    if (std::memcmp(copy.value, copy.from, 16) != 0) {
      detail::fail("the source of a copy_async16 changed before its wait");
    }
    std::memcpy(copy.to, copy.value, 16);
  }
  detail::here->copies.clear();
  detail::step(detail::Step::progress);
}

// ---- tensor cores ----

EPSA_DEVICE Half4 load_once(const Half4* p) {
  return *p;
}

EPSA_DEVICE Matrices load_matrices(int place) {
  const unsigned char* row = shared_memory() + place;
  if (place % 16 != 0) {
    detail::fail("misaligned load_matrices");
  }
  if (!detail::in_shared_memory(row, 16)) {
    detail::fail("load_matrices outside of the block's shared memory");
  }
  const int lane = thread_id() % kWarp;
  const void* rows[kWarp];
  detail::show(row, rows);
  Matrices m;
  for (int i = 0; i < 4; ++i) {
    const void* of_matrix = rows[8 * i + lane / 4];
    std::memcpy(&m.words[i], static_cast<const unsigned char*>(of_matrix) + lane % 4 * 4, 4);
  }
  detail::seen();
  return m;
}

template <class T>
EPSA_DEVICE void multiply_add(float (&sums)[4], const Matrices& a, const Half4& b) {
  struct Both {
    Matrices a;
    Half4 b;
  };
  const Both mine{a, b};
  const void* of_lanes[kWarp];
  detail::show(&mine, of_lanes);
  const auto value = [](uint32_t word, int upper) {
    T half;
    half.bits = static_cast<uint16_t>(word >> 16 * upper);
    return to_float(half);
  };
  const int lane = thread_id() % kWarp;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const auto* left = static_cast<const Both*>(of_lanes[row % 8 * 4 + k % 8 / 2]);
      const auto* right = static_cast<const Both*>(of_lanes[column * 4 + k % 8 / 2]);
      sums[i] +=
          value(left->a.words[row / 8 + k / 8 * 2], k % 2) * value(right->b.words[k / 8], k % 2);
    }
  }
  detail::seen();
}

template <class T>
EPSA_DEVICE void store_pair(T* to, float first, float second) {
  if (reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) != 0) {
    detail::fail("misaligned store_pair");
  }
  from_float(first, to[0]);
  from_float(second, to[1]);
}

}  // namespace epsa::cuda::simt
