// Logic, shifts and bit fields (PTX ISA, "Logic and Shift Instructions", and the bit part of the
// integer ones).
#include <type_traits>

#include "pick.h"

namespace ptxemu {
namespace {

template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  return static_cast<T>(~a);
}
template <class T>
T logical_not(T a) {
  return a == 0;
}

// Shifts clamp: beyond the width nothing is left, or only the sign.
template <class T>
T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(uint64_t(a) << n);
}
template <class T>
T shift_right(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) return a < 0 ? static_cast<T>(-1) : T{0};
  return static_cast<T>(a >> n);
}

template <class T>
T shift_right_signed(T a, uint32_t n) {
  return static_cast<T>(shift_right(static_cast<std::make_signed_t<T>>(a), n));
}

template <class T>
uint32_t count_ones(T a) {
  return static_cast<uint32_t>(__builtin_popcountll(a));
}
template <class T>
uint32_t leading_zeros(T a) {
  return a == 0 ? 8 * sizeof(T) : static_cast<uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T));
}
template <class T>
T reversed(T a) {
  T r = 0;
  for (size_t i = 0; i < 8 * sizeof(T); ++i) r = static_cast<T>(r << 1 | (a >> i & 1));
  return r;
}
// The position of the highest bit that differs from the sign; all ones if there is none. kShift:
// the shift that brings it to the top instead.
template <class T, bool kShift>
uint32_t find_bit(T a) {
  using U = std::make_unsigned_t<T>;
  const U v = static_cast<U>(a < 0 ? ~a : a);
  if (v == 0) return 0xffffffffu;
  const uint32_t at = 8 * sizeof(T) - 1 - leading_zeros<U>(v);
  return kShift ? 8 * sizeof(T) - 1 - at : at;
}

template <class T>
T extract(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const uint32_t p = position & 0xff, n = length & 0xff;
  if (n == 0) return 0;
  const uint32_t top = p + n - 1 < kBits - 1 ? p + n - 1 : kBits - 1;
  const bool sign = std::is_signed_v<T> && (a >> top & 1);
  using U = std::make_unsigned_t<T>;
  const U value = p >= kBits ? U{0} : static_cast<U>(a) >> p;
  const uint32_t kept = p > top ? 0 : top - p + 1;  // bits of the field that exist
  const U mask = kept >= kBits ? ~U{0} : static_cast<U>((U{1} << kept) - 1);
  return static_cast<T>((value & mask) | (sign ? static_cast<U>(~mask) : U{0}));
}
template <class T>
T insert(T field, T into, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = 8 * sizeof(T);
  const uint32_t p = position & 0xff, n = length & 0xff;
  if (n == 0 || p >= kBits) return into;
  const T ones = n >= kBits ? ~T{0} : static_cast<T>((T{1} << n) - 1);
  const T mask = static_cast<T>(ones << p);
  return static_cast<T>((into & ~mask) | (static_cast<T>(field << p) & mask));
}

template <bool kWrap>
uint32_t funnel_amount(uint32_t n) {
  return kWrap ? n & 31 : n < 32 ? n : 32;
}
template <bool kWrap>
uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t n) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<uint32_t>(both << funnel_amount<kWrap>(n) >> 32);
}
template <bool kWrap>
uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t n) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<uint32_t>(both >> funnel_amount<kWrap>(n));
}

// Any function of three bits: its table is the function of 0xf0, 0xcc and 0xaa.
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t r = 0;
  for (uint32_t i = 0; i < 8; ++i)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}

// ---- prmt: any four of the eight bytes of b:a

uint32_t permute_byte(uint64_t bytes, uint32_t selector) {
  const auto byte = static_cast<uint32_t>(bytes >> 8 * (selector & 7)) & 0xff;
  return selector & 8 ? (byte & 0x80 ? 0xff : 0) : byte;  // 8: its sign, eight times
}
uint32_t permute_selected(uint64_t bytes, const uint32_t (&selectors)[4]) {
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= permute_byte(bytes, selectors[i]) << 8 * i;
  return r;
}
enum class Permute { Default, Forward4, Backward4, Replicate8, EdgeLeft, EdgeRight, Replicate16 };
template <Permute kMode>
uint32_t permute(uint32_t a, uint32_t b, uint32_t c) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  const uint32_t n = c & 3;
  switch (kMode) {
    case Permute::Default:
      return permute_selected(bytes, {c & 15, c >> 4 & 15, c >> 8 & 15, c >> 12 & 15});
    case Permute::Forward4:
      return permute_selected(bytes, {n, n + 1, n + 2, n + 3});
    case Permute::Backward4:
      return permute_selected(bytes, {n, (n + 7) & 7, (n + 6) & 7, (n + 5) & 7});
    case Permute::Replicate8:
      return permute_selected(bytes, {n, n, n, n});
    case Permute::EdgeLeft:
      return permute_selected(bytes, {n, n < 1 ? 1 : n, n < 2 ? 2 : n, 3});
    case Permute::EdgeRight:
      return permute_selected(bytes, {0, n < 1 ? n : 1, n < 2 ? n : 2, n});
    case Permute::Replicate16:
      return permute_selected(bytes, {2 * (c & 1), 2 * (c & 1) + 1, 2 * (c & 1), 2 * (c & 1) + 1});
  }
  return 0;
}

template <bool kWrap>
uint32_t mask_of_bits(uint32_t position, uint32_t length) {
  const uint32_t p = kWrap ? position & 31 : position, n = kWrap ? length & 31 : length;
  if (p >= 32 || n == 0) return 0;
  return static_cast<uint32_t>(((n >= 32 ? 0xffffffffull : (1ull << n) - 1)) << p);
}

// ---- types

bool is_bits(Type type) { return type == Type::B16 || type == Type::B32 || type == Type::B64; }
Type take_bits(Decoder& d) {
  const Type type = d.take_type();
  if (!is_bits(type))
    d.refuse(std::string("type .") + name_of(type) + " is not supported, only bits are");
  return type;
}

// ---- predicates

enum class Logic { And, Or, Xor, Not };
template <Logic kLogic>
void run_predicates(Warp& w, const Inst& inst, Mask lanes) {
  const Mask a = w.predicate(inst.o[1]), b = w.predicate(inst.o[2]);
  const Mask value = kLogic == Logic::And   ? a & b
                     : kLogic == Logic::Or  ? a | b
                     : kLogic == Logic::Xor ? a ^ b
                                            : ~a;
  Mask& d = w.predicate(inst.o[0]);
  d = (d & ~lanes) | (value & lanes);
  // A known false settles an AND, a known true an OR.
  Mask known = w.defined[inst.o[1].row] & w.defined[inst.o[2].row];
  if (kLogic == Logic::And)
    known |= (w.defined[inst.o[1].row] & ~a) | (w.defined[inst.o[2].row] & ~b);
  if (kLogic == Logic::Or) known |= (w.defined[inst.o[1].row] & a) | (w.defined[inst.o[2].row] & b);
  w.define(inst.o[0], lanes, known, inst);
}

template <Logic kLogic>
void decode_logic(Decoder& d) {
  const Type type = d.peek_type() == Type::Pred ? d.take_type() : take_bits(d);
  d.inst.counted = Class::Int;
  same_type_operands(d, type, kLogic == Logic::Not ? 1 : 2);
  if (type == Type::Pred) {
    if (kLogic == Logic::Not) d.inst.o[2] = d.inst.o[1];
    d.inst.run = &run_predicates<kLogic>;
    return;
  }
  switch (kLogic) {
    case Logic::And:
      d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfTwo, bit_and);
      return;
    case Logic::Or:
      d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfTwo, bit_or);
      return;
    case Logic::Xor:
      d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfTwo, bit_xor);
      return;
    case Logic::Not:
      d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfOne, bit_not);
      return;
  }
}

void decode_cnot(Decoder& d) {
  const Type type = take_bits(d);
  same_type_operands(d, type, 1);
  d.inst.counted = Class::Int;
  d.inst.run = PTXEMU_BY_BITS(d, type, logical_not);
}

void decode_shift(Decoder& d) {
  const bool left = d.name() == "shl";
  const Type type = left ? take_bits(d) : d.take_type();
  if (is_float(type) || type == Type::Pred) d.refuse("needs bits or integers");
  d.inst.counted = Class::Int;
  d.need_args(3, 3);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), Type::U32);
  if (left)
    d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfOne, shift_left);
  else if (is_signed(type))
    d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfOne, shift_right_signed);
  else
    d.inst.run = PTXEMU_HANDLE_BITS(d, type, OfOne, shift_right);
}

// One source of 32 or 64 bits, a result of 32.
void decode_count(Decoder& d) {
  const bool find = d.name() == "bfind", shift = find && d.take("shiftamt");
  const Type type = find ? d.take_type() : take_bits(d);
  if (find && (is_bits(type) || is_float(type))) d.refuse("needs integers");
  d.inst.counted = Class::Int;
  d.need_args(2, 2);
  d.inst.o[0] = d.dst(d.arg(0), Type::U32);
  d.inst.o[1] = d.src(d.arg(1), type);
  const bool wide = bits_of(type) == 64;
  if (!wide && bits_of(type) != 32) d.refuse("needs 32 or 64 bits");
  if (d.name() == "popc") {
    d.inst.run =
        wide ? &Lanewise<&count_ones<uint64_t>>::run : &Lanewise<&count_ones<uint32_t>>::run;
  } else if (d.name() == "clz") {
    d.inst.run =
        wide ? &Lanewise<&leading_zeros<uint64_t>>::run : &Lanewise<&leading_zeros<uint32_t>>::run;
  } else if (shift) {
    d.inst.run = is_signed(type) ? (wide ? &Lanewise<&find_bit<int64_t, true>>::run
                                         : &Lanewise<&find_bit<int32_t, true>>::run)
                                 : (wide ? &Lanewise<&find_bit<uint64_t, true>>::run
                                         : &Lanewise<&find_bit<uint32_t, true>>::run);
  } else {
    d.inst.run = is_signed(type) ? (wide ? &Lanewise<&find_bit<int64_t, false>>::run
                                         : &Lanewise<&find_bit<int32_t, false>>::run)
                                 : (wide ? &Lanewise<&find_bit<uint64_t, false>>::run
                                         : &Lanewise<&find_bit<uint32_t, false>>::run);
  }
}

void decode_brev(Decoder& d) {
  const Type type = take_bits(d);
  d.inst.counted = Class::Int;
  same_type_operands(d, type, 1);
  if (bits_of(type) == 32)
    d.inst.run = &Lanewise<&reversed<uint32_t>>::run;
  else if (bits_of(type) == 64)
    d.inst.run = &Lanewise<&reversed<uint64_t>>::run;
  else
    d.refuse("needs 32 or 64 bits");
}

void decode_bfe(Decoder& d) {
  const Type type = d.take_type();
  d.inst.counted = Class::Int;
  d.need_args(4, 4);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), Type::U32);
  d.inst.o[3] = d.src(d.arg(3), Type::U32);
  switch (type) {
    case Type::U32:
      d.inst.run = &OfOne<&extract<uint32_t>>::run;
      return;
    case Type::S32:
      d.inst.run = &OfOne<&extract<int32_t>>::run;
      return;
    case Type::U64:
      d.inst.run = &OfOne<&extract<uint64_t>>::run;
      return;
    case Type::S64:
      d.inst.run = &OfOne<&extract<int64_t>>::run;
      return;
    default:
      d.refuse("needs .u32, .s32, .u64 or .s64");
  }
}

void decode_bfi(Decoder& d) {
  const Type type = d.take_type();
  d.inst.counted = Class::Int;
  d.need_args(5, 5);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), type);
  d.inst.o[3] = d.src(d.arg(3), Type::U32);
  d.inst.o[4] = d.src(d.arg(4), Type::U32);
  if (type == Type::B32)
    d.inst.run = &OfTwo<&insert<uint32_t>>::run;
  else if (type == Type::B64)
    d.inst.run = &OfTwo<&insert<uint64_t>>::run;
  else
    d.refuse("needs .b32 or .b64");
}

void decode_shf(Decoder& d) {
  const bool right = d.take_one({"l", "r"}) == 1, wrap = d.take_one({"clamp", "wrap"}) == 1;
  if (d.take_type() != Type::B32) d.refuse("needs .b32");
  d.inst.counted = Class::Int;
  same_type_operands(d, Type::B32, 3);
  d.inst.run = right ? (wrap ? &OfTwo<&funnel_right<true>>::run : &OfTwo<&funnel_right<false>>::run)
                     : (wrap ? &OfTwo<&funnel_left<true>>::run : &OfTwo<&funnel_left<false>>::run);
}

void decode_lop3(Decoder& d) {
  if (d.take_type() != Type::B32) d.refuse("needs .b32");
  d.inst.counted = Class::Int;
  same_type_operands(d, Type::B32, 4);
  d.integer(d.arg(4));
  d.inst.run = &Bitwise<&lop3, 3>::run;
}

void decode_prmt(Decoder& d) {
  if (d.take_type() != Type::B32) d.refuse("needs .b32");
  d.inst.counted = Class::Int;
  const int mode = d.take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, 6);
  same_type_operands(d, Type::B32, 3);
  static constexpr Handler kHandlers[] = {
      &OfTwo<&permute<Permute::Forward4>>::run,   &OfTwo<&permute<Permute::Backward4>>::run,
      &OfTwo<&permute<Permute::Replicate8>>::run, &OfTwo<&permute<Permute::EdgeLeft>>::run,
      &OfTwo<&permute<Permute::EdgeRight>>::run,  &OfTwo<&permute<Permute::Replicate16>>::run,
      &OfTwo<&permute<Permute::Default>>::run};
  d.inst.run = kHandlers[mode];
}

void decode_bmsk(Decoder& d) {
  const bool wrap = d.take_one({"clamp", "wrap"}) == 1;
  if (d.take_type() != Type::B32) d.refuse("needs .b32");
  d.inst.counted = Class::Int;
  same_type_operands(d, Type::B32, 2);
  d.inst.run = wrap ? &Lanewise<&mask_of_bits<true>>::run : &Lanewise<&mask_of_bits<false>>::run;
}

}  // namespace

const std::vector<Opcode> kBitOpcodes = {
    {"and", decode_logic<Logic::And>},
    {"or", decode_logic<Logic::Or>},
    {"xor", decode_logic<Logic::Xor>},
    {"not", decode_logic<Logic::Not>},
    {"cnot", decode_cnot},
    {"shl", decode_shift},
    {"shr", decode_shift},
    {"popc", decode_count},
    {"clz", decode_count},
    {"bfind", decode_count},
    {"brev", decode_brev},
    {"bfe", decode_bfe},
    {"bfi", decode_bfi},
    {"shf", decode_shf},
    {"lop3", decode_lop3},
    {"prmt", decode_prmt},
    {"bmsk", decode_bmsk},
};

}  // namespace ptxemu
