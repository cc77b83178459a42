// The activations of feed-forward blocks, and how their gradients come from x.
#pragma once
#include "cpu/isa.h"
#include "cpu/vec_math.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Φ(x), the normal distribution, = 1/2·(1 + erf(x/√2)), less 1/2; erf(t) = t·P(t²)/Q(t²) for |t| <=
// 4 and ±1 beyond: the rational minimax approximation of Eigen's erf (Eigen, SpecialFunctions).
PYFUSE_INLINE vfloat normal_less_half(vfloat x) {
  const vfloat scaled = x * 0.70710678f;
  const vfloat t = scaled < -4.f ? splat(-4.f) : scaled > 4.f ? splat(4.f) : scaled;
  const vfloat s = t * t;
  vfloat p = 2.77068142495902e-08f - s * 2.72614225801306e-10f;
  p = -2.10102402082508e-06f + s * p;
  p = -5.69250639462346e-05f + s * p;
  p = -7.34990630326855e-04f + s * p;
  p = -2.95459980854025e-03f + s * p;
  p = -1.60960333262415e-02f + s * p;
  vfloat q = -2.13374055278905e-04f - s * 1.45660718464996e-05f;
  q = -1.68282697438203e-03f + s * q;
  q = -7.37332916720468e-03f + s * q;
  q = -1.42647390514189e-02f + s * q;
  return 0.5f * (t * p / q);
}

// GELU, x·Φ(x). Absolute error below 1.4e-6, on average that of torch's own.
PYFUSE_INLINE vfloat gelu(vfloat x) { return 0.5f * x + x * normal_less_half(x); }
PYFUSE_INLINE vdouble gelu(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] =
      0.5 * x[i] * ::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

// Φ(x) + x·φ(x), φ being Φ's derivative exp(-x²/2)/√2π.
PYFUSE_INLINE vfloat gelu_slope(vfloat x) {
  return 0.5f + (normal_less_half(x) + x * (0.39894228f * exp(-0.5f * (x * x))));
}
PYFUSE_INLINE vdouble gelu_slope(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] =
      0.5 * ::erfc(-x[i] * 0.70710678118654752440) +
      x[i] * 0.39894228040143267794 * ::exp(-0.5 * x[i] * x[i]);
  return x;
}

template <class C, class V>
PYFUSE_INLINE V activate(Activation activation, V x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < C(0) ? V{} : x;  // NaN stays NaN
    case Activation::silu:
      return x / (C(1) + exp(-x));
    case Activation::gelu:
      return gelu(x);
    case Activation::gelu_tanh:  // x/2·(1 + tanh u) = x / (1 + e^-2u), which keeps the tail's
                                 // digits
      return x / (C(1) + exp(C(-1.5957691216057307118) * (x + C(0.044715) * x * x * x)));
  }
  return x;
}

// The logistic function σ(x) and σ·(1 - σ), neither by a difference.
template <class V>
struct Logistic {
  V value, slope;
};
template <class C, class V>
PYFUSE_INLINE Logistic<V> logistic(V x) {
  const V e = exp(x < C(0) ? x : -x), r = C(1) / (C(1) + e);
  return {x < C(0) ? e * r : r, e * r * r};
}

// flow · act'(x), flow being the gradient of act(x). For relu, x may be the result as well: it has
// the same sign.
template <Activation activation, class C, class V>
PYFUSE_INLINE V activation_gradient(V x, V flow) {
  if constexpr (activation == Activation::none) return flow;
  if constexpr (activation == Activation::relu) return x <= C(0) ? V{} : flow;
  if constexpr (activation == Activation::gelu) return flow * gelu_slope(x);
  if constexpr (activation == Activation::silu) {
    const Logistic<V> s = logistic<C>(x);
    return flow * (s.value + x * s.slope);
  }
  if constexpr (activation == Activation::gelu_tanh) {  // x·σ(2u), u as in activate()
    const V square = x * x;
    const Logistic<V> s = logistic<C>(C(1.5957691216057307118) * x * (C(1) + C(0.044715) * square));
    const V slope = C(1.5957691216057307118) * (C(1) + C(0.134145) * square);  // of 2u
    return flow * (s.value + x * s.slope * slope);
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
