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

// Eight columns at a time, in vectors of GCC and Clang.
constexpr int kColumns = 8, kMaxDepth = 32;
using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));
using Longs = int64_t __attribute__((vector_size(64)));

constexpr int kNothing = -100000;  // the exponent of zero
constexpr int kEndless = 300000;   // of infinity and NaN: above all others, times zero too
// Exponents between which float32 holds every product that counts, and what scales it to integers.
constexpr int kSmallest = -100, kLargest = 124;
constexpr int64_t kBitsOfFloat = ~((int64_t{1} << 29) - 1);  // of a double

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Ints exponents(Floats x) {
  const Ints bits = bit_cast<Ints>(x) & 0x7fffffff;
  const Ints small = bits == 0 ? Ints{} + kNothing : Ints{} - 126;
  const Ints large = bits >= 0x7f800000 ? Ints{} + kEndless : (bits >> 23) - 127;
  return bits < 0x00800000 ? small : large;
}

inline bool any(Ints x) {
  int32_t all = 0;
  for (int i = 0; i < kColumns; ++i) all |= x[i];
  return all != 0;
}

// Terms that are scaled to integers of 32 bits, eight of which add up in 32 bits.
inline Floats add_usual(Floats c, const float* left, const Floats* right, int count, Ints scale) {
  const auto up = bit_cast<Floats>((127 + scale) << 23),
             down = bit_cast<Floats>((127 - scale) << 23);
  Doubles total = __builtin_convertvector(__builtin_convertvector(c * up, Ints), Doubles);
  for (int first = 0; first < count; first += 8) {
    Ints sum{};
    for (int i = first; i < std::min(count, first + 8); ++i)
      sum += __builtin_convertvector(left[i] * right[i] * up, Ints);
    total += __builtin_convertvector(sum, Doubles);
  }
  const auto kept = bit_cast<Doubles>(bit_cast<Longs>(total) & kBitsOfFloat);
  return __builtin_convertvector(kept, Floats) * down;
}

// The same in double, where float32 is too small for the terms, or they are not finite.
inline Floats add_any(Floats c, const float* left, const Floats* right, int count, Ints scale) {
  for (int column = 0; column < kColumns; ++column) {
    const int by = std::clamp(scale[column], -900, 900);
    double total = std::trunc(std::ldexp(static_cast<double>(c[column]), by));
    for (int i = 0; i < count; ++i) {
      const double term = static_cast<double>(left[i]) * static_cast<double>(right[i][column]);
      total += std::trunc(std::ldexp(term, by));
    }
    total = std::ldexp(total, -by);
    if (std::isfinite(total)) total = bit_cast<double>(bit_cast<int64_t>(total) & kBitsOfFloat);
    c[column] = static_cast<float>(total);
  }
  return c;
}

}  // namespace detail

/// sum [rows, n] += left [rows, k] right [k, n], as the hardware does; n a multiple of 8. Strides
/// in elements.
inline void add_products(const float* left, int left_stride, const float* right, int right_stride,
                         int rows, int n, int k, SumRule rule, float* sum, int sum_stride) {
  using namespace detail;
  for (int column = 0; column < n; column += kColumns) {
    Floats b[kMaxDepth];
    Ints b_exponents[kMaxDepth];
    for (int i = 0; i < k; ++i) {
      b[i] = load(right + i * right_stride + column);
      b_exponents[i] = exponents(b[i]);
    }
    for (int row = 0; row < rows; ++row) {
      const float* a = left + row * left_stride;
      float* to = sum + row * sum_stride + column;
      Floats c = load(to);
      for (int first = 0; first < k; first += rule.block) {
        const int count = std::min(rule.block, k - first);
        Ints most = exponents(c);
        for (int i = first; i < first + count; ++i) {
          const Ints own = exponents(Floats{} + a[i]) + b_exponents[i];
          most = own > most ? own : most;
        }
        const Ints nothing = most < kNothing / 2;
        const bool usual = !any((most >= kLargest) | ((most < kSmallest) & ~nothing));
        most = nothing != 0 ? Ints{} + kSmallest : most;
        const Ints scale = 23 + rule.extra - most;
        c = (usual ? add_usual : add_any)(c, a + first, b + first, count, scale);
      }
      std::memcpy(to, &c, sizeof c);
    }
  }
}

}  // namespace ptxemu
