// Vector exp, exp2, tanh and erf-free activations on top of vec.h. Each states its error.
#pragma once
#include <math.h>

#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// 2^x, error ≤ 1 ulp for normal results (checked over every float by tests/cpp); exp2(-inf) = 0,
// results below the normal range become 0 (AVX-512: subnormal), above it +inf; NaN stays NaN.
// x = n + f with |f| ≤ 1/2; 2^f is a minimax polynomial of degree 6 on that interval.
PYFUSE_INLINE vfloat exp2(vfloat x) {
  constexpr float c0 = 1.0f, c1 = 0.69314718f, c2 = 0.24022651f, c3 = 0.055504109f,
                  c4 = 0.0096181291f, c5 = 0.0013333558f, c6 = 0.00015403530f;
#if defined(__AVX512F__)
  // Finite bounds keep x - n from being inf - inf; max and min return their second operand for NaN.
  const vfloat bounded = (vfloat)_mm512_min_ps(_mm512_set1_ps(200.f),
                                               _mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x));
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)bounded, _MM_FROUND_TO_NEAREST_INT);
#else
  const vfloat bounded = x < -200.f ? splat(-200.f) : x > 200.f ? splat(200.f) : x;
  const vfloat magic = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer
  const vfloat n = (bounded + magic) - magic;
#endif
  const vfloat f = bounded - n;
  vfloat p = c5 + f * c6;
  p = c4 + f * p;
  p = c3 + f * p;
  p = c2 + f * p;
  p = c1 + f * p;
  p = c0 + f * p;
#if defined(__AVX512F__)
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two factors, so that 2^n itself may lie outside the range of a float.
  const vint whole = __builtin_convertvector(n != n ? splat(0.f) : n, vint);
  const vint half = whole >> 1;
  const vfloat scaled = p * (vfloat)((half + 127) << 23) * (vfloat)((whole - half + 127) << 23);
  return whole < -126 ? splat(0.f) : scaled;
#endif
}

// Double precision serves gradient checks, where exactness matters and speed does not.
PYFUSE_INLINE vdouble exp2(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] = ::exp2(x[i]);
  return x;
}

constexpr double log2_e = 1.4426950408889634074;
constexpr double ln_2 = 0.69314718055994530942;

// e^x with the rounding error of x·log2(e) put back: error ≤ 2 ulp.
PYFUSE_INLINE vfloat exp(vfloat x) {
  const vfloat high = x * static_cast<float>(log2_e);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  // high = fl(x·c); x·c - high in one fused step, plus the part of log2(e) below float precision.
  const vfloat low = (x * static_cast<float>(log2_e) - high) + x * 1.925963033500e-08f;
#else
  const vfloat low = x * 1.925963033500e-08f;
#endif
  const vfloat y = exp2(high);
  // An infinite x makes the correction infinite or NaN; y is already right there.
  const vfloat corrected = y + y * (low * static_cast<float>(ln_2));
  return (low - low == 0.f && y < INFINITY) ? corrected : y;
}
PYFUSE_INLINE vdouble exp(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] = ::exp(x[i]);
  return x;
}

// tanh(x) = 1 - 2 / (e^2x + 1); near zero its series, where that difference would cancel.
PYFUSE_INLINE vfloat tanh(vfloat x) {
  const vfloat magnitude = x < 0.f ? -x : x;
  const vfloat big = 1.f - 2.f / (exp(2.f * magnitude) + 1.f);
  const vfloat t = x * x;  // odd polynomial, |x| < 0.625 (Cephes' tanhf interval)
  vfloat p = 2.06390887954531e-02f - t * 5.70498872745e-03f;
  p = -5.37397155531e-02f + t * p;
  p = 1.33314422036e-01f + t * p;
  p = -3.33332819422e-01f + t * p;
  const vfloat small = x + x * t * p;
  const vfloat signed_big = x < 0.f ? -big : big;
  return magnitude < 0.625f ? small : signed_big;
}
PYFUSE_INLINE vdouble tanh(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] = ::tanh(x[i]);
  return x;
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
