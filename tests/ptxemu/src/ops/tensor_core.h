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
constexpr int kMaxColumns = 256, kMaxDepth = 32;
// Exponents between which float32 holds every product that counts, and what scales it to an
// integer.
constexpr int kSmallest = -100, kLargest = 124;

// Without branches, for the sake of vectors. Infinity and NaN have 128, and then make the sum.
inline int exponent(float x) {
  const auto bits = bit_cast<uint32_t>(x) & 0x7fffffffu;
  const int usual = static_cast<int>(bits >> 23) - 127;
  const int small = bits == 0 ? kNothing : -126;
  return bits < 0x00800000u ? small : usual;
}

inline double power_of_2(int n) { return bit_cast<double>(static_cast<uint64_t>(1023 + n) << 52); }

inline float cut(double x) {
  const double kept = bit_cast<double>(bit_cast<uint64_t>(x) & ~((uint64_t{1} << 29) - 1));
  return static_cast<float>(std::isfinite(x) ? kept : x);
}

}  // namespace detail

/// sum [rows, n] += left [rows, k] right [k, n], as the hardware does. Strides in elements. N: n
/// where it is known to the compiler.
template <int N = 0>
void add_products(const float* left, int left_stride, const float* right, int right_stride,
                  int rows, int n_, int k, SumRule rule, float* sum, int sum_stride) {
  const int n = N != 0 ? N : n_;
  int right_exponents[detail::kMaxDepth * detail::kMaxColumns], most[detail::kMaxColumns];
  float small[detail::kMaxColumns];
  double scale[detail::kMaxColumns], unscale[detail::kMaxColumns], total[detail::kMaxColumns];
  for (int i = 0; i < k; ++i)
    for (int column = 0; column < n; ++column)
      right_exponents[i * n + column] = detail::exponent(right[i * right_stride + column]);
  for (int row = 0; row < rows; ++row) {
    float* to = sum + row * sum_stride;
    for (int first = 0; first < k; first += rule.block) {
      const int end = std::min(k, first + rule.block);
      for (int column = 0; column < n; ++column) most[column] = detail::exponent(to[column]);
      for (int i = first; i < end; ++i) {
        const int own = detail::exponent(left[row * left_stride + i]);
        const int* others = right_exponents + i * n;
        for (int column = 0; column < n; ++column)
          most[column] = std::max(most[column], own + others[column]);
      }
      // In float32 and integers where nothing is too large or too small for them, as is usual.
      int odd = 0;
      for (int column = 0; column < n; ++column) {
        const int e = most[column];
        odd |= (e >= detail::kLargest) | ((e < detail::kSmallest) & (e > detail::kNothing / 2));
      }
      if (odd == 0) {
        for (int column = 0; column < n; ++column) {
          const int last = 23 + rule.extra - std::max(most[column], detail::kSmallest);
          small[column] = bit_cast<float>(static_cast<uint32_t>(127 + last) << 23);
          unscale[column] = detail::power_of_2(-last);
          total[column] = static_cast<double>(static_cast<int32_t>(to[column] * small[column]));
        }
        for (int half = first; half < end; half += 8) {  // eight such terms fit 32 bits
          int32_t sums[N != 0 ? N : detail::kMaxColumns] = {};
          for (int i = half; i < std::min(end, half + 8); ++i) {
            const float own = left[row * left_stride + i];
            const float* others = right + i * right_stride;
            for (int column = 0; column < n; ++column)
              sums[column] += static_cast<int32_t>(own * others[column] * small[column]);
          }
          for (int column = 0; column < n; ++column) total[column] += sums[column];
        }
        for (int column = 0; column < n; ++column)
          to[column] = detail::cut(total[column] * unscale[column]);
        continue;
      }
      for (int column = 0; column < n; ++column) {
        const int last = std::min(std::max(23 + rule.extra - most[column], -900), 900);
        scale[column] = detail::power_of_2(last);
        unscale[column] = detail::power_of_2(-last);
        total[column] = std::trunc(static_cast<double>(to[column]) * scale[column]);
      }
      for (int i = first; i < end; ++i) {
        const auto own = static_cast<double>(left[row * left_stride + i]);
        const float* others = right + i * right_stride;
        for (int column = 0; column < n; ++column)
          total[column] += std::trunc(own * static_cast<double>(others[column]) * scale[column]);
      }
      for (int column = 0; column < n; ++column)
        to[column] = detail::cut(total[column] * unscale[column]);
    }
  }
}

}  // namespace ptxemu
