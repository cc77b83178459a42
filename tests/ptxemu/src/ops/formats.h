// The floating-point formats of PTX and how values are rounded to them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace ptxemu {

enum class Round : uint8_t { Nearest, Zero, Down, Up, NearestAway };

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

/// A format of 1 sign bit, kExponent bits and kMantissa bits. kFinite: e4m3, which has no infinity
/// and one NaN.
template <int kExponent, int kMantissa, bool kFinite = false>
struct Format {
  static constexpr int exponent = kExponent, mantissa = kMantissa;
  static constexpr bool finite_only = kFinite;
  static constexpr int bias = (1 << (kExponent - 1)) - 1;
  static constexpr uint32_t sign_bit = 1u << (kExponent + kMantissa);
  static constexpr uint32_t infinity = kFinite ? 0 : ((1u << kExponent) - 1) << kMantissa;
  static constexpr uint32_t largest = kFinite ? sign_bit - 2 : infinity - 1;
  static constexpr uint32_t nan = sign_bit - 1;
};
using F16 = Format<5, 10>;
using BF16 = Format<8, 7>;
using TF32 = Format<8, 10>;  // kept in the upper 19 of 32 bits
using E4M3 = Format<4, 3, true>;
using E5M2 = Format<5, 2>;

/// The value, exactly.
template <class F>
inline double decode(uint32_t bits) {
  const uint32_t magnitude = bits & (F::sign_bit - 1);
  const double sign = bits & F::sign_bit ? -1.0 : 1.0;
  if (F::finite_only ? magnitude == F::nan : magnitude > F::infinity) return std::nan("");
  if (!F::finite_only && magnitude == F::infinity)
    return sign * std::numeric_limits<double>::infinity();
  const int exponent = static_cast<int>(magnitude >> F::mantissa);
  const uint32_t fraction = magnitude & ((1u << F::mantissa) - 1);
  if (exponent == 0)
    return sign * std::ldexp(static_cast<double>(fraction), 1 - F::bias - F::mantissa);
  return sign * std::ldexp(static_cast<double>(fraction | 1u << F::mantissa),
                           exponent - F::bias - F::mantissa);
}

/// Rounds to the format. saturate: what is too large becomes the largest finite value (with
/// rounding to nearest it otherwise becomes infinity). NaN becomes the canonical one.
template <class F>
inline uint32_t encode(double value, Round mode = Round::Nearest, bool saturate = false) {
  if (std::isnan(value)) return F::nan;
  const uint32_t sign = std::signbit(value) ? F::sign_bit : 0;
  const double magnitude = std::fabs(value);
  const bool away = sign ? mode == Round::Down : mode == Round::Up;
  if (std::isinf(value))
    return sign | (saturate ? F::largest : F::finite_only ? F::nan : F::infinity);
  if (magnitude == 0) return sign;
  int exponent = std::ilogb(magnitude);
  if (exponent < 1 - F::bias)
    exponent = 1 - F::bias;  // denormal: the grid of the smallest normal ones
  const double scaled =
      std::ldexp(magnitude, F::mantissa - exponent);  // exact, in units of the last place
  double whole = std::floor(scaled);
  const double rest = scaled - whole;
  const bool odd = std::fmod(whole, 2.0) != 0;
  bool up = false;
  if (mode == Round::Nearest) up = rest > 0.5 || (rest == 0.5 && odd);
  if (mode == Round::NearestAway) up = rest >= 0.5;
  if (away) up = rest > 0;
  if (up) whole += 1;
  // Counted in units of the last place, the encoding is continuous across binades.
  const uint64_t bits =
      (static_cast<uint64_t>(exponent + F::bias - 1) << F::mantissa) + static_cast<uint64_t>(whole);
  if (bits > F::largest) {
    const bool to_nearest = mode == Round::Nearest || mode == Round::NearestAway;
    if (saturate || (!to_nearest && !away)) return sign | F::largest;
    return sign | (F::finite_only ? F::nan : F::infinity);
  }
  return sign | static_cast<uint32_t>(bits);
}

inline float bf16_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return is_nan ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#ifdef __FLT16_MANT_DIG__  // the compiler's own type: one instruction for a vector of them
/// The NaN that GPUs make of every other one in single-precision arithmetic. It matters where lanes
/// that hold the same sum, added up in different order, all store it.
constexpr uint32_t kNan = 0x7fffffff;
inline float as_on_gpu(float x) { return x == x ? x : bit_cast<float>(kNan); }
template <class T>
T as_on_gpu(T x) {
  return x;
}

inline float f16_to_float(uint16_t bits) { return static_cast<float>(bit_cast<_Float16>(bits)); }
inline uint16_t float_to_f16(float value) {
  return value != value ? 0x7fff : bit_cast<uint16_t>(static_cast<_Float16>(value));
}
#else
inline float f16_to_float(uint16_t bits) { return static_cast<float>(decode<F16>(bits)); }
inline uint16_t float_to_f16(float value) { return static_cast<uint16_t>(encode<F16>(value)); }
#endif

/// Denormals become zeros of the same sign.
inline float flush(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return bits & 0x7f800000 ? value : bit_cast<float>(bits & 0x80000000);
}

/// a + b with the rest of the rounding kept: the result is exact, or odd in its last bit. Rounding
/// it once more to a format with at least two bits less gives the correctly rounded sum (Boldo and
/// Melquiond, 2008).
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double b_part = sum - a;
  const double rest = (a - (sum - b_part)) + (b - b_part);
  uint64_t bits = bit_cast<uint64_t>(sum);
  if (rest != 0 && (bits & 1) == 0) bits += (rest > 0) == (sum > 0) ? 1 : -1;
  return bit_cast<double>(bits);
}

}  // namespace ptxemu
