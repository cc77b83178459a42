// Integer arithmetic (PTX ISA, "Integer Arithmetic Instructions").
#include <algorithm>
#include <type_traits>

#include "pick.h"

namespace ptxemu {
namespace {

// Sums and products wrap around: computed unsigned, in at least 32 bits, since narrower operands
// become int.
template <class T>
using Wrap = std::conditional_t<(sizeof(T) < 4), uint32_t, std::make_unsigned_t<T>>;
template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

template <class T>
T add(T a, T b) {
  return static_cast<T>(Wrap<T>(a) + Wrap<T>(b));
}
template <class T>
T sub(T a, T b) {
  return static_cast<T>(Wrap<T>(a) - Wrap<T>(b));
}
template <class T>
T mul_lo(T a, T b) {
  return static_cast<T>(Wrap<T>(a) * Wrap<T>(b));
}
template <class T>
T mul_hi(T a, T b) {
  return static_cast<T>((Twice<T>(a) * b) >> (8 * sizeof(T)));
}
template <class T>
Twice<T> mul_wide(T a, T b) {
  return Twice<T>(a) * Twice<T>(b);
}
template <class T>
T mad_lo(T a, T b, T c) {
  return add<T>(mul_lo<T>(a, b), c);
}
template <class T>
T mad_hi(T a, T b, T c) {
  return add<T>(mul_hi<T>(a, b), c);
}
template <class T>
Twice<T> mad_wide(T a, T b, Twice<T> c) {
  return add<Twice<T>>(mul_wide<T>(a, b), c);
}
// Division by zero gives all ones, as the hardware's routines do; PTX leaves it unspecified.
template <class T>
T div(T a, T b) {
  return b == 0                                           ? static_cast<T>(-1)
         : b == static_cast<T>(-1) && std::is_signed_v<T> ? sub<T>(0, a)
                                                          : a / b;
}
template <class T>
T rem(T a, T b) {
  return b == 0 ? a : b == static_cast<T>(-1) && std::is_signed_v<T> ? 0 : a % b;
}
template <class T>
T minimum(T a, T b) {
  return std::min(a, b);
}
template <class T>
T maximum(T a, T b) {
  return std::max(a, b);
}
template <class T>
T min_relu(T a, T b) {
  return std::max<T>(std::min(a, b), 0);
}
template <class T>
T max_relu(T a, T b) {
  return std::max<T>(std::max(a, b), 0);
}
template <class T>
T absolute(T a) {
  return a < 0 ? sub<T>(0, a) : a;
}
template <class T>
T negate(T a) {
  return sub<T>(0, a);
}
template <class T>
T sad(T a, T b, T c) {
  return add<T>(c, a < b ? sub<T>(b, a) : sub<T>(a, b));
}

int32_t saturate(int64_t v) {
  return static_cast<int32_t>(std::clamp<int64_t>(v, INT32_MIN, INT32_MAX));
}
int32_t add_sat(int32_t a, int32_t b) { return saturate(int64_t{a} + b); }
int32_t sub_sat(int32_t a, int32_t b) { return saturate(int64_t{a} - b); }
int32_t mad_hi_sat(int32_t a, int32_t b, int32_t c) { return saturate((int64_t{a} * b >> 32) + c); }

template <class T, T (*F)(T, T)>
uint32_t in_halves(uint32_t a, uint32_t b) {
  const auto low = static_cast<uint16_t>(F(static_cast<T>(a), static_cast<T>(b)));
  const auto high = static_cast<uint16_t>(F(static_cast<T>(a >> 16), static_cast<T>(b >> 16)));
  return uint32_t{high} << 16 | low;
}

// ---- 24 bits
template <class T>
int64_t low_24(T a) {
  return std::is_signed_v<T> ? int64_t(int32_t(uint32_t(a) << 8) >> 8)
                             : int64_t(uint32_t(a) & 0xffffff);
}
template <class T>
T mul24_lo(T a, T b) {
  return static_cast<T>(low_24(a) * low_24(b));
}
template <class T>
T mul24_hi(T a, T b) {
  return static_cast<T>((low_24(a) * low_24(b)) >> 16);
}
template <class T>
T mad24_lo(T a, T b, T c) {
  return add<T>(mul24_lo(a, b), c);
}
template <class T>
T mad24_hi(T a, T b, T c) {
  return add<T>(mul24_hi(a, b), c);
}
int32_t mad24_hi_sat(int32_t a, int32_t b, int32_t c) {
  return saturate(int64_t{mul24_hi(a, b)} + c);
}

// ---- dot products of bytes
template <class A, class B>
uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i)
    c += static_cast<uint32_t>(static_cast<int32_t>(static_cast<A>(a >> 8 * i)) *
                               static_cast<B>(b >> 8 * i));
  return c;
}
template <class A, class B, int kFirst>
uint32_t dp2a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 2; ++i)
    c += static_cast<uint32_t>(static_cast<int32_t>(static_cast<A>(a >> 16 * i)) *
                               static_cast<B>(b >> 8 * (i + kFirst)));
  return c;
}

// ---- decoding

Type as_integer(Decoder& d) {
  const Type type = d.take_type();
  if (is_float(type) || type == Type::Pred) d.refuse("needs an integer type");
  d.inst.counted = Class::Int;
  return type;
}

}  // namespace

// add, sub, mul, mad, min, max, abs, neg, div of integers; floats are in float.cpp, which decides
// by the type.
void decode_integer(Decoder& d, const std::string& name) {
  if (name == "mul" || name == "mad") {
    const int part = d.take_one({"lo", "hi", "wide"});
    const bool saturated = d.take("sat");
    const Type type = as_integer(d);
    const bool is_mad = name == "mad";
    if (part == 2) {
      const Type wide = bits_of(type) == 16 ? (is_signed(type) ? Type::S32 : Type::U32)
                                            : (is_signed(type) ? Type::S64 : Type::U64);
      d.need_args(is_mad ? 4 : 3, is_mad ? 4 : 3);
      d.inst.o[0] = d.dst(d.arg(0), wide);
      d.inst.o[1] = d.src(d.arg(1), type);
      d.inst.o[2] = d.src(d.arg(2), type);
      if (is_mad) d.inst.o[3] = d.src(d.arg(3), wide);
      switch (type) {
        case Type::U16:
          d.inst.run =
              is_mad ? &Lanewise<&mad_wide<uint16_t>>::run : &Lanewise<&mul_wide<uint16_t>>::run;
          return;
        case Type::S16:
          d.inst.run =
              is_mad ? &Lanewise<&mad_wide<int16_t>>::run : &Lanewise<&mul_wide<int16_t>>::run;
          return;
        case Type::U32:
          d.inst.run =
              is_mad ? &Lanewise<&mad_wide<uint32_t>>::run : &Lanewise<&mul_wide<uint32_t>>::run;
          return;
        case Type::S32:
          d.inst.run =
              is_mad ? &Lanewise<&mad_wide<int32_t>>::run : &Lanewise<&mul_wide<int32_t>>::run;
          return;
        default:
          d.refuse("a wide product of 64 bits");
      }
    }
    same_type_operands(d, type, is_mad ? 3 : 2);
    if (saturated) {
      if (!is_mad || part != 1 || type != Type::S32) d.refuse(".sat is for mad.hi.s32");
      d.inst.run = &Lanewise<&mad_hi_sat>::run;
    } else if (is_mad) {
      d.inst.run =
          part == 0 ? PTXEMU_BY_INTEGER(d, type, mad_lo) : PTXEMU_BY_INTEGER(d, type, mad_hi);
    } else {
      d.inst.run =
          part == 0 ? PTXEMU_BY_INTEGER(d, type, mul_lo) : PTXEMU_BY_INTEGER(d, type, mul_hi);
    }
    return;
  }
  const bool saturated = d.take("sat"), relu = d.take("relu");
  if (saturated && relu) d.refuse(".sat with .relu");
  const Type type = as_integer(d);
  const bool unary = name == "abs" || name == "neg";
  same_type_operands(d, type, unary ? 1 : 2);
  if (saturated) {
    if (type != Type::S32 || (name != "add" && name != "sub")) d.refuse(".sat is for .s32 sums");
    d.inst.run = name == "add" ? &Lanewise<&add_sat>::run : &Lanewise<&sub_sat>::run;
    return;
  }
  if (type == Type::S16x2 || type == Type::U16x2) {
    const bool is_s = type == Type::S16x2;
    if (name == "add")
      d.inst.run = &Lanewise<&in_halves<uint16_t, add<uint16_t>>>::run;
    else if (name == "min" && relu && is_s)
      d.inst.run = &Lanewise<&in_halves<int16_t, min_relu<int16_t>>>::run;
    else if (name == "max" && relu && is_s)
      d.inst.run = &Lanewise<&in_halves<int16_t, max_relu<int16_t>>>::run;
    else if (name == "min" && !relu)
      d.inst.run = is_s ? &Lanewise<&in_halves<int16_t, minimum<int16_t>>>::run
                        : &Lanewise<&in_halves<uint16_t, minimum<uint16_t>>>::run;
    else if (name == "max" && !relu)
      d.inst.run = is_s ? &Lanewise<&in_halves<int16_t, maximum<int16_t>>>::run
                        : &Lanewise<&in_halves<uint16_t, maximum<uint16_t>>>::run;
    else
      d.refuse("is not supported in halves");
    return;
  }
  if (relu) {
    if (type != Type::S32) d.refuse(".relu is for .s32");
    if (name == "min")
      d.inst.run = &Lanewise<&min_relu<int32_t>>::run;
    else if (name == "max")
      d.inst.run = &Lanewise<&max_relu<int32_t>>::run;
    else
      d.refuse(".relu is for min and max");
    return;
  }
  if (name == "add")
    d.inst.run = PTXEMU_BY_INTEGER(d, type, add);
  else if (name == "sub")
    d.inst.run = PTXEMU_BY_INTEGER(d, type, sub);
  else if (name == "div")
    d.inst.run = PTXEMU_BY_INTEGER(d, type, div);
  else if (name == "min")
    d.inst.run = PTXEMU_BY_INTEGER(d, type, minimum);
  else if (name == "max")
    d.inst.run = PTXEMU_BY_INTEGER(d, type, maximum);
  else if (name == "abs" && is_signed(type))
    d.inst.run = PTXEMU_BY_INTEGER(d, type, absolute);
  else if (name == "neg" && is_signed(type))
    d.inst.run = PTXEMU_BY_INTEGER(d, type, negate);
  else
    d.refuse("is not supported");
}

namespace {

// ---- sums with carry: the flag is kept in one more register of the warp's frame

Operand carry_flag(Decoder& d) {
  // One row for the flag in each function: a constant that nobody else has, of this odd value.
  return d.constant(0xcccccccc00000000u, 8);
}

template <class T, bool kAdd, bool kCarryIn, bool kCarryOut>
void run_carry(Warp& w, const Inst& inst, Mask lanes) {
  T* d = w.row<T>(inst.o[0]);
  const T *a = w.row<T>(inst.o[1]), *b = w.row<T>(inst.o[2]);
  uint32_t* flag = w.row<uint32_t>(inst.o[3]);
  each_lane(lanes, [&](int lane) {
    using U = unsigned __int128;
    const U in = kCarryIn ? flag[lane] & 1 : 0;
    const U sum = kAdd ? U(a[lane]) + b[lane] + in : U(a[lane]) - b[lane] - in;
    d[lane] = static_cast<T>(sum);
    if (kCarryOut)
      flag[lane] =
          static_cast<uint32_t>(sum >> (8 * sizeof(T))) & 1;  // of a difference: the borrow
  });
  w.flow(inst.o[0], lanes, inst, inst.o[1], inst.o[2], kCarryIn ? inst.o[3] : inst.o[2]);
  if (kCarryOut)
    w.flow(inst.o[3], lanes, inst, inst.o[1], inst.o[2], kCarryIn ? inst.o[3] : inst.o[2]);
}

// Half of a product, plus c, plus the flag. o: d, a, b, c, flag
template <class T, bool kHigh, bool kCarryIn, bool kCarryOut>
void run_mad_carry(Warp& w, const Inst& inst, Mask lanes) {
  using U = unsigned __int128;
  T* d = w.row<T>(inst.o[0]);
  const T *a = w.row<T>(inst.o[1]), *b = w.row<T>(inst.o[2]), *c = w.row<T>(inst.o[3]);
  uint32_t* flag = w.row<uint32_t>(inst.o[4]);
  each_lane(lanes, [&](int lane) {
    const T part = kHigh ? mul_hi<T>(a[lane], b[lane]) : mul_lo<T>(a[lane], b[lane]);
    using Bits = std::make_unsigned_t<T>;
    const U sum =
        U{static_cast<Bits>(part)} + static_cast<Bits>(c[lane]) + (kCarryIn ? flag[lane] & 1 : 0);
    d[lane] = static_cast<T>(sum);
    if (kCarryOut) flag[lane] = static_cast<uint32_t>(sum >> (8 * sizeof(T))) & 1;
  });
  const Operand in = kCarryIn ? inst.o[4] : inst.o[3];
  w.flow(inst.o[0], lanes, inst, inst.o[1], inst.o[2], inst.o[3], in);
  if (kCarryOut) w.flow(inst.o[4], lanes, inst, inst.o[1], inst.o[2], inst.o[3], in);
}

template <class T, bool kHigh>
Handler mad_carry_handler(bool in, bool out) {
  if (!in) return &run_mad_carry<T, kHigh, false, true>;
  return out ? &run_mad_carry<T, kHigh, true, true> : &run_mad_carry<T, kHigh, true, false>;
}

void decode_mad_carry(Decoder& d, bool high, bool in, bool out) {
  const Type type = as_integer(d);
  same_type_operands(d, type, 3);
  d.inst.o[4] = carry_flag(d);
  switch (type) {
    case Type::U32:
      d.inst.run = high ? mad_carry_handler<uint32_t, true>(in, out)
                        : mad_carry_handler<uint32_t, false>(in, out);
      return;
    case Type::S32:
      d.inst.run = high ? mad_carry_handler<int32_t, true>(in, out)
                        : mad_carry_handler<int32_t, false>(in, out);
      return;
    case Type::U64:
      d.inst.run = high ? mad_carry_handler<uint64_t, true>(in, out)
                        : mad_carry_handler<uint64_t, false>(in, out);
      return;
    case Type::S64:
      d.inst.run = high ? mad_carry_handler<int64_t, true>(in, out)
                        : mad_carry_handler<int64_t, false>(in, out);
      return;
    default:
      d.refuse("products with carry have 32 or 64 bits");
  }
}

template <class T>
Handler carry_handler(bool is_add, bool in, bool out) {
  if (is_add)
    return in ? (out ? &run_carry<T, true, true, true> : &run_carry<T, true, true, false>)
              : &run_carry<T, true, false, true>;
  return in ? (out ? &run_carry<T, false, true, true> : &run_carry<T, false, true, false>)
            : &run_carry<T, false, false, true>;
}

}  // namespace

// add.cc, sub.cc, addc, subc (without the .cc they end a chain).
void decode_carry(Decoder& d, bool is_add, bool carry_in) {
  const bool carry_out = d.take("cc") || !carry_in;
  const Type type = as_integer(d);
  if (type != Type::U32 && type != Type::S32 && type != Type::U64 && type != Type::S64)
    d.refuse("sums with carry have 32 or 64 bits");
  same_type_operands(d, type, 2);
  d.inst.o[3] = carry_flag(d);
  d.inst.run = bits_of(type) == 32 ? carry_handler<uint32_t>(is_add, carry_in, carry_out)
                                   : carry_handler<uint64_t>(is_add, carry_in, carry_out);
}

namespace {

void decode_madc(Decoder& d) {
  const bool high = d.take_one({"lo", "hi"}) == 1;
  decode_mad_carry(d, high, true, d.take("cc"));
}

void decode_rem(Decoder& d) {
  const Type type = as_integer(d);
  same_type_operands(d, type, 2);
  d.inst.run = PTXEMU_BY_INTEGER(d, type, rem);
}

void decode_sad(Decoder& d) {
  const Type type = as_integer(d);
  same_type_operands(d, type, 3);
  d.inst.run = PTXEMU_BY_INTEGER(d, type, sad);
}

void decode_mul24(Decoder& d) {
  const bool high = d.take_one({"lo", "hi"}) == 1, is_mad = d.name() == "mad24",
             saturated = d.take("sat");
  const Type type = as_integer(d);
  same_type_operands(d, type, is_mad ? 3 : 2);
  if (saturated) {
    if (!is_mad || !high || type != Type::S32) d.refuse(".sat is for mad24.hi.s32");
    d.inst.run = &Lanewise<&mad24_hi_sat>::run;
  } else if (type == Type::U32) {
    d.inst.run =
        is_mad ? (high ? &Lanewise<&mad24_hi<uint32_t>>::run : &Lanewise<&mad24_lo<uint32_t>>::run)
               : (high ? &Lanewise<&mul24_hi<uint32_t>>::run : &Lanewise<&mul24_lo<uint32_t>>::run);
  } else if (type == Type::S32) {
    d.inst.run =
        is_mad ? (high ? &Lanewise<&mad24_hi<int32_t>>::run : &Lanewise<&mad24_lo<int32_t>>::run)
               : (high ? &Lanewise<&mul24_hi<int32_t>>::run : &Lanewise<&mul24_lo<int32_t>>::run);
  } else {
    d.refuse("needs .u32 or .s32");
  }
}

Type take_word(Decoder& d) {
  const Type type = as_integer(d);
  if (type != Type::U32 && type != Type::S32) d.refuse("needs .u32 or .s32");
  return type;
}

void decode_dp4a(Decoder& d) {
  const Type a = take_word(d), b = take_word(d);
  same_type_operands(d, Type::B32, 3);
  if (a == Type::U32)
    d.inst.run = b == Type::U32 ? &Lanewise<&dp4a<uint8_t, uint8_t>>::run
                                : &Lanewise<&dp4a<uint8_t, int8_t>>::run;
  else
    d.inst.run = b == Type::U32 ? &Lanewise<&dp4a<int8_t, uint8_t>>::run
                                : &Lanewise<&dp4a<int8_t, int8_t>>::run;
}

template <int kFirst>
Handler dp2a_handler(Type a, Type b) {
  if (a == Type::U32)
    return b == Type::U32 ? &Lanewise<&dp2a<uint16_t, uint8_t, kFirst>>::run
                          : &Lanewise<&dp2a<uint16_t, int8_t, kFirst>>::run;
  return b == Type::U32 ? &Lanewise<&dp2a<int16_t, uint8_t, kFirst>>::run
                        : &Lanewise<&dp2a<int16_t, int8_t, kFirst>>::run;
}

void decode_dp2a(Decoder& d) {
  const bool high = d.take_one({"lo", "hi"}) == 1;
  const Type a = take_word(d), b = take_word(d);
  same_type_operands(d, Type::B32, 3);
  d.inst.run = high ? dp2a_handler<2>(a, b) : dp2a_handler<0>(a, b);
}

}  // namespace

const std::vector<Opcode> kIntegerOpcodes = {
    {"rem", decode_rem},
    {"sad", decode_sad},
    {"mul24", decode_mul24},
    {"mad24", decode_mul24},
    {"dp4a", decode_dp4a},
    {"dp2a", decode_dp2a},
    {"add.cc", [](Decoder& d) { decode_carry(d, true, false); }},
    {"sub.cc", [](Decoder& d) { decode_carry(d, false, false); }},
    {"addc", [](Decoder& d) { decode_carry(d, true, true); }},
    {"subc", [](Decoder& d) { decode_carry(d, false, true); }},
    {"mad.lo.cc", [](Decoder& d) { decode_mad_carry(d, false, false, true); }},
    {"mad.hi.cc", [](Decoder& d) { decode_mad_carry(d, true, false, true); }},
    {"madc", decode_madc},
};

}  // namespace ptxemu
