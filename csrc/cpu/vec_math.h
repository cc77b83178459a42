// Vector exp, exp2 and tanh on top of vec.h.
#pragma once
#include <math.h>

#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// 2^f for |f| <= 1/2: the minimax polynomial of degree 6, relative error 1.9e-9 before rounding.
PYFUSE_INLINE vfloat exp2_fraction(vfloat f) {
  vfloat p = 0.00133999309f + f * 0.000153458124f;
  p = 0.00961848907f + f * p;
  p = 0.0555032864f + f * p;
  p = 0.240226462f + f * p;
  p = 0.693147182f + f * p;
  return 1.0f + f * p;
}

// p · 2^n for integral n; below the normal range 0 (AVX-512: subnormal), above it +inf.
PYFUSE_INLINE vfloat scale_by_power(vfloat p, vfloat n) {
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

PYFUSE_INLINE vfloat round_to_integer(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const vfloat magic = splat(12582912.f);  // 1.5 · 2^23: adding it leaves no room for a fraction
  return (x + magic) - magic;
#endif
}

// x, but not below -200 (so that x - n is never inf - inf); NaN stays NaN.
PYFUSE_INLINE vfloat not_below_minus_200(vfloat x) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps(_mm512_set1_ps(-200.f),
                               (__m512)x);  // the second operand wins for NaN
#else
  return x < -200.f ? splat(-200.f) : x;
#endif
}

// 2^x for x <= 128, as softmax needs it: error below 1 ulp for normal results (1.3 without FMA);
// 2^-inf = 0.
PYFUSE_INLINE vfloat exp2_bounded(vfloat x) {
#if defined(__AVX512F__)
  // The fraction in one instruction, which gives 0 for infinities.
  const vfloat f = (vfloat)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  return scale_by_power(exp2_fraction(f), x - f);
#else
  const vfloat y = not_below_minus_200(x), n = round_to_integer(y);
  return scale_by_power(exp2_fraction(y - n), n);
#endif
}
// The same for every x: 2^x = +inf from 128 on.
PYFUSE_INLINE vfloat exp2(vfloat x) { return exp2_bounded(x > 200.f ? splat(200.f) : x); }

// Double precision serves gradient checks, where exactness matters and speed does not.
PYFUSE_INLINE vdouble exp2(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] = ::exp2(x[i]);
  return x;
}

PYFUSE_INLINE vdouble exp2_bounded(vdouble x) { return exp2(x); }

constexpr double log2_e = 1.4426950408889634074;

// e^x = 2^n · e^r with n = round(x·log2 e) and r = x - n·ln 2, ln 2 in two parts of which n times
// the first is exact (Cody and Waite). Error below 2 ulp for normal results; e^-inf = 0.
PYFUSE_INLINE vfloat exp(vfloat x) {
  const vfloat y = not_below_minus_200(x > 89.f ? splat(89.f) : x);  // e^89 is +inf already
  const vfloat n = round_to_integer(y * static_cast<float>(log2_e));
  const vfloat r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  return scale_by_power(exp2_fraction(r * static_cast<float>(log2_e)), n);
}
PYFUSE_INLINE vdouble exp(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] = ::exp(x[i]);
  return x;
}

// tanh(x) = 1 - 2 / (e^2x + 1); near zero its series, where that difference would cancel. Error
// below 1.5 ulp.
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
