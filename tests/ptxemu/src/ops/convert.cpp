// cvt (PTX ISA, "Data Movement and Conversion Instructions: cvt").
//
// Every conversion goes through one of two exact forms: a 64-bit integer, or a double, which holds
// every value of the narrower formats. A double that comes from .f64 or a large integer is rounded
// once, to the target.
#include <algorithm>
#include <cmath>

#include "pick.h"

namespace ptxemu {
namespace {

enum class IntRound : uint8_t { None, Nearest, Zero, Down, Up };

struct Conversion : Detail {
  Type to = Type::None, from = Type::None;
  int to_bytes = 0, from_bytes = 0;  // of the registers
  Round round = Round::Nearest;
  IntRound int_round = IntRound::None;
  bool ftz = false, sat = false, relu = false, satfinite = false;
};

double to_integral(double v, IntRound mode) {
  switch (mode) {
    case IntRound::Nearest:
      return std::nearbyint(v);
    case IntRound::Zero:
      return std::trunc(v);
    case IntRound::Down:
      return std::floor(v);
    case IntRound::Up:
      return std::ceil(v);
    case IntRound::None:
      return v;
  }
  return v;
}

double decode_value(Type type, uint64_t bits) {
  switch (type) {
    case Type::F16:
      return f16_to_float(static_cast<uint16_t>(bits));
    case Type::BF16:
      return bf16_to_float(static_cast<uint16_t>(bits));
    case Type::F32:
      return bit_cast<float>(static_cast<uint32_t>(bits));
    case Type::F64:
      return bit_cast<double>(bits);
    case Type::E4M3:
      return decode<E4M3>(static_cast<uint32_t>(bits & 0xff));
    case Type::E5M2:
      return decode<E5M2>(static_cast<uint32_t>(bits & 0xff));
    case Type::TF32:
      return bit_cast<float>(static_cast<uint32_t>(bits));
    default:
      throw std::logic_error("no floating-point format");
  }
}

// A double to float in any rounding mode.
uint32_t encode_single(double v, Round mode, bool satfinite) {
  if (v != v) return 0x7fffffff;
  if (mode == Round::Nearest && !satfinite) return bit_cast<uint32_t>(static_cast<float>(v));
  return encode<Format<8, 23>>(v, mode, satfinite);
}

uint64_t encode_value(Type type, double v, Round mode, bool satfinite) {
  switch (type) {
    case Type::F16:
      return encode<F16>(v, mode, satfinite);
    case Type::BF16:
      return encode<BF16>(v, mode, satfinite);
    case Type::F32:
      return encode_single(v, mode, satfinite);
    case Type::F64:
      return bit_cast<uint64_t>(v);
    case Type::TF32:
      return uint64_t{encode<TF32>(v, mode, satfinite)} << 13;
    case Type::E4M3:
      return encode<E4M3>(v, mode, satfinite);
    case Type::E5M2:
      return encode<E5M2>(v, mode, satfinite);
    default:
      throw std::logic_error("no floating-point format");
  }
}

uint64_t smallest_integer(Type type) {
  return is_signed(type) ? uint64_t(-1) << (bits_of(type) - 1) : 0;
}
uint64_t largest_integer(Type type) {
  const int bits = bits_of(type) - (is_signed(type) ? 1 : 0);
  return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
}

// Out of range becomes the nearest end of the range. NaN becomes 0, from .f64 or to 64 bits the top
// bit alone.
uint64_t float_to_integer(double v, Type type, Type from) {
  if (v != v)
    return from == Type::F64 || bits_of(type) == 64 ? uint64_t{1} << (bits_of(type) - 1) : 0;
  const int bits = bits_of(type) - (is_signed(type) ? 1 : 0);
  if (v >= std::ldexp(1.0, bits)) return largest_integer(type);
  if (is_signed(type)) {
    if (v < -std::ldexp(1.0, bits)) return smallest_integer(type);
    return static_cast<uint64_t>(static_cast<int64_t>(v));
  }
  return v <= -1 ? 0 : static_cast<uint64_t>(v);
}

uint64_t extended(uint64_t bits, Type type) {
  const int unused = 64 - bits_of(type);
  if (is_signed(type)) return static_cast<uint64_t>(static_cast<int64_t>(bits << unused) >> unused);
  return bits << unused >> unused;
}

uint64_t saturate_integer(uint64_t value, Type from, Type to) {
  const __int128 wide = is_signed(from) ? static_cast<__int128>(static_cast<int64_t>(value))
                                        : static_cast<__int128>(value);
  const __int128 low =
      is_signed(to) ? static_cast<__int128>(static_cast<int64_t>(smallest_integer(to))) : 0;
  const auto high = static_cast<__int128>(largest_integer(to));
  return static_cast<uint64_t>(std::clamp(wide, low, high));
}

// A 64-bit integer has more bits than a double: what is cut off is kept as an odd last bit, so that
// rounding the double to a narrower format rounds the integer once.
double integer_to_double(uint64_t value, Type from) {
  const bool negative = is_signed(from) && static_cast<int64_t>(value) < 0;
  uint64_t magnitude = negative ? 0 - value : value;
  if (magnitude >> 53) {
    const uint64_t low = magnitude & 0xfff;
    magnitude = (magnitude & ~uint64_t{0xfff}) | (low ? 0x1000 : 0);
  }
  const auto d = static_cast<double>(magnitude);
  return negative ? -d : d;
}

uint64_t convert_one(const Conversion& c, uint64_t bits) {
  if (!is_float(c.from)) {
    uint64_t value = extended(bits, c.from);
    if (!is_float(c.to)) return c.sat ? saturate_integer(value, c.from, c.to) : value;
    // Into [0, 1].
    if (c.sat)
      return encode_value(c.to, value != 0 && !(is_signed(c.from) && value >> 63) ? 1.0 : 0.0,
                          c.round, false);
    if (c.sat) value = value == 0 || (is_signed(c.from) && static_cast<int64_t>(value) < 0) ? 0 : 1;
    if (c.to == Type::F64) {
      // Rounded to 53 bits here, in the mode asked for.
      const bool negative = is_signed(c.from) && static_cast<int64_t>(value) < 0;
      const uint64_t magnitude = negative ? 0 - value : value;
      if (c.round == Round::Nearest || !(magnitude >> 53))
        return bit_cast<uint64_t>(negative ? -static_cast<double>(magnitude)
                                           : static_cast<double>(magnitude));
      const int extra = 11 - __builtin_clzll(magnitude);
      const uint64_t cut = magnitude >> extra, rest = magnitude & ((uint64_t{1} << extra) - 1);
      const bool up = rest && (c.round == (negative ? Round::Down : Round::Up));
      const double d = std::ldexp(static_cast<double>(cut + (up ? 1 : 0)), extra);
      return bit_cast<uint64_t>(negative ? -d : d);
    }
    return encode_value(c.to, integer_to_double(value, c.from), c.round, c.satfinite);
  }
  double v = decode_value(c.from, bits);
  if (c.ftz && c.from == Type::F32) v = flush(static_cast<float>(v));
  if (!is_float(c.to)) return float_to_integer(to_integral(v, c.int_round), c.to, c.from);
  v = to_integral(v, c.int_round);
  if (c.sat) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
  if (c.relu) v = v > 0 ? v : v != v ? v : 0.0;
  uint64_t result = encode_value(c.to, v, c.round, c.satfinite);
  if (c.ftz && c.to == Type::F32)
    result = bit_cast<uint32_t>(flush(bit_cast<float>(static_cast<uint32_t>(result))));
  return result;
}

uint64_t read_lane(const uint8_t* row, int lane, int bytes) {
  uint64_t bits = 0;
  std::memcpy(&bits, row + static_cast<ptrdiff_t>(lane) * bytes, static_cast<size_t>(bytes));
  return bits;
}

void run_general(Warp& w, const Inst& inst, Mask lanes) {
  const auto& c = static_cast<const Conversion&>(*inst.detail);
  uint8_t* d = w.row<uint8_t>(inst.o[0]);
  const uint8_t* s = w.row<uint8_t>(inst.o[1]);
  each_lane(lanes, [&](int lane) {
    uint64_t value = convert_one(c, read_lane(s, lane, c.from_bytes));
    if (!is_float(c.to)) value = extended(value, c.to);  // into a register that may be wider
    std::memcpy(d + static_cast<ptrdiff_t>(lane) * c.to_bytes, &value,
                static_cast<size_t>(c.to_bytes));
  });
  w.flow(inst.o[0], lanes, inst, inst.o[1]);
}

// ---- pairs: cvt.f16x2.f32 d, a, b (a is the upper half), cvt.e4m3x2.f32, and from one packed
// format to another

Type element_of(Type type) {
  switch (type) {
    case Type::F16x2:
      return Type::F16;
    case Type::BF16x2:
      return Type::BF16;
    case Type::E4M3x2:
      return Type::E4M3;
    case Type::E5M2x2:
      return Type::E5M2;
    default:
      return Type::None;
  }
}

void run_join(Warp& w, const Inst& inst, Mask lanes) {  // o: result, upper, lower
  const auto& c = static_cast<const Conversion&>(*inst.detail);
  uint8_t* d = w.row<uint8_t>(inst.o[0]);
  const uint32_t *high = w.row<uint32_t>(inst.o[1]), *low = w.row<uint32_t>(inst.o[2]);
  const int bits = bits_of(c.to);
  each_lane(lanes, [&](int lane) {
    const uint64_t value = convert_one(c, high[lane]) << bits | convert_one(c, low[lane]);
    std::memcpy(d + static_cast<ptrdiff_t>(lane) * c.to_bytes, &value,
                static_cast<size_t>(c.to_bytes));
  });
  w.flow(inst.o[0], lanes, inst, inst.o[1], inst.o[2]);
}

void run_packed(Warp& w, const Inst& inst, Mask lanes) {
  const auto& c = static_cast<const Conversion&>(*inst.detail);
  uint8_t* d = w.row<uint8_t>(inst.o[0]);
  const uint8_t* s = w.row<uint8_t>(inst.o[1]);
  const int to = bits_of(c.to), from = bits_of(c.from);
  each_lane(lanes, [&](int lane) {
    const uint64_t both = read_lane(s, lane, c.from_bytes), mask = (uint64_t{1} << from) - 1;
    const uint64_t value = convert_one(c, both >> from & mask) << to | convert_one(c, both & mask);
    std::memcpy(d + static_cast<ptrdiff_t>(lane) * c.to_bytes, &value,
                static_cast<size_t>(c.to_bytes));
  });
  w.flow(inst.o[0], lanes, inst, inst.o[1]);
}

// ---- the frequent ones as vector code

uint32_t pack_bf16(float high, float low) {
  return static_cast<uint32_t>(float_to_bf16(high)) << 16 | float_to_bf16(low);
}
uint32_t pack_f16(float high, float low) {
  return static_cast<uint32_t>(float_to_f16(high)) << 16 | float_to_f16(low);
}
uint32_t widened(uint16_t v) { return v; }
uint64_t widened_unsigned(uint32_t v) { return v; }
int64_t widened_signed(int32_t v) { return v; }
float from_signed(int32_t v) { return static_cast<float>(v); }

// The lower half, which may be defined where the whole is not.
template <class Half, class Whole>
Half lower(Whole v) {
  return static_cast<Half>(v);
}
template <class Half, class Whole>
void run_lower(Warp& w, const Inst& inst, Mask lanes) {
  Lanewise<&lower<Half, Whole>>::run(w, inst, lanes);
  w.defined[inst.o[0].row] |= w.low_defined(inst.o[1].row) & lanes;
}

Handler fast_path(const Conversion& c) {
  const bool plain = c.round == Round::Nearest && !c.ftz && !c.sat && !c.relu && !c.satfinite &&
                     c.int_round == IntRound::None;
  if (!plain) return nullptr;
  const auto is = [&](Type to, Type from) { return c.to == to && c.from == from; };
  const auto widths = [&](int to, int from) { return c.to_bytes == to && c.from_bytes == from; };
  if (is(Type::F32, Type::BF16) && widths(4, 2)) return &Lanewise<&bf16_to_float>::run;
  if (is(Type::F32, Type::F16) && widths(4, 2)) return &Lanewise<&f16_to_float>::run;
  if (is(Type::BF16, Type::F32) && widths(2, 4)) return &Lanewise<&float_to_bf16>::run;
  if (is(Type::F16, Type::F32) && widths(2, 4)) return &Lanewise<&float_to_f16>::run;
  if (is(Type::U16, Type::U32) && widths(2, 4)) return &run_lower<uint16_t, uint32_t>;
  if (is(Type::U32, Type::U16) && widths(4, 2)) return &Lanewise<&widened>::run;
  if (is(Type::U64, Type::U32) && widths(8, 4)) return &Lanewise<&widened_unsigned>::run;
  if (is(Type::S64, Type::S32) && widths(8, 4)) return &Lanewise<&widened_signed>::run;
  if (is(Type::U32, Type::U64) && widths(4, 8)) return &run_lower<uint32_t, uint64_t>;
  if (is(Type::F32, Type::S32) && widths(4, 4)) return &Lanewise<&from_signed>::run;
  return nullptr;
}

int rank(Type type) { return type == Type::BF16 ? 16 : bits_of(type); }

// Where a rounding has to be named, and where it must not be.
void check_rounding(Decoder& d, const Conversion& c, bool to_float, bool to_integer) {
  const bool from_float = is_float(c.from), into_float = is_float(c.to);
  if (from_float && !into_float) {
    if (!to_integer) d.refuse("needs a rounding to an integer");
  } else if (from_float && c.to == c.from) {
    if (to_float) d.refuse("has nothing to round to the format");
  } else if (to_integer) {
    d.refuse("a rounding to an integer");
  } else if (into_float && (!from_float || rank(c.to) < rank(c.from) || c.to == Type::TF32)) {
    if (!to_float) d.refuse("needs a rounding");
  } else if (to_float && !(into_float && rank(c.to) == rank(c.from))) {
    d.refuse("has nothing to round");
  }
  if (c.round == Round::NearestAway && c.to != Type::TF32) d.refuse(".rna is for .tf32");
}

bool is_number(Type type) {
  switch (type) {
    case Type::U8:
    case Type::U16:
    case Type::U32:
    case Type::U64:
    case Type::S8:
    case Type::S16:
    case Type::S32:
    case Type::S64:
    case Type::F16:
    case Type::BF16:
    case Type::F32:
    case Type::F64:
    case Type::TF32:
      return true;
    default:
      return false;
  }
}

void check_modifiers(Decoder& d, const Conversion& c, Type to_element) {
  const Type to = to_element == Type::None ? c.to : to_element;
  const bool is_byte = to == Type::E4M3 || to == Type::E5M2;
  const bool is_short = to == Type::F16 || to == Type::BF16 || to == Type::TF32 || is_byte;
  if (is_byte && (!c.satfinite || c.round != Round::Nearest)) d.refuse("needs .rn.satfinite");
  if (c.sat && (to_element != Type::None || to == Type::BF16 || to == Type::TF32))
    d.refuse(".sat is not for this type");
  if ((c.relu || c.satfinite) && !is_short) d.refuse(".relu and .satfinite are for short formats");
  if ((to == Type::TF32 || to_element != Type::None || c.relu || c.satfinite) &&
      (c.round == Round::Down || c.round == Round::Up))
    d.refuse("needs .rn or .rz");
  if (c.ftz && c.to != Type::F32 && c.from != Type::F32) d.refuse(".ftz is for .f32");
}

void decode_cvt(Decoder& d) {
  auto& c = d.detail<Conversion>();
  const int round = d.take_one({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"}, 9);
  static constexpr Round kRounds[] = {Round::Nearest, Round::Zero, Round::Down, Round::Up,
                                      Round::NearestAway};
  static constexpr IntRound kIntRounds[] = {IntRound::Nearest, IntRound::Zero, IntRound::Down,
                                            IntRound::Up};
  if (round < 5)
    c.round = kRounds[round];
  else if (round < 9)
    c.int_round = kIntRounds[round - 5];
  c.ftz = d.take("ftz");
  c.sat = d.take("sat");
  c.relu = d.take("relu");
  c.satfinite = d.take("satfinite");
  c.to = d.take_type();
  c.from = d.take_type();
  d.inst.counted = Class::Convert;
  const Type to_element = element_of(c.to), from_element = element_of(c.from);
  check_modifiers(d, c, to_element);
  d.need_args(2, 3);
  if (to_element != Type::None) {
    if (round > 1) d.refuse("needs .rn or .rz");
    d.inst.o[0] = d.dst(d.arg(0), c.to);
    c.to_bytes = bytes_of(c.to);
    c.to = to_element;
    if (from_element != Type::None) {
      d.need_args(2, 2);
      d.inst.o[1] = d.src(d.arg(1), c.from);
      c.from_bytes = bytes_of(c.from);
      c.from = from_element;
      d.inst.run = &run_packed;
      return;
    }
    if (c.from != Type::F32) d.refuse("pairs are made of .f32");
    d.need_args(3, 3);
    d.inst.o[1] = d.src(d.arg(1), Type::F32);
    d.inst.o[2] = d.src(d.arg(2), Type::F32);
    const bool plain = c.round == Round::Nearest && !c.relu && !c.satfinite && !c.ftz && !c.sat;
    d.inst.run = plain && c.to == Type::BF16  ? &Lanewise<&pack_bf16>::run
                 : plain && c.to == Type::F16 ? &Lanewise<&pack_f16>::run
                                              : &run_join;
    return;
  }
  if (from_element != Type::None) d.refuse("a pair into one value");
  if (!is_number(c.to) || !is_number(c.from)) d.refuse("needs types of single numbers");
  if ((c.to == Type::TF32) && c.from != Type::F32) d.refuse(".tf32 is made of .f32");
  if (c.from == Type::TF32) d.refuse(".tf32 is no source");
  d.need_args(2, 2);
  d.inst.o[0] = d.wide_dst(d.arg(0), c.to, c.to_bytes);
  d.inst.o[1] = d.wide_src(d.arg(1), c.from, c.from_bytes);
  check_rounding(d, c, round < 5, round >= 5 && round < 9);
  const Handler fast = fast_path(c);
  d.inst.run = fast ? fast : &run_general;
}

}  // namespace

const std::vector<Opcode> kConvertOpcodes = {{"cvt", decode_cvt}};

}  // namespace ptxemu
