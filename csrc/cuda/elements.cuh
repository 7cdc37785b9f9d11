// The base of all kernels: elements and packs of them, the SE weights, a block's
// shared memory.
#pragma once

#include <type_traits>

#include "cuda/params.h"
#include "cuda/simt.cuh"

namespace epsa::cuda {

#define EPSA_FN EPSA_DEVICE
#include "ops/attention_math.inc"
#undef EPSA_FN

using simt::barrier;
using simt::block_threads;
using simt::kWarp;
using simt::thread_id;

// ---- elements: T in memory, the accumulation type in registers ----

template <class T>
constexpr Dtype dtype_of() = delete;
template <>
constexpr Dtype dtype_of<float>() {
  return Dtype::f32;
}
template <>
constexpr Dtype dtype_of<double>() {
  return Dtype::f64;
}
template <>
constexpr Dtype dtype_of<simt::bf16>() {
  return Dtype::bf16;
}
template <>
constexpr Dtype dtype_of<simt::f16>() {
  return Dtype::f16;
}

// The blocks that the launch bounds leave registers for on a multiprocessor.
template <class T>
constexpr int kMinBlocks = threads_by_registers(dtype_of<T>()) / kMaxThreads;

template <class T>
using Acc = AccumulationType<T>;

template <class T>
EPSA_DEVICE Acc<T> to_acc(T x) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    return x;
  } else {
    return simt::to_float(x);
  }
}

template <class T>
EPSA_DEVICE void from_acc(Acc<T> x, T& to) {
  if constexpr (std::is_same_v<T, Acc<T>>) {
    to = x;
  } else {
    simt::from_float(x, to);
  }
}

// V elements that are read or written at once. Elements of 16 bits stay pairs in words of 32 bits.
// Where a load has a condition, the compiler would take single ones out of their registers and put
// them back.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  static constexpr int kPerWord = sizeof(T) == 2 && V % 2 == 0 ? 2 : 1;
  static constexpr int kWords = V / kPerWord;
  std::conditional_t<kPerWord == 2, unsigned, T> words[kWords];

  // The elements of one word.
  EPSA_DEVICE void split(int word, Acc<T> (&x)[kPerWord]) const {
    if constexpr (kPerWord == 2) {
      simt::split_pair<T>(words[word], x[0], x[1]);
    } else {
      x[0] = to_acc(words[word]);
    }
  }
  EPSA_DEVICE void join(int word, const Acc<T> (&x)[kPerWord]) {
    if constexpr (kPerWord == 2) {
      words[word] = simt::make_pair<T>(x[0], x[1]);
    } else {
      from_acc<T>(x[0], words[word]);
    }
  }
};

// Replaces each element x, number v, by f(x, v).
template <class T, int V, class F>
EPSA_DEVICE void transform(Pack<T, V>& pack, const F& f) {
  constexpr int kPerWord = Pack<T, V>::kPerWord;
  for (int word = 0; word < V / kPerWord; ++word) {
    Acc<T> x[kPerWord];
    pack.split(word, x);
    for (int i = 0; i < kPerWord; ++i) {
      x[i] = f(x[i], word * kPerWord + i);
    }
    pack.join(word, x);
  }
}

template <int V, class T>
EPSA_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
EPSA_DEVICE void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Row n of a dense array [N, size] of A.
template <class A>
EPSA_DEVICE A* row_of(void* p, int n, int64_t size) {
  return static_cast<A*>(p) + n * size;
}
template <class A>
EPSA_DEVICE const A* row_of(const void* p, int n, int64_t size) {
  return static_cast<const A*>(p) + n * size;
}

// An SE weight. Its type is the accumulation type or the features' 16-bit type.
template <class T>
EPSA_DEVICE Acc<T> weight(const Params& p, const void* w, int i) {
  if constexpr (sizeof(T) == 2) {
    if (p.half_weights) {
      return to_acc(static_cast<const T*>(w)[i]);
    }
  }
  return static_cast<const Acc<T>*>(w)[i];
}

template <class T>
EPSA_DEVICE void store_weight(const Params& p, void* w, int i, Acc<T> x) {
  if constexpr (sizeof(T) == 2) {
    if (p.half_weights) {
      from_acc<T>(x, static_cast<T*>(w)[i]);
      return;
    }
  }
  static_cast<Acc<T>*>(w)[i] = x;
}

// ---- a block's shared memory, cut into pieces of multiples of 16 bytes ----

struct Shared {
  unsigned char* next = simt::shared_memory();

  template <class A>
  EPSA_DEVICE A* take(int64_t elements) {
    A* piece = reinterpret_cast<A*>(next);
    next += (elements * static_cast<int64_t>(sizeof(A)) + 15) / 16 * 16;
    return piece;
  }
};

// What thread 0 tells the others.
struct alignas(16) Message {
  unsigned long long ticket;
  bool last;
};

// Is this block the last of `expected` blocks to arrive? Then it sees all that the
// others wrote before they arrived. All threads call it.
EPSA_DEVICE bool last_to_arrive(unsigned* counter, int expected, Message* message) {
  barrier();
  if (thread_id() == 0) {
    message->last = static_cast<int>(simt::arrive(counter)) == expected - 1;
  }
  barrier();
  return message->last;
}

// A counter of arrivals that no memset precedes. Its memory may hold anything before the
// launch. Its upper bits tell for which launch it counts, see launch_number.h.
struct LaunchCounter {
  unsigned long long held;

  EPSA_DEVICE static int arrivals(unsigned long long held) {
    return static_cast<int>(held & ((1ull << kArrivalBits) - 1));
  }

  // Makes the counter one of this launch, unless another block has. Each block that will
  // arrive calls it before. Thread 0 alone acts, so its later arrival comes after.
  EPSA_DEVICE void begin(unsigned long long launch) {
    if (thread_id() == 0) {
      const unsigned long long before = simt::peek(&held);
      if (before >> kArrivalBits != launch) {
        simt::replace(&held, before, launch << kArrivalBits);
      }
    }
  }

  // The same as last_to_arrive above. The last block leaves a counter of no launch. A CUDA
  // graph may then launch this kernel with the same number again.
  EPSA_DEVICE bool last_to_arrive(int expected, Message* message) {
    barrier();
    if (thread_id() == 0) {
      message->last = arrivals(simt::arrive(&held)) == expected - 1;
      if (message->last) {
        held = 0;
      }
    }
    barrier();
    return message->last;
  }
};

}  // namespace epsa::cuda
