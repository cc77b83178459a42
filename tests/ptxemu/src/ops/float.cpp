// Floating-point arithmetic (PTX ISA, "Floating Point", "Half Precision" and "Mixed Precision"
// instructions). Compiled with -frounding-math: directed rounding is the CPU's own, set around a
// loop.
#include <algorithm>
#include <cfenv>
#include <cmath>

#include "pick.h"

namespace ptxemu {

void decode_integer(Decoder& d, const std::string& name);  // integer.cpp

namespace {

// ---- one value

template <class T>
T add(T a, T b) {
  return a + b;
}
template <class T>
T sub(T a, T b) {
  return a - b;
}
template <class T>
T mul(T a, T b) {
  return a * b;
}
template <class T>
T div(T a, T b) {
  return a / b;
}
template <class T>
T fused(T a, T b, T c) {
  return std::fma(a, b, c);
}
template <class T>
T reciprocal(T a) {
  return T{1} / a;
}
template <class T>
T square_root(T a) {
  return std::sqrt(a);
}
template <class T>
T absolute(T a) {
  return std::fabs(a);
}
template <class T>
T negate(T a) {
  return -a;
}
template <class T>  // on bits: that of a NaN, too, with all of its payload
T copy_sign(T sign, T value) {
  constexpr T kSign = T{1} << (8 * sizeof(T) - 1);
  return (value & ~kSign) | (sign & kSign);
}

// The zeros are ordered, -0 < +0; NaN loses against a number, or wins with .NaN.
template <class T>
T minimum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}
template <class T>
T canonical_nan() {
  if constexpr (sizeof(T) == 4)
    return bit_cast<float>(kNan);
  else
    return std::numeric_limits<T>::quiet_NaN();
}
template <class T>
T minimum_nan(T a, T b) {
  return a != a || b != b ? canonical_nan<T>() : minimum(a, b);
}
template <class T>
T maximum_nan(T a, T b) {
  return a != a || b != b ? canonical_nan<T>() : maximum(a, b);
}
template <class T>
T minimum3(T a, T b, T c) {
  return minimum(minimum(a, b), c);
}
template <class T>
T maximum3(T a, T b, T c) {
  return maximum(maximum(a, b), c);
}
template <class T>
T minimum3_nan(T a, T b, T c) {
  return minimum_nan(minimum_nan(a, b), c);
}
template <class T>
T maximum3_nan(T a, T b, T c) {
  return maximum_nan(maximum_nan(a, b), c);
}
// .xorsign.abs: F of the magnitudes, with the sign of the product.
template <float (*F)(float, float)>
float with_xor_sign(float a, float b) {
  const float v = F(std::fabs(a), std::fabs(b));
  return v != v ? v
                : std::copysign(v, bit_cast<float>(bit_cast<uint32_t>(a) ^ bit_cast<uint32_t>(b)));
}

// ---- approximations: here the rounded exact value, which lies within the error that PTX allows (2
// ulp for ex2, 1 for rcp, 2 for rsqrt and division, 2^-20.5 .. 2^-22 absolute for sin, cos and lg2,
// 2^-11 relative for tanh).

// 2^a in double, good to 1e-13, written so that the compiler makes vectors of it.
double exp2_wide(double a) {
  a = a < -1000 ? -1000 : a > 1000 ? 1000 : a;
  const double whole = a + 0x1.8p52 - 0x1.8p52;  // to nearest
  const double x = (a - whole) * 0.693147180559945309417;
  double p = 1.0 / 39916800;
  p = p * x + 1.0 / 3628800;
  p = p * x + 1.0 / 362880;
  p = p * x + 1.0 / 40320;
  p = p * x + 1.0 / 5040;
  p = p * x + 1.0 / 720;
  p = p * x + 1.0 / 120;
  p = p * x + 1.0 / 24;
  p = p * x + 1.0 / 6;
  p = p * x + 0.5;
  p = p * x + 1.0;
  p = p * x + 1.0;
  const int64_t exponent = static_cast<int64_t>(whole) + 1023;
  return p * bit_cast<double>(exponent << 52);
}
float exp2_approx(float a) { return a != a ? a : static_cast<float>(exp2_wide(a)); }
float log2_approx(float a) { return static_cast<float>(std::log2(static_cast<double>(a))); }
float sin_approx(float a) { return static_cast<float>(std::sin(static_cast<double>(a))); }
float cos_approx(float a) { return static_cast<float>(std::cos(static_cast<double>(a))); }
float tanh_approx(float a) { return static_cast<float>(std::tanh(static_cast<double>(a))); }
float rsqrt_approx(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
float div_approx(float a, float b) {
  // For 2^126 < |b| the hardware's reciprocal is a denormal and is flushed: 0, or NaN for an
  // infinite a.
  const float size = std::fabs(b);
  if (size > 0x1p126f && size < std::numeric_limits<float>::infinity())
    return a * std::copysign(0.0f, b);
  return a / b;
}
// Of doubles only the upper half is computed, and denormals are zeros.
double upper_half(double v) {
  return bit_cast<double>(bit_cast<uint64_t>(v) & 0xffffffff00000000u);
}
double flush_double(double v) {
  return bit_cast<uint64_t>(v) & 0x7ff0000000000000u ? v : std::copysign(0.0, v);
}
double canonical_upper(double v) {
  return v != v ? bit_cast<double>(uint64_t{0x7fffffff00000000u}) : upper_half(v);
}
double reciprocal_upper(double a) {
  return canonical_upper(flush_double(1.0 / flush_double(upper_half(a))));
}
double rsqrt_upper(double a) {
  return canonical_upper(1.0 / std::sqrt(flush_double(upper_half(a))));
}
double rsqrt_double(double a) { return 1.0 / std::sqrt(a); }

float saturated(float v) { return v > 0 ? (v < 1 ? v : 1.0f) : 0.0f; }  // NaN too becomes 0

// ---- the same with denormals flushed, or with the result saturated

template <auto F, bool kFtz, bool kSat>
struct Variant;
template <class... S, float (*F)(S...), bool kFtz, bool kSat>
struct Variant<F, kFtz, kSat> {
  static float apply(S... s) {
    float v = kFtz ? flush(F(flush(s)...)) : F(s...);
    return kSat ? saturated(v) : v;
  }
};

// ---- directed rounding

class RoundingScope {
 public:
  explicit RoundingScope(int mode) { std::fesetround(mode); }
  ~RoundingScope() { std::fesetround(FE_TONEAREST); }
  RoundingScope(const RoundingScope&) = delete;
  RoundingScope& operator=(const RoundingScope&) = delete;
};

template <auto F, int kMode>
void run_rounded(Warp& w, const Inst& inst, Mask lanes) {
  RoundingScope scope(kMode);
  Lanewise<F>::run(w, inst, lanes);
}

template <auto F>
Handler rounded(int mode) {
  static constexpr Handler kModes[] = {&Lanewise<F>::run, &run_rounded<F, FE_TOWARDZERO>,
                                       &run_rounded<F, FE_DOWNWARD>, &run_rounded<F, FE_UPWARD>};
  return kModes[mode];
}

template <auto F>
Handler single(int mode, bool ftz, bool sat) {
  if (ftz)
    return sat ? rounded<&Variant<F, true, true>::apply>(mode)
               : rounded<&Variant<F, true, false>::apply>(mode);
  return sat ? rounded<&Variant<F, false, true>::apply>(mode) : rounded<F>(mode);
}

// To nearest where none is named and PTX allows that.
int take_rounding(Decoder& d, bool mandatory = false) {
  return d.take_one({"rn", "rz", "rm", "rp"}, mandatory ? -1 : 0);
}

// ---- halves: each operation is done exactly enough in a wider type, and rounded once

struct Half {
  using Bits = uint16_t;
  static double wide(uint16_t v) { return f16_to_float(v); }
  static uint16_t narrow(double v) {
#ifdef __FLT16_MANT_DIG__
    return v != v ? 0x7fff : bit_cast<uint16_t>(static_cast<_Float16>(v));
#else
    return static_cast<uint16_t>(encode<F16>(v));
#endif
  }
  static uint16_t flushed(uint16_t v) { return v & 0x7c00 ? v : v & 0x8000; }
};
struct Brain {
  using Bits = uint16_t;
  static double wide(uint16_t v) { return bf16_to_float(v); }
  // A double that is no tie in float rounds to bf16 the same way by way of float rounded to odd.
  static uint16_t narrow(double v) {
    float f = static_cast<float>(v);
    uint32_t bits = bit_cast<uint32_t>(f);
    if (v == v && static_cast<double>(f) != v && std::isfinite(f)) {
      if (std::fabs(static_cast<double>(f)) > std::fabs(v)) --bits;  // toward zero ...
      bits |= 1;                                                     // ... and odd
    }
    return float_to_bf16(bit_cast<float>(bits));
  }
  static uint16_t flushed(uint16_t v) { return v & 0x7f80 ? v : v & 0x8000; }
};

// ...Xor: .xorsign.abs
enum class HalfOp {
  Add,
  Sub,
  Mul,
  Fma,
  Min,
  Max,
  MinNan,
  MaxNan,
  MinXor,
  MaxXor,
  MinNanXor,
  MaxNanXor,
  Abs,
  Neg,
  Exp2,
  Tanh
};

template <class F, HalfOp kOp, bool kFtz, bool kSat, bool kRelu>
uint16_t half_op(uint16_t a, uint16_t b, uint16_t c) {
  if (kFtz) a = F::flushed(a), b = F::flushed(b), c = F::flushed(c);
  if (kOp == HalfOp::Abs) return a & 0x7fff;
  if (kOp == HalfOp::Neg) return a ^ 0x8000;
  if (kOp >= HalfOp::MinXor && kOp <= HalfOp::MaxNanXor) {
    constexpr auto kPlain = static_cast<HalfOp>(static_cast<int>(kOp) - 4);
    const uint16_t size = half_op < F,
                   kOp >= HalfOp::MinXor && kOp <= HalfOp::MaxNanXor ? kPlain : HalfOp::Min, kFtz,
                   kSat, kRelu > (a & 0x7fff, b & 0x7fff, 0);
    return F::wide(size) != F::wide(size) ? size : size | ((a ^ b) & 0x8000);
  }
  const double x = F::wide(a), y = F::wide(b), z = F::wide(c);
  double v = 0;
  switch (kOp) {
    case HalfOp::Add:
      v = x + y;
      break;
    case HalfOp::Sub:
      v = x - y;
      break;
    case HalfOp::Mul:
      v = x * y;
      break;
    case HalfOp::Fma:
      v = add_to_odd(x * y, z);
      break;
    case HalfOp::Min:
      v = minimum(x, y);
      break;
    case HalfOp::Max:
      v = maximum(x, y);
      break;
    case HalfOp::MinNan:
      v = minimum_nan(x, y);
      break;
    case HalfOp::MaxNan:
      v = maximum_nan(x, y);
      break;
    case HalfOp::Exp2:
      v = std::exp2(x);
      break;
    case HalfOp::Tanh:
      v = std::tanh(x);
      break;
    default:
      break;
  }
  if (kSat) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
  if (kRelu && v < 0) v = 0;
  if (kRelu && v != v) return 0x7fff;
  const uint16_t result = F::narrow(v);
  return kFtz ? F::flushed(result) : result;
}

template <class F, HalfOp kOp, bool kFtz, bool kSat, bool kRelu>
uint32_t packed_op(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    return half_op<F, kOp, kFtz, kSat, kRelu>(static_cast<uint16_t>(x), static_cast<uint16_t>(y),
                                              static_cast<uint16_t>(z));
  };
  return one(a, b, c) | static_cast<uint32_t>(one(a >> 16, b >> 16, c >> 16)) << 16;
}

template <class F, HalfOp kOp>
Handler half_handler(bool packed, bool ftz, bool sat, bool relu) {
#define PTXEMU_HALF(z, s, r) \
  (packed ? &Lanewise<&packed_op<F, kOp, z, s, r>>::run : &Lanewise<&half_op<F, kOp, z, s, r>>::run)
  if (relu) return ftz ? PTXEMU_HALF(true, false, true) : PTXEMU_HALF(false, false, true);
  if (sat) return ftz ? PTXEMU_HALF(true, true, false) : PTXEMU_HALF(false, true, false);
  return ftz ? PTXEMU_HALF(true, false, false) : PTXEMU_HALF(false, false, false);
#undef PTXEMU_HALF
}

template <class F>
Handler choose_half(Decoder& d, HalfOp op, bool packed, bool ftz, bool sat, bool relu) {
  switch (op) {
    case HalfOp::Add:
      return half_handler<F, HalfOp::Add>(packed, ftz, sat, relu);
    case HalfOp::Sub:
      return half_handler<F, HalfOp::Sub>(packed, ftz, sat, relu);
    case HalfOp::Mul:
      return half_handler<F, HalfOp::Mul>(packed, ftz, sat, relu);
    case HalfOp::Fma:
      return half_handler<F, HalfOp::Fma>(packed, ftz, sat, relu);
    case HalfOp::Min:
      return half_handler<F, HalfOp::Min>(packed, ftz, sat, relu);
    case HalfOp::Max:
      return half_handler<F, HalfOp::Max>(packed, ftz, sat, relu);
    case HalfOp::MinNan:
      return half_handler<F, HalfOp::MinNan>(packed, ftz, sat, relu);
    case HalfOp::MaxNan:
      return half_handler<F, HalfOp::MaxNan>(packed, ftz, sat, relu);
    case HalfOp::MinXor:
      return half_handler<F, HalfOp::MinXor>(packed, ftz, sat, relu);
    case HalfOp::MaxXor:
      return half_handler<F, HalfOp::MaxXor>(packed, ftz, sat, relu);
    case HalfOp::MinNanXor:
      return half_handler<F, HalfOp::MinNanXor>(packed, ftz, sat, relu);
    case HalfOp::MaxNanXor:
      return half_handler<F, HalfOp::MaxNanXor>(packed, ftz, sat, relu);
    case HalfOp::Abs:
      return half_handler<F, HalfOp::Abs>(packed, ftz, sat, relu);
    case HalfOp::Neg:
      return half_handler<F, HalfOp::Neg>(packed, ftz, sat, relu);
    case HalfOp::Exp2:
      return half_handler<F, HalfOp::Exp2>(packed, ftz, sat, relu);
    case HalfOp::Tanh:
      return half_handler<F, HalfOp::Tanh>(packed, ftz, sat, relu);
  }
  d.refuse("is not supported");
}

// Which modifiers an operation has: .approx or a rounding that is mandatory, .sat, .ftz.
void check_half_modifiers(Decoder& d, HalfOp op, bool brain, bool ftz, bool sat, bool relu) {
  const bool is_sum =
      op == HalfOp::Add || op == HalfOp::Sub || op == HalfOp::Mul || op == HalfOp::Fma;
  const bool is_approximate = op == HalfOp::Exp2 || op == HalfOp::Tanh;
  if (is_approximate) d.take_one({"approx"});
  if (op == HalfOp::Fma) d.take_one({"rn"});
  if (is_sum) d.take("rn");
  if (sat && (!is_sum || brain)) d.refuse("modifier .sat is not supported");
  if (relu && (op != HalfOp::Fma || sat)) d.refuse("modifier .relu is not supported");
  if (op == HalfOp::Exp2 ? ftz != brain : ftz && (brain || op == HalfOp::Tanh))
    d.refuse(ftz ? "modifier .ftz is not supported" : "needs .ftz");
}

void decode_half(Decoder& d, Type type, HalfOp op, size_t sources) {
  const bool is_nan = d.take("NaN");
  const bool ftz = d.take("ftz"), sat = d.take("sat"), relu = d.take("relu"),
             xor_sign = d.take("xorsign");
  if (is_nan || xor_sign) {
    if (op != HalfOp::Min && op != HalfOp::Max) d.refuse(".NaN and .xorsign are for min and max");
    if (xor_sign) d.take_one({"abs"});
    const int plain = static_cast<int>(op) + (is_nan ? 2 : 0) + (xor_sign ? 4 : 0);
    op = static_cast<HalfOp>(plain);
  }
  const bool packed = type == Type::F16x2 || type == Type::BF16x2;
  const bool brain = type == Type::BF16 || type == Type::BF16x2;
  check_half_modifiers(d, op, brain, ftz, sat, relu);
  same_type_operands(d, type, sources);
  for (size_t i = sources + 1; i <= 3; ++i) d.inst.o[i] = d.inst.o[1];
  d.inst.counted = op == HalfOp::Exp2 || op == HalfOp::Tanh ? Class::Mufu : Class::Half;
  d.inst.in_halves = packed;
  d.inst.run = brain ? choose_half<Brain>(d, op, packed, ftz, sat, relu)
                     : choose_half<Half>(d, op, packed, ftz, sat, relu);
}

// ---- pairs of floats in 64 bits

template <auto F>
struct Pairwise;
template <class... S, float (*F)(S...)>
struct Pairwise<F> {
  static uint64_t apply(std::conditional_t<true, uint64_t, S>... s) {
    const float low = F(bit_cast<float>(static_cast<uint32_t>(s))...);
    const float high = F(bit_cast<float>(static_cast<uint32_t>(s >> 32))...);
    return uint64_t{bit_cast<uint32_t>(high)} << 32 | bit_cast<uint32_t>(low);
  }
};
template <auto F>
Handler pairwise(int mode, bool ftz) {
  return ftz ? rounded<&Pairwise<&Variant<F, true, false>::apply>::apply>(mode)
             : rounded<&Pairwise<F>::apply>(mode);
}

void decode_pairs(Decoder& d, const std::string& name) {
  const int mode = take_rounding(d, name == "fma");
  const bool ftz = d.take("ftz");
  d.take_type();
  same_type_operands(d, Type::B64, name == "fma" ? 3 : 2);
  d.inst.in_halves = true;
  d.inst.counted = Class::Fp32;
  if (name == "add")
    d.inst.run = pairwise<&add<float>>(mode, ftz);
  else if (name == "sub")
    d.inst.run = pairwise<&sub<float>>(mode, ftz);
  else if (name == "mul")
    d.inst.run = pairwise<&mul<float>>(mode, ftz);
  else if (name == "fma")
    d.inst.run = pairwise<&fused<float>>(mode, ftz);
  else
    d.refuse("is not supported");
}

// ---- mixed precision: add.f32.bf16 and the like; the sum is in float

template <class F>
float add_mixed(uint16_t a, float c) {
  return static_cast<float>(F::wide(a)) + c;
}
template <class F>
float sub_mixed(uint16_t a, float c) {
  return static_cast<float>(F::wide(a)) - c;
}
template <class F>
float fma_mixed(uint16_t a, uint16_t b, float c) {
  return std::fma(static_cast<float>(F::wide(a)), static_cast<float>(F::wide(b)), c);
}

void decode_mixed(Decoder& d, const std::string& name, Type narrow) {
  const int mode = take_rounding(d, name == "fma");
  d.take_type();
  d.take_type();
  const bool fma = name == "fma";
  d.need_args(fma ? 4 : 3, fma ? 4 : 3);
  d.inst.o[0] = d.dst(d.arg(0), Type::F32);
  d.inst.o[1] = d.src(d.arg(1), narrow);
  if (fma) d.inst.o[2] = d.src(d.arg(2), narrow);
  d.inst.o[fma ? 3 : 2] = d.src(d.arg(fma ? 3 : 2), Type::F32);
  d.inst.counted = Class::Fp32;
  const bool brain = narrow == Type::BF16;
  if (name == "add")
    d.inst.run = brain ? rounded<&add_mixed<Brain>>(mode) : rounded<&add_mixed<Half>>(mode);
  else if (name == "sub")
    d.inst.run = brain ? rounded<&sub_mixed<Brain>>(mode) : rounded<&sub_mixed<Half>>(mode);
  else if (fma)
    d.inst.run = brain ? rounded<&fma_mixed<Brain>>(mode) : rounded<&fma_mixed<Half>>(mode);
  else
    d.refuse("is not supported");
}

bool is_half(Type t) {
  return t == Type::F16 || t == Type::BF16 || t == Type::F16x2 || t == Type::BF16x2;
}

Type second_type(const std::vector<std::string>& words) {
  int seen = 0;
  for (size_t i = 1; i < words.size(); ++i)
    if (const Type type = type_named(words[i]); type != Type::None && ++seen == 2) return type;
  return Type::None;
}

// ---- decoding

// add, sub, mul, fma, mad, div
void decode_arithmetic(Decoder& d) {
  const std::string name = d.name() == "mad" && is_float(d.peek_type()) ? "fma" : d.name();
  const Type type = d.peek_type();
  if (!is_float(type)) return decode_integer(d, name);
  const size_t sources = name == "fma" ? 3 : 2;
  if (is_half(type)) {
    if (name == "div") d.refuse("is not supported");
    d.take_type();
    return decode_half(d, type,
                       name == "add"   ? HalfOp::Add
                       : name == "sub" ? HalfOp::Sub
                       : name == "mul" ? HalfOp::Mul
                                       : HalfOp::Fma,
                       sources);
  }
  if (type == Type::F32x2) return decode_pairs(d, name);
  const Type second = second_type(d.words());
  if (type == Type::F32 && is_half(second)) return decode_mixed(d, name, second);
  const int how = name == "div" ? d.take_one({"approx", "full"}, 2) : 2;
  const int mode = how == 2 ? take_rounding(d, name == "fma" || name == "div") : 0;
  const bool ftz = d.take("ftz"), sat = name != "div" && d.take("sat");
  d.take_type();
  same_type_operands(d, type, sources);
  if (type == Type::F64) {
    d.inst.counted = Class::Fp64;
    if (name == "add")
      d.inst.run = rounded<&add<double>>(mode);
    else if (name == "sub")
      d.inst.run = rounded<&sub<double>>(mode);
    else if (name == "mul")
      d.inst.run = rounded<&mul<double>>(mode);
    else if (name == "div")
      d.inst.run = rounded<&div<double>>(mode);
    else
      d.inst.run = rounded<&fused<double>>(mode);
    if (ftz || sat || how != 2) d.refuse("modifier is not for .f64");
    return;
  }
  if (type != Type::F32) d.refuse(std::string("type .") + name_of(type) + " is not supported");
  d.inst.counted = how == 0 ? Class::Mufu : Class::Fp32;
  if (name == "add")
    d.inst.run = single<&add<float>>(mode, ftz, sat);
  else if (name == "sub")
    d.inst.run = single<&sub<float>>(mode, ftz, sat);
  else if (name == "mul")
    d.inst.run = single<&mul<float>>(mode, ftz, sat);
  else if (name == "fma")
    d.inst.run = single<&fused<float>>(mode, ftz, sat);
  else
    d.inst.run =
        how == 0 ? single<&div_approx>(0, ftz, false) : single<&div<float>>(mode, ftz, false);
}

// min, max, of two or three
void decode_extreme(Decoder& d) {
  const Type type = d.peek_type();
  const bool is_min = d.name() == "min";
  if (!is_float(type)) return decode_integer(d, d.name());
  if (is_half(type)) {
    d.take_type();
    return decode_half(d, type, is_min ? HalfOp::Min : HalfOp::Max, 2);
  }
  const bool ftz = d.take("ftz"), nan = d.take("NaN");
  const bool xor_sign = d.take("xorsign");
  if (xor_sign) d.take_one({"abs"});
  if (type != Type::F32 && type != Type::F64)
    d.refuse(std::string("type .") + name_of(type) + " is not supported");
  d.take_type();
  const size_t sources = d.args() - 1;
  same_type_operands(d, type, sources == 3 ? 3 : 2);
  if (type == Type::F64) {
    d.inst.counted = Class::Fp64;
    if (sources == 3 || ftz || nan || xor_sign) d.refuse("modifier is not for .f64");
    d.inst.run = is_min ? &Lanewise<&minimum<double>>::run : &Lanewise<&maximum<double>>::run;
    return;
  }
  d.inst.counted = Class::Fp32;
  if (xor_sign) {
    if (sources == 3) d.refuse(".xorsign.abs with three operands is not supported");
    if (nan)
      d.inst.run = is_min ? single<&with_xor_sign<minimum_nan>>(0, ftz, false)
                          : single<&with_xor_sign<maximum_nan>>(0, ftz, false);
    else
      d.inst.run = is_min ? single<&with_xor_sign<minimum>>(0, ftz, false)
                          : single<&with_xor_sign<maximum>>(0, ftz, false);
  } else if (sources == 3) {
    if (nan)
      d.inst.run = is_min ? single<&minimum3_nan<float>>(0, ftz, false)
                          : single<&maximum3_nan<float>>(0, ftz, false);
    else
      d.inst.run = is_min ? single<&minimum3<float>>(0, ftz, false)
                          : single<&maximum3<float>>(0, ftz, false);
  } else if (nan) {
    d.inst.run = is_min ? single<&minimum_nan<float>>(0, ftz, false)
                        : single<&maximum_nan<float>>(0, ftz, false);
  } else {
    d.inst.run =
        is_min ? single<&minimum<float>>(0, ftz, false) : single<&maximum<float>>(0, ftz, false);
  }
}

void decode_sign(Decoder& d) {
  const Type type = d.peek_type();
  const bool is_abs = d.name() == "abs";
  if (!is_float(type)) return decode_integer(d, d.name());
  if (is_half(type)) {
    d.take_type();
    return decode_half(d, type, is_abs ? HalfOp::Abs : HalfOp::Neg, 1);
  }
  const bool ftz = type == Type::F32 && d.take("ftz");
  d.take_type();
  same_type_operands(d, type, 1);
  if (type != Type::F32 && type != Type::F64) d.refuse("is not supported");
  d.inst.counted = type == Type::F64 ? Class::Fp64 : Class::Fp32;
  if (type == Type::F64)
    d.inst.run = is_abs ? &Lanewise<&absolute<double>>::run : &Lanewise<&negate<double>>::run;
  else
    d.inst.run =
        is_abs ? single<&absolute<float>>(0, ftz, false) : single<&negate<float>>(0, ftz, false);
}

void decode_copysign(Decoder& d) {
  const Type type = d.take_type();
  same_type_operands(d, type, 2);
  d.inst.counted = Class::Fp32;
  if (type == Type::F32)
    d.inst.run = &Lanewise<&copy_sign<uint32_t>>::run;
  else if (type == Type::F64)
    d.inst.run = &Lanewise<&copy_sign<uint64_t>>::run;
  else
    d.refuse("needs .f32 or .f64");
}

// rcp, sqrt: rounded or approximate
void decode_root(Decoder& d) {
  const bool approx = d.take("approx"), is_rcp = d.name() == "rcp";
  const int mode = approx ? 0 : take_rounding(d, true);
  const bool ftz = d.take("ftz");
  const Type type = d.take_type();
  same_type_operands(d, type, 1);
  d.inst.counted = approx ? Class::Mufu : type == Type::F64 ? Class::Fp64 : Class::Fp32;
  if (type == Type::F32) {
    d.inst.run = is_rcp ? single<&reciprocal<float>>(mode, ftz, false)
                        : single<&square_root<float>>(mode, ftz, false);
  } else if (type == Type::F64 && approx && is_rcp && ftz) {
    d.inst.run = &Lanewise<&reciprocal_upper>::run;
  } else if (type == Type::F64 && !approx && !ftz) {
    d.inst.run = is_rcp ? rounded<&reciprocal<double>>(mode) : rounded<&square_root<double>>(mode);
  } else {
    d.refuse("is not supported");
  }
}

// rsqrt, sin, cos, lg2, ex2, tanh
void decode_approx(Decoder& d) {
  const std::string& name = d.name();
  const Type type = d.peek_type();
  if (is_half(type)) {
    if (name != "ex2" && name != "tanh") d.refuse("is not supported");
    d.take_type();
    return decode_half(d, type, name == "ex2" ? HalfOp::Exp2 : HalfOp::Tanh, 1);
  }
  d.take_one({"approx"});
  const bool ftz = name != "tanh" && d.take("ftz");
  d.take_type();
  same_type_operands(d, type, 1);
  d.inst.counted = Class::Mufu;
  if (type == Type::F64 && name == "rsqrt") {
    d.inst.run = ftz ? &Lanewise<&rsqrt_upper>::run : &Lanewise<&rsqrt_double>::run;
    return;
  }
  if (type != Type::F32) d.refuse("is not supported");
  if (name == "rsqrt")
    d.inst.run = single<&rsqrt_approx>(0, ftz, false);
  else if (name == "sin")
    d.inst.run = single<&sin_approx>(0, ftz, false);
  else if (name == "cos")
    d.inst.run = single<&cos_approx>(0, ftz, false);
  else if (name == "lg2")
    d.inst.run = single<&log2_approx>(0, ftz, false);
  else if (name == "ex2")
    d.inst.run = single<&exp2_approx>(0, ftz, false);
  else
    d.inst.run = single<&tanh_approx>(0, ftz, false);
}

// ---- testp

template <class T>
bool is_finite(T a) {
  return std::isfinite(a);
}
template <class T>
bool is_infinite(T a) {
  return std::isinf(a);
}
template <class T>
bool is_number(T a) {
  return a == a;
}
template <class T>
bool is_not_number(T a) {
  return a != a;
}
template <class T>
bool is_normal(T a) {
  return std::isnormal(a) || a == 0;
}  // PTX counts zeros as normal
template <class T>
bool is_subnormal(T a) {
  return std::fpclassify(a) == FP_SUBNORMAL;
}

template <auto F>
void run_testp(Warp& w, const Inst& inst, Mask lanes) {
  Mask& p = w.predicate(inst.o[0]);
  p = (p & ~lanes) | (LanewiseTest<F>::apply(w, inst, 1) & lanes);
  w.flow(inst.o[0], lanes, inst, inst.o[1]);
}

template <class T>
Handler testp(int what) {
  static constexpr Handler kTests[] = {&run_testp<&is_finite<T>>, &run_testp<&is_infinite<T>>,
                                       &run_testp<&is_number<T>>, &run_testp<&is_not_number<T>>,
                                       &run_testp<&is_normal<T>>, &run_testp<&is_subnormal<T>>};
  return kTests[what];
}

void decode_testp(Decoder& d) {
  const int what =
      d.take_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type type = d.take_type();
  d.need_args(2, 2);
  d.inst.o[0] = d.dst(d.arg(0), Type::Pred);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.counted = Class::Fp32;
  if (type == Type::F32)
    d.inst.run = testp<float>(what);
  else if (type == Type::F64)
    d.inst.run = testp<double>(what);
  else
    d.refuse("needs .f32 or .f64");
}

}  // namespace

const std::vector<Opcode> kFloatOpcodes = {
    {"add", decode_arithmetic}, {"sub", decode_arithmetic},    {"mul", decode_arithmetic},
    {"mad", decode_arithmetic}, {"fma", decode_arithmetic},    {"div", decode_arithmetic},
    {"min", decode_extreme},    {"max", decode_extreme},       {"abs", decode_sign},
    {"neg", decode_sign},       {"copysign", decode_copysign}, {"rcp", decode_root},
    {"sqrt", decode_root},      {"rsqrt", decode_approx},      {"sin", decode_approx},
    {"cos", decode_approx},     {"lg2", decode_approx},        {"ex2", decode_approx},
    {"tanh", decode_approx},    {"testp", decode_testp}};

}  // namespace ptxemu
