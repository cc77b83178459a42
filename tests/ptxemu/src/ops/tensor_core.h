// How tensor cores add products to an accumulator in float32: not as IEEE 754 does.
//
// Of a block of products and the accumulator the largest exponent is found; every term is cut off
// (toward zero) a few bits below the last bit of a float32 of that exponent; these are added
// exactly; and the sum is cut off to a float32. One after another, blocks make up an instruction.
// A long chain of such sums drifts toward zero by half an ulp at each step, where rounding to
// nearest would stay in place.
//
// Sizes of blocks and bits: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA
// tensor cores" (PeerJ Computer Science 7:e330, 2021) for Ampere; Khattak and Mikaitis, "Accurate
// Models of NVIDIA Tensor Cores" (arXiv:2512.07004) for Hopper and Blackwell.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "fragments.h"

namespace ptxemu {

/// block: products that are added at once; extra: bits kept below a float32's last one.
struct SumRule {
  int block, extra;
};

/// Of 16-bit floats and tf32, by compute capability.
inline SumRule sum_rule(Element e, int target) {
  const int halves = target < 90 ? 8 : 16;
  return {e == Element::TF32 ? halves / 2 : halves, target < 90 ? 1 : 2};
}

namespace detail {

constexpr int kNothing = -100000;  // the exponent of zero

inline int exponent(float x) {
  const auto field = static_cast<int>(bit_cast<uint32_t>(x) >> 23 & 0xff);
  if (field != 0) return field - 127;  // 128 for infinity and NaN, which then make the sum
  return x == 0 ? kNothing : std::ilogb(x);
}

inline float cut(double x) {
  if (!std::isfinite(x)) return static_cast<float>(x);
  return static_cast<float>(bit_cast<double>(bit_cast<uint64_t>(x) & ~((uint64_t{1} << 29) - 1)));
}

}  // namespace detail

/// sum [rows, n] += left [rows, k] right [k, n], as the hardware does. Strides in elements.
inline void add_products(const float* left, int left_stride, const float* right, int right_stride,
                         int rows, int n, int k, SumRule rule, float* sum, int sum_stride) {
  using detail::kNothing;
  const auto columns = static_cast<size_t>(n);
  std::vector<int> right_exponents(columns * static_cast<size_t>(k)), most(columns);
  std::vector<double> scale(columns), total(columns);
  for (int i = 0; i < k; ++i)
    for (int column = 0; column < n; ++column)
      right_exponents[static_cast<size_t>(i * n + column)] =
          detail::exponent(right[i * right_stride + column]);
  for (int row = 0; row < rows; ++row) {
    float* to = sum + row * sum_stride;
    for (int first = 0; first < k; first += rule.block) {
      const int end = std::min(k, first + rule.block);
      for (size_t column = 0; column < columns; ++column)
        most[column] = detail::exponent(to[column]);
      for (int i = first; i < end; ++i) {
        const int own = detail::exponent(left[row * left_stride + i]);
        const int* others = right_exponents.data() + i * n;
        for (size_t column = 0; column < columns; ++column)
          most[column] = std::max(most[column], own + others[column]);
      }
      for (size_t column = 0; column < columns; ++column) {
        const int last = std::clamp(23 + rule.extra - most[column], -900, 900);
        scale[column] = bit_cast<double>(static_cast<uint64_t>(1023 + last) << 52);
        total[column] = std::trunc(static_cast<double>(to[column]) * scale[column]);
      }
      for (int i = first; i < end; ++i) {
        const auto own = static_cast<double>(left[row * left_stride + i]);
        const float* others = right + i * right_stride;
        for (size_t column = 0; column < columns; ++column)
          total[column] += std::trunc(own * static_cast<double>(others[column]) * scale[column]);
      }
      for (size_t column = 0; column < columns; ++column)
        to[column] = detail::cut(total[column] / scale[column]);
    }
  }
}

}  // namespace ptxemu
