// SIMD vectors of the accumulation type, over GCC's vector extension.
//
// Included once per instruction set, inside its namespace and its target
// region (no include guard), with EPSA_VEC_BYTES as the register's size.

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(EPSA_VEC_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;

template <class To, class From>
EPSA_FN To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

typedef uint32_t U32 __attribute__((vector_size(EPSA_VEC_BYTES)));
// as many 16-bit items as U32 has lanes
typedef uint16_t U16 __attribute__((vector_size(EPSA_VEC_BYTES / 2)));

// ---- conversion of 16-bit floats, as many as a register holds floats ----

EPSA_FN Vec<float> widen(U16 h, bf16*) {
  return bit_cast<Vec<float>>(__builtin_convertvector(h, U32) << 16);
}

EPSA_FN U16 narrow(Vec<float> f, bf16*) {  // to nearest, ties to even
  const U32 u = bit_cast<U32>(f);
  const U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const U32 quiet_nan = U32{} + 0x7fc0;
  const U32 bits = (u & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded;
  return __builtin_convertvector(bits, U16);
}

#if EPSA_VEC_BYTES == 64
EPSA_FN Vec<float> widen(U16 h, f16*) {
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
}
EPSA_FN U16 narrow(Vec<float> f, f16*) {
  return (U16)_mm512_cvtps_ph(
      (__m512)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif EPSA_VEC_BYTES == 32
EPSA_FN Vec<float> widen(U16 h, f16*) {
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
}
EPSA_FN U16 narrow(Vec<float> f, f16*) {
  return (U16)_mm256_cvtps_ph(
      (__m256)f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
EPSA_FN Vec<float> widen(U16 h, f16*) {
  const U32 u = __builtin_convertvector(h, U32);
  // Exponent and mantissa moved into a float's fields, then scaled by 2^112:
  // the difference of the two exponent biases. Exact, subnormals included.
  const Vec<float> scaled =
      bit_cast<Vec<float>>((u & 0x7fff) << 13) * 0x1p112f;
  const U32 special = U32{} + 0x7f800000;
  const U32 magnitude = bit_cast<U32>(scaled) |
      ((u & 0x7c00) == 0x7c00 ? special : U32{});
  return bit_cast<Vec<float>>(magnitude | ((u & 0x8000) << 16));
}
EPSA_FN U16 narrow(Vec<float> f, f16*) {  // to nearest, ties to even
  const U32 u = bit_cast<U32>(f);
  const U32 sign = (u >> 16) & 0x8000;
  const U32 x = u & 0x7fffffff;
  // Below the least normal half: adding 0.5 aligns the last half bit with the
  // last float bit, so that the float adder does the rounding.
  const Vec<float> aligned = bit_cast<Vec<float>>(x) + 0.5f;
  const U32 subnormal = bit_cast<U32>(aligned) - 0x3f000000;
  const U32 normal = (x - 0x38000000 + 0xfff + ((x >> 13) & 1)) >> 13;
  const U32 infinity = U32{} + 0x7c00;
  const U32 quiet_nan = U32{} + 0x7e00;
  U32 bits = x < 0x38800000 ? subnormal : normal;
  bits = x >= 0x47800000 ? infinity : bits;
  bits = x > 0x7f800000 ? quiet_nan : bits;
  return __builtin_convertvector(bits | sign, U16);
}
#endif

// ---- lanes ----

template <class A>
struct LanesOf {  // 0, 1, 2, ... as integers of A's size
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Int;
  typedef Int type __attribute__((vector_size(EPSA_VEC_BYTES)));
  static EPSA_FN type get() {
    type lanes{};
    for (unsigned i = 0; i < EPSA_VEC_BYTES / sizeof(A); ++i) {
      lanes[i] = static_cast<Int>(i);
    }
    return lanes;
  }
};

// v in the lanes [begin, end), zero in the others (whatever stands there, NaN
// included)
template <class A>
EPSA_FN Vec<A> keep_lanes(Vec<A> v, int64_t begin, int64_t end) {
  using Int = typename LanesOf<A>::Int;
  const auto lane = LanesOf<A>::get();
  const auto kept =
      (lane >= static_cast<Int>(begin)) & (lane < static_cast<Int>(end));
  return kept ? v : Vec<A>{};
}

// ---- loads and stores: T in memory, the accumulation type in registers ----

template <class T>
struct Memory {  // float and double
  using Acc = T;
  using V = Vec<T>;
  static constexpr int width = EPSA_VEC_BYTES / sizeof(T);
  typedef T Unaligned
      __attribute__((vector_size(EPSA_VEC_BYTES), aligned(sizeof(T)), may_alias));

  static EPSA_FN V load(const T* p) {
    return *reinterpret_cast<const Unaligned*>(p);
  }
  static EPSA_FN void store(T* p, V v) {
    *reinterpret_cast<Unaligned*>(p) = v;
  }
  // the first n lanes, 0 < n < width; the other lanes of a load are zero
  static EPSA_FN V load(const T* p, int64_t n) {
#if EPSA_VEC_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      return (V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
    } else {
      return (V)_mm512_maskz_loadu_pd((1u << n) - 1, p);
    }
#elif EPSA_VEC_BYTES == 32
    if constexpr (sizeof(T) == 4) {
      return (V)_mm256_maskload_ps(p, (__m256i)mask(n));
    } else {
      return (V)_mm256_maskload_pd(p, (__m256i)mask(n));
    }
#else
    T lanes[width] = {};
    for (int64_t i = 0; i < n; ++i) {
      lanes[i] = p[i];
    }
    return load(lanes);
#endif
  }
  static EPSA_FN void store(T* p, V v, int64_t n) {
#if EPSA_VEC_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
    } else {
      _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)v);
    }
#elif EPSA_VEC_BYTES == 32
    if constexpr (sizeof(T) == 4) {
      _mm256_maskstore_ps(p, (__m256i)mask(n), (__m256)v);
    } else {
      _mm256_maskstore_pd(p, (__m256i)mask(n), (__m256d)v);
    }
#else
    for (int64_t i = 0; i < n; ++i) {
      p[i] = v[i];
    }
#endif
  }

#if EPSA_VEC_BYTES == 32
 private:
  static EPSA_FN auto mask(int64_t n) {  // all ones in the first n lanes
    return LanesOf<T>::get() < static_cast<typename LanesOf<T>::Int>(n);
  }
#endif
};

template <class T>
struct HalfMemory {  // bf16 and f16
  using Acc = float;
  using V = Vec<float>;
  static constexpr int width = EPSA_VEC_BYTES / sizeof(float);

  static EPSA_FN V load(const T* p) {
    U16 h;
    __builtin_memcpy(&h, p, sizeof h);
    return widen(h, static_cast<T*>(nullptr));
  }
  static EPSA_FN void store(T* p, V v) {
    const U16 h = narrow(v, static_cast<T*>(nullptr));
    __builtin_memcpy(p, &h, sizeof h);
  }
  static EPSA_FN V load(const T* p, int64_t n) {
#if EPSA_VEC_BYTES == 64
    return widen(
        (U16)_mm256_maskz_loadu_epi16((1u << n) - 1, p),
        static_cast<T*>(nullptr));
#else
    T lanes[width] = {};
    for (int64_t i = 0; i < n; ++i) {
      lanes[i] = p[i];
    }
    return load(lanes);
#endif
  }
  static EPSA_FN void store(T* p, V v, int64_t n) {
    const U16 h = narrow(v, static_cast<T*>(nullptr));
#if EPSA_VEC_BYTES == 64
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)h);
#else
    for (int64_t i = 0; i < n; ++i) {
      p[i].bits = h[i];
    }
#endif
  }
};
template <>
struct Memory<bf16> : HalfMemory<bf16> {};
template <>
struct Memory<f16> : HalfMemory<f16> {};

// ---- sum of all lanes, in a fixed order ----

EPSA_FN float sum_lanes(Vec<float> v) {
#if EPSA_VEC_BYTES == 64
  return _mm512_reduce_add_ps((__m512)v);
#elif EPSA_VEC_BYTES == 32
  __m128 x = _mm_add_ps(
      _mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

EPSA_FN double sum_lanes(Vec<double> v) {
  double sum = 0;
  for (unsigned i = 0; i < EPSA_VEC_BYTES / sizeof(double); ++i) {
    sum += v[i];
  }
  return sum;
}

// ---- exp ----

// Cody and Waite's reduction x = k ln2 + f with |f| <= ln2 / 2, and the Taylor
// series of e^f to degree 7 (truncation under 6e-9 relative, below float's
// rounding). Infinite from 2^127.5 on, so that sigmoid(-inf) is exactly zero; not
// below the least normal number; NaN stays NaN.
EPSA_FN Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  const V low = V{} - 87.33654f, high = V{} + 89.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const float round = 0x1.8p23f;  // adding it rounds to an integer
  const V shifted = x * 0x1.715476p+0f + round;  // 1 / ln 2
  const V k = shifted - round;
  // ln 2 in two parts; k times the first is exact
  const V f = (x - k * 0x1.62e4p-1f) - k * 0x1.7f7d1cp-20f;
  V e = f * (1.0f / 5040) + 1.0f / 720;
  e = e * f + 1.0f / 120;
  e = e * f + 1.0f / 24;
  e = e * f + 1.0f / 6;
  e = e * f + 0.5f;
  e = e * f + 1.0f;
  e = e * f + 1.0f;
  // 2^k: k stands in the low bits of `shifted`, the bias is added; k = 128 gives
  // the bits of infinity
  return e * bit_cast<V>((bit_cast<U32>(shifted) << 23) + 0x3f800000);
}

// double serves gradient checks: the library's function, lane by lane
EPSA_FN Vec<double> exp(Vec<double> x) {
  for (unsigned i = 0; i < EPSA_VEC_BYTES / sizeof(double); ++i) {
    x[i] = std::exp(x[i]);
  }
  return x;
}
