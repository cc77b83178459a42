// What follows the product of a linear layer: act(sum + bias) · multiply + residual, rounded once.
#pragma once
#include "cpu/activation.h"

namespace pyfuse::cpu::PYFUSE_ISA {

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
