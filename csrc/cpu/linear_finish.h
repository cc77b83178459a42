// What follows the product of a linear layer: act(sum + bias) · multiply + residual, rounded once.
#pragma once
#include "cpu/isa.h"
#include "cpu/vec_math.h"

namespace pyfuse::cpu::PYFUSE_ISA {

PYFUSE_INLINE vfloat polynomial(vfloat x, const float* c, int degree) {
  vfloat p = splat(c[0]);
  PYFUSE_UNROLL for (int i = 1; i <= degree; ++i) p = c[i] + x * p;
  return p;
}

// GELU, x·Φ(x) = x/2·erfc(-x/√2). The tail is computed as erfc(t) = exp(-t²)/t·P(1/t²), never as
// 1 - erf, which would lose it; below t = 1 erf is t·T(t²). Coefficients: S. Moshier, Cephes,
// ndtrf.
PYFUSE_INLINE vfloat gelu(vfloat x) {
  static const float near_zero[] = {
      7.853861353153693e-5f, -8.010193625184903e-4f, 5.188327685732524e-3f, -2.685381193529856e-2f,
      1.128358514861418e-1f, -3.761262582423300e-1f, 1.128379165726710e+0f};
  static const float middle[] = {
      2.326819970068386e-2f,  -1.387039388740657e-1f, 3.687424674597105e-1f,
      -5.824733027278666e-1f, 6.210004621745983e-1f,  -4.944515323274145e-1f,
      3.404879937665872e-1f,  -2.741127028184656e-1f, 5.638259427386472e-1f};
  static const float far[] = {
      -1.047766399936249e+1f, 1.297719955372516e+1f, -7.495518717768503e+0f, 2.921019019210786e+0f,
      -1.015265279202700e+0f, 4.218463358204948e-1f, -2.820767439740514e-1f, 5.641895067754075e-1f};
  const vfloat t = (x < 0.f ? -x : x) * 0.70710678f, square = t * t;
  const vfloat inverse = 1.f / (t < 1.f ? splat(1.f) : t), y = inverse * inverse;
  const vfloat tail =
      exp(-square) * inverse * (t < 2.f ? polynomial(y, middle, 8) : polynomial(y, far, 7));
  const vfloat erf = t * polynomial(square, near_zero, 6);
  const vfloat erfc = t < 1.f ? (x < 0.f ? 1.f - erf : 1.f + erf) : (x < 0.f ? tail : 2.f - tail);
  return 0.5f * x * erfc;
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
