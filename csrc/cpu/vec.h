// One vector type over every instruction set: the compiler's vector extensions, with intrinsics
// only where they say something the extensions cannot (half-precision conversion, masked tails,
// scalef).
//
// Included by per-ISA sources only. Everything lives in pyfuse::cpu::<isa>, so the copies compiled
// for different machines never meet; for the same reason no std:: template may be used here
// (the linker may keep the AVX-512 copy of a shared inline function for every machine).
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define PYFUSE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define PYFUSE_VECTOR_BYTES 32
#else
#define PYFUSE_VECTOR_BYTES 16
#endif

#define PYFUSE_INLINE inline __attribute__((always_inline))
#define PYFUSE_UNROLL _Pragma("GCC unroll 32")

namespace pyfuse::cpu::PYFUSE_ISA {

// Storage types of two bytes; arithmetic happens in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float vfloat __attribute__((vector_size(PYFUSE_VECTOR_BYTES)));
typedef int32_t vint __attribute__((vector_size(PYFUSE_VECTOR_BYTES)));
typedef uint32_t vuint __attribute__((vector_size(PYFUSE_VECTOR_BYTES)));
typedef double vdouble __attribute__((vector_size(PYFUSE_VECTOR_BYTES)));
typedef int64_t vlong __attribute__((vector_size(PYFUSE_VECTOR_BYTES)));
typedef uint16_t vhalf __attribute__((vector_size(PYFUSE_VECTOR_BYTES / 2)));

// Vec<C>: C in {float, double} is what is computed in. Stored<T>::compute maps a storage type to
// it.
template <class C>
struct Vec;
template <>
struct Vec<float> {
  typedef vfloat type;
  typedef vint mask;
  static constexpr int width = PYFUSE_VECTOR_BYTES / 4;
};
template <>
struct Vec<double> {
  typedef vdouble type;
  typedef vlong mask;
  static constexpr int width = PYFUSE_VECTOR_BYTES / 8;
};
template <class T>
struct Stored {
  typedef float compute;
};
template <>
struct Stored<double> {
  typedef double compute;
};

template <class T>
using compute_t = typename Stored<T>::compute;
template <class T>
using vec_t = typename Vec<compute_t<T>>::type;
template <class T>
constexpr int width = Vec<compute_t<T>>::width;

// x - 0 is x for every x; x + 0 is not (-0), and would cost an addition each time.
template <class C>
PYFUSE_INLINE typename Vec<C>::type splat(C x) {
  return x - typename Vec<C>::type{};
}
template <class V>
PYFUSE_INLINE V max(V a, V b) {
  return a > b ? a : b;
}

// 0, 1, 2, ... in the lanes.
template <class C>
PYFUSE_INLINE typename Vec<C>::type iota() {
  typename Vec<C>::type v{};
  PYFUSE_UNROLL for (int i = 0; i < Vec<C>::width; ++i) v[i] = static_cast<C>(i);
  return v;
}

// ---- scalar conversions -----------------------------------------------------------------------

PYFUSE_INLINE float bits_to_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
PYFUSE_INLINE uint32_t float_to_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

PYFUSE_INLINE float to_compute(float x) { return x; }
PYFUSE_INLINE double to_compute(double x) { return x; }
PYFUSE_INLINE float to_compute(bf16 x) {
  return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
PYFUSE_INLINE float to_compute(f16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff;
  if (exponent == 0) {  // zero or subnormal: fraction · 2^-24 is exact
    const float f = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
#endif
}

PYFUSE_INLINE void from_compute(float x, float& y) { y = x; }
PYFUSE_INLINE void from_compute(double x, double& y) { y = x; }
PYFUSE_INLINE void from_compute(float x, bf16& y) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // nearest, ties to even
  y.bits = static_cast<uint16_t>(x != x ? 0x7fc0 | (bits >> 16) : rounded);
}
PYFUSE_INLINE void from_compute(float x, f16& y) {
#if defined(__F16C__)
  y.bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = float_to_bits(x), sign = (bits >> 16) & 0x8000,
                 magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {  // NaN
    y.bits = static_cast<uint16_t>(sign | 0x7e00);
  } else if (magnitude >= 0x477ff000) {  // rounds past 65504
    y.bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // subnormal: adding 0.5 aligns and rounds the fraction
    const float f = bits_to_float(magnitude) + 0.5f;
    y.bits = static_cast<uint16_t>(sign | (float_to_bits(f) - 0x3f000000));
  } else {
    const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
    y.bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
#endif
}

// ---- whole vectors ----------------------------------------------------------------------------

PYFUSE_INLINE vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof v);
  return v;
}
PYFUSE_INLINE vdouble load(const double* p) {
  vdouble v;
  memcpy(&v, p, sizeof v);
  return v;
}
PYFUSE_INLINE vfloat load(const bf16* p) {
#if defined(__AVX512F__)  // one widening load; GCC 12 makes four instructions of the conversion
                          // below
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif defined(__AVX2__)
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
#else
  vhalf h;
  memcpy(&h, p, sizeof h);
  return (vfloat)(__builtin_convertvector(h, vuint) << 16);
#endif
}
PYFUSE_INLINE vfloat load(const f16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < Vec<float>::width; ++i) v[i] = to_compute(p[i]);
  return v;
#endif
}

PYFUSE_INLINE void store(float* p, vfloat v) { memcpy(p, &v, sizeof v); }
PYFUSE_INLINE void store(double* p, vdouble v) { memcpy(p, &v, sizeof v); }
PYFUSE_INLINE void store(bf16* p, vfloat v) {
#if defined(__AVX512BF16__)  // takes numbers below 2^-126 for zero
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vuint quiet_nan = (bits >> 16) | 0x7fc0;
  const vhalf h = __builtin_convertvector(v != v ? quiet_nan : rounded, vhalf);
  memcpy(p, &h, sizeof h);
#endif
}
PYFUSE_INLINE void store(f16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Vec<float>::width; ++i) from_compute(v[i], p[i]);
#endif
}

// ---- tails: the first n of a vector's lanes, 0 <= n <= width; the other lanes load as zero -----

#if defined(__AVX512F__)
PYFUSE_INLINE __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
PYFUSE_INLINE vfloat load(const float* p, int64_t n) {
  return (vfloat)_mm512_maskz_loadu_ps(lanes(n), p);
}
PYFUSE_INLINE void store(float* p, vfloat v, int64_t n) {
  _mm512_mask_storeu_ps(p, lanes(n), (__m512)v);
}
#else
PYFUSE_INLINE vfloat load(const float* p, int64_t n) {
  float lane[Vec<float>::width] = {};
  memcpy(lane, p, static_cast<size_t>(n) * sizeof *p);
  return load(lane);
}
PYFUSE_INLINE void store(float* p, vfloat v, int64_t n) {
  memcpy(p, &v, static_cast<size_t>(n) * sizeof *p);
}
#endif
PYFUSE_INLINE vdouble load(const double* p, int64_t n) {
  double lane[Vec<double>::width] = {};
  memcpy(lane, p, static_cast<size_t>(n) * sizeof *p);
  return load(lane);
}
PYFUSE_INLINE void store(double* p, vdouble v, int64_t n) {
  memcpy(p, &v, static_cast<size_t>(n) * sizeof *p);
}
template <class Half>
PYFUSE_INLINE vfloat load_half(const Half* p, int64_t n) {
  Half lane[Vec<float>::width] = {};
#if defined(__AVX512F__)
  const __m256i h = _mm256_maskz_loadu_epi16(lanes(n), p);
  memcpy(lane, &h, sizeof h);  // stays in a register: sizes are constant
#else
  memcpy(lane, p, static_cast<size_t>(n) * sizeof *p);
#endif
  return load(lane);
}
template <class Half>
PYFUSE_INLINE void store_half(Half* p, vfloat v, int64_t n) {
  Half lane[Vec<float>::width];
  store(lane, v);
  memcpy(p, lane, static_cast<size_t>(n) * sizeof *p);
}
PYFUSE_INLINE vfloat load(const bf16* p, int64_t n) { return load_half(p, n); }
PYFUSE_INLINE vfloat load(const f16* p, int64_t n) { return load_half(p, n); }
PYFUSE_INLINE void store(bf16* p, vfloat v, int64_t n) { store_half(p, v, n); }
PYFUSE_INLINE void store(f16* p, vfloat v, int64_t n) { store_half(p, v, n); }

// ---- reductions: a fixed tree, so that a sum does not depend on who computes it ----------------

PYFUSE_INLINE float reduce_add(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lane[Vec<float>::width];
  store(lane, v);
  for (int step = Vec<float>::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
#endif
}
PYFUSE_INLINE double reduce_add(vdouble v) {
  double lane[Vec<double>::width];
  store(lane, v);
  for (int step = Vec<double>::width / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  return lane[0];
}
PYFUSE_INLINE float reduce_max(vfloat v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float m = v[0];
  PYFUSE_UNROLL for (int i = 1; i < Vec<float>::width; ++i) m = v[i] > m ? v[i] : m;
  return m;
#endif
}
PYFUSE_INLINE double reduce_max(vdouble v) {
  double m = v[0];
  PYFUSE_UNROLL for (int i = 1; i < Vec<double>::width; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
