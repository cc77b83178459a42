// What follows the product of a linear layer: act(sum + bias) · multiply + residual, rounded once.
#pragma once
#include "cpu/isa.h"
#include "cpu/vec_math.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// GELU, x·Φ(x) = x/2·(1 + erf(x/√2)), erf(t) = t·P(t²)/Q(t²) for |t| <= 4 and ±1 beyond: the
// rational minimax approximation of Eigen's erf (Eigen, SpecialFunctions). Absolute error
// below 1.4e-6, on average that of torch's own.
PYFUSE_INLINE vfloat gelu(vfloat x) {
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
  const vfloat half = 0.5f * x;
  return half + half * (t * p / q);
}
PYFUSE_INLINE vdouble gelu(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i) x[i] =
      0.5 * x[i] * ::erfc(-x[i] * 0.70710678118654752440);
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

// Writes outputs n, n+1, ... n+count (cut at N) of one row from their sums; count is a multiple of
// the vector width.
template <class T>
inline void finish_outputs(const LinearParams& p, int64_t row, int64_t n, const compute_t<T>* sums,
                           int64_t count) {
  constexpr int W = width<T>;
  const auto read = [&](const void* base, int64_t stride, int64_t at, int64_t lanes) {
    const T* from = static_cast<const T*>(base) + row * stride + at;
    return lanes == W ? load(from) : load(from, lanes);
  };
  for (int64_t j = 0; j < count && n + j < p.n; j += W) {
    const int64_t at = n + j, lanes = p.n - at < W ? p.n - at : W;
    vec_t<T> y = load(sums + j);
    if (p.bias != nullptr) y += read(p.bias, 0, at, lanes);
    y = activate<compute_t<T>>(p.activation, y);
    if (p.multiply != nullptr) y *= read(p.multiply, p.multiply_stride, at, lanes);
    if (p.residual != nullptr) y += read(p.residual, p.residual_stride, at, lanes);
    T* out = static_cast<T*>(p.y) + row * p.y_stride + at;
    lanes == W ? store(out, y) : store(out, y, lanes);
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
