// Comparison and selection (PTX ISA, "Comparison and Selection Instructions").
#include "pick.h"

namespace ptxemu {
namespace {

enum class Compare : uint8_t { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };

/// On floats: the first six are false of NaN, those ending in u true of it.
template <Compare kCompare, class T>
bool holds(T a, T b) {
  const bool unordered = a != a || b != b;
  switch (kCompare) {
    case Compare::Eq:
      return a == b;
    case Compare::Ne:
      return !unordered && a != b;
    case Compare::Lt:
      return a < b;
    case Compare::Le:
      return a <= b;
    case Compare::Gt:
      return a > b;
    case Compare::Ge:
      return a >= b;
    case Compare::Equ:
      return unordered || a == b;
    case Compare::Neu:
      return a != b;
    case Compare::Ltu:
      return unordered || a < b;
    case Compare::Leu:
      return unordered || a <= b;
    case Compare::Gtu:
      return unordered || a > b;
    case Compare::Geu:
      return unordered || a >= b;
    case Compare::Num:
      return !unordered;
    case Compare::Nan:
      return unordered;
  }
  return false;
}

template <Compare kCompare>
bool holds_f16(uint16_t a, uint16_t b) {
  return holds<kCompare>(f16_to_float(a), f16_to_float(b));
}
template <Compare kCompare>
bool holds_bf16(uint16_t a, uint16_t b) {
  return holds<kCompare>(bf16_to_float(a), bf16_to_float(b));
}
template <Compare kCompare>
bool holds_ftz(float a, float b) {
  return holds<kCompare>(flush(a), flush(b));
}
template <Compare kCompare>
bool holds_f16_ftz(uint16_t a, uint16_t b) {
  const auto flushed = [](uint16_t v) { return v & 0x7c00 ? f16_to_float(v) : 0.0f; };
  return holds<kCompare>(flushed(a), flushed(b));
}

using Test = Mask (*)(Warp&, const Inst&, size_t);
constexpr uint8_t kAnd = 1, kOr = 2, kXor = 3;

struct SetDetail : Detail {
  Test test[2] = {nullptr, nullptr};  // of the low and high half for packed types
  uint8_t combine = 0;
  bool negated = false, has_second = false, packed = false, as_float = false;
};

template <Compare kCompare>
Test test_of(Decoder& d, Type type, bool ftz) {
  switch (type) {
    case Type::B16:
    case Type::U16:
      return &LanewiseTest<&holds<kCompare, uint16_t>>::apply;
    case Type::B32:
    case Type::U32:
      return &LanewiseTest<&holds<kCompare, uint32_t>>::apply;
    case Type::B64:
    case Type::U64:
      return &LanewiseTest<&holds<kCompare, uint64_t>>::apply;
    case Type::S16:
      return &LanewiseTest<&holds<kCompare, int16_t>>::apply;
    case Type::S32:
      return &LanewiseTest<&holds<kCompare, int32_t>>::apply;
    case Type::S64:
      return &LanewiseTest<&holds<kCompare, int64_t>>::apply;
    case Type::F32:
      return ftz ? &LanewiseTest<&holds_ftz<kCompare>>::apply
                 : &LanewiseTest<&holds<kCompare, float>>::apply;
    case Type::F64:
      return &LanewiseTest<&holds<kCompare, double>>::apply;
    case Type::F16:
      return ftz ? &LanewiseTest<&holds_f16_ftz<kCompare>>::apply
                 : &LanewiseTest<&holds_f16<kCompare>>::apply;
    case Type::BF16:
      return &LanewiseTest<&holds_bf16<kCompare>>::apply;
    default:
      d.refuse(std::string("comparison of .") + name_of(type) + " is not supported");
  }
}

Test choose_test(Decoder& d, Compare compare, Type type, bool ftz) {
  switch (compare) {
    case Compare::Eq:
      return test_of<Compare::Eq>(d, type, ftz);
    case Compare::Ne:
      return test_of<Compare::Ne>(d, type, ftz);
    case Compare::Lt:
      return test_of<Compare::Lt>(d, type, ftz);
    case Compare::Le:
      return test_of<Compare::Le>(d, type, ftz);
    case Compare::Gt:
      return test_of<Compare::Gt>(d, type, ftz);
    case Compare::Ge:
      return test_of<Compare::Ge>(d, type, ftz);
    case Compare::Equ:
      return test_of<Compare::Equ>(d, type, ftz);
    case Compare::Neu:
      return test_of<Compare::Neu>(d, type, ftz);
    case Compare::Ltu:
      return test_of<Compare::Ltu>(d, type, ftz);
    case Compare::Leu:
      return test_of<Compare::Leu>(d, type, ftz);
    case Compare::Gtu:
      return test_of<Compare::Gtu>(d, type, ftz);
    case Compare::Geu:
      return test_of<Compare::Geu>(d, type, ftz);
    case Compare::Num:
      return test_of<Compare::Num>(d, type, ftz);
    case Compare::Nan:
      return test_of<Compare::Nan>(d, type, ftz);
  }
  d.refuse("comparison is not supported");
}

Compare take_compare(Decoder& d) {
  static constexpr Compare kOrder[] = {
      Compare::Eq,  Compare::Ne,  Compare::Lt,  Compare::Le,  Compare::Gt,  Compare::Ge,
      Compare::Equ, Compare::Neu, Compare::Ltu, Compare::Leu, Compare::Gtu, Compare::Geu,
      Compare::Num, Compare::Nan, Compare::Lt,  Compare::Le,  Compare::Gt,  Compare::Ge};
  return kOrder[d.take_one({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu",
                            "geu", "num", "nan", "lo", "ls", "hi", "hs"})];
}

// Bits are equal or not; .lo .ls .hi .hs are of unsigned integers, those with u and num and nan of
// floats.
void check_compare(Decoder& d, Compare compare, Type type, bool ftz) {
  const bool bits = type == Type::B16 || type == Type::B32 || type == Type::B64;
  bool named_unsigned = false;
  for (const std::string& word : d.words())
    named_unsigned |= word == "lo" || word == "ls" || word == "hi" || word == "hs";
  const bool of_floats = compare >= Compare::Equ;
  if ((bits && compare > Compare::Ne) || (of_floats && !is_float(type)) ||
      (named_unsigned && (bits || is_signed(type) || is_float(type))))
    d.refuse(std::string("this comparison is not for .") + name_of(type));
  if (ftz && type != Type::F32 && type != Type::F16 && type != Type::F16x2)
    d.refuse(".ftz is for .f32 and .f16");
}

Mask combined(const SetDetail& detail, Mask value, Mask other) {
  if (detail.negated) other = ~other;
  switch (detail.combine) {
    case kAnd:
      return value & other;
    case kOr:
      return value | other;
    case kXor:
      return value ^ other;
    default:
      return value;
  }
}

void assign(Warp& w, Operand o, Mask lanes, Mask value) {
  Mask& p = w.predicate(o);
  p = (p & ~lanes) | (value & lanes);
}

// o: first result, second result, a, b, combined predicate
void run_setp(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const SetDetail&>(*inst.detail);
  const Mask other = detail.combine ? w.predicate(inst.o[4]) : 0;
  const Mask value = detail.test[0](w, inst, 2);
  assign(w, inst.o[0], lanes, combined(detail, value, other));
  Operand c = detail.combine ? inst.o[4] : inst.o[2];
  w.flow(inst.o[0], lanes, inst, inst.o[2], inst.o[3], c);
  if (!detail.has_second) return;
  assign(w, inst.o[1], lanes, combined(detail, ~value, other));
  w.flow(inst.o[1], lanes, inst, inst.o[2], inst.o[3], c);
}

// The halves of packed operands, compared one by one: p|q get the results of the low and the high
// half.
template <bool (*F)(uint16_t, uint16_t), int kHalf>
bool holds_half(uint32_t a, uint32_t b) {
  return F(static_cast<uint16_t>(a >> 16 * kHalf), static_cast<uint16_t>(b >> 16 * kHalf));
}
template <bool (*F)(uint16_t, uint16_t)>
void both_halves(SetDetail& detail) {
  detail.test[0] = &LanewiseTest<&holds_half<F, 0>>::apply;
  detail.test[1] = &LanewiseTest<&holds_half<F, 1>>::apply;
}
enum class Packed { F16, F16Ftz, BF16 };
Packed packed_format(Decoder& d, Type type, bool ftz) {
  if (type == Type::F16x2) return ftz ? Packed::F16Ftz : Packed::F16;
  if (ftz) d.refuse(".ftz is not for .bf16x2");
  return Packed::BF16;
}
template <Compare kCompare>
void packed_tests(SetDetail& detail, Packed format) {
  switch (format) {
    case Packed::F16:
      return both_halves<&holds_f16<kCompare>>(detail);
    case Packed::F16Ftz:
      return both_halves<&holds_f16_ftz<kCompare>>(detail);
    case Packed::BF16:
      return both_halves<&holds_bf16<kCompare>>(detail);
  }
}
void choose_packed(Decoder& d, SetDetail& detail, Compare compare, Packed format) {
  switch (compare) {
    case Compare::Eq:
      return packed_tests<Compare::Eq>(detail, format);
    case Compare::Ne:
      return packed_tests<Compare::Ne>(detail, format);
    case Compare::Lt:
      return packed_tests<Compare::Lt>(detail, format);
    case Compare::Le:
      return packed_tests<Compare::Le>(detail, format);
    case Compare::Gt:
      return packed_tests<Compare::Gt>(detail, format);
    case Compare::Ge:
      return packed_tests<Compare::Ge>(detail, format);
    case Compare::Equ:
      return packed_tests<Compare::Equ>(detail, format);
    case Compare::Neu:
      return packed_tests<Compare::Neu>(detail, format);
    case Compare::Ltu:
      return packed_tests<Compare::Ltu>(detail, format);
    case Compare::Leu:
      return packed_tests<Compare::Leu>(detail, format);
    case Compare::Gtu:
      return packed_tests<Compare::Gtu>(detail, format);
    case Compare::Geu:
      return packed_tests<Compare::Geu>(detail, format);
    case Compare::Num:
      return packed_tests<Compare::Num>(detail, format);
    case Compare::Nan:
      return packed_tests<Compare::Nan>(detail, format);
  }
  d.refuse("comparison is not supported");
}

void run_setp_packed(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const SetDetail&>(*inst.detail);
  const Mask other = detail.combine ? w.predicate(inst.o[4]) : 0;
  Operand c = detail.combine ? inst.o[4] : inst.o[2];
  for (int half = 0; half < 2; ++half) {
    assign(w, inst.o[half], lanes, combined(detail, detail.test[half](w, inst, 2), other));
    w.flow(inst.o[half], lanes, inst, inst.o[2], inst.o[3], c);
  }
}

void decode_setp(Decoder& d) {
  auto& detail = d.detail<SetDetail>();
  const bool ftz = d.take("ftz");
  const Compare compare = take_compare(d);
  detail.combine = static_cast<uint8_t>(d.take_one({"and", "or", "xor"}, 3) + 1) % 4;
  const Type type = d.take_type();
  d.need_args(3, 4);
  const Arg& result = d.arg(0);
  const bool pair = result.kind == Arg::Kind::Pair;
  d.inst.o[0] = d.dst(pair ? result.children[0] : result, Type::Pred);
  if (pair) d.inst.o[1] = d.dst(result.children[1], Type::Pred);
  d.inst.o[2] = d.src(d.arg(1), type);
  d.inst.o[3] = d.src(d.arg(2), type);
  if ((d.args() == 4) != (detail.combine != 0))
    d.refuse("a third source goes with .and, .or, .xor");
  if (detail.combine) d.inst.o[4] = d.predicate(d.arg(3), detail.negated);
  check_compare(d, compare, type, ftz);
  d.inst.counted = is_float(type) ? Class::Fp32 : Class::Int;
  if (type == Type::F16x2 || type == Type::BF16x2) {
    if (!pair) d.refuse("packed comparison needs p|q");
    choose_packed(d, detail, compare, packed_format(d, type, ftz));
    d.inst.run = &run_setp_packed;
    return;
  }
  detail.has_second = pair;
  detail.test[0] = choose_test(d, compare, type, ftz);
  d.inst.run = &run_setp;
}

// set: the truth value as a number, all ones or 1.0.  o: result, -, a, b, combined predicate
template <class D>
void run_set(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const SetDetail&>(*inst.detail);
  const Mask other = detail.combine ? w.predicate(inst.o[4]) : 0;
  const Mask value = combined(detail, detail.test[0](w, inst, 2), other);
  const D truth = static_cast<D>(inst.imm);
  D* result = w.row<D>(inst.o[0]);
  each_lane(lanes, [&](int lane) { result[lane] = value >> lane & 1 ? truth : D{0}; });
  w.flow(inst.o[0], lanes, inst, inst.o[2], inst.o[3], detail.combine ? inst.o[4] : inst.o[2]);
}

void run_set_packed(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const SetDetail&>(*inst.detail);
  const Mask other = detail.combine ? w.predicate(inst.o[4]) : 0;
  const Mask low = combined(detail, detail.test[0](w, inst, 2), other);
  const Mask high = combined(detail, detail.test[1](w, inst, 2), other);
  auto* result = w.row<uint32_t>(inst.o[0]);
  const auto truth = static_cast<uint32_t>(inst.imm);
  each_lane(lanes, [&](int lane) {
    result[lane] = (low >> lane & 1 ? truth : 0) | (high >> lane & 1 ? truth << 16 : 0);
  });
  w.flow(inst.o[0], lanes, inst, inst.o[2], inst.o[3], detail.combine ? inst.o[4] : inst.o[2]);
}

void decode_set(Decoder& d) {
  auto& detail = d.detail<SetDetail>();
  const bool ftz = d.take("ftz");
  const Compare compare = take_compare(d);
  detail.combine = static_cast<uint8_t>(d.take_one({"and", "or", "xor"}, 3) + 1) % 4;
  const Type to = d.take_type(), type = d.take_type();
  d.need_args(3, 4);
  d.inst.o[0] = d.dst(d.arg(0), to);
  d.inst.o[2] = d.src(d.arg(1), type);
  d.inst.o[3] = d.src(d.arg(2), type);
  if ((d.args() == 4) != (detail.combine != 0))
    d.refuse("a third source goes with .and, .or, .xor");
  if (detail.combine) d.inst.o[4] = d.predicate(d.arg(3), detail.negated);
  check_compare(d, compare, type, ftz);
  d.inst.counted = is_float(type) ? Class::Fp32 : Class::Int;
  if (type == Type::F16x2 || type == Type::BF16x2) {
    choose_packed(d, detail, compare, packed_format(d, type, ftz));
    d.inst.imm = to == Type::F16x2 ? 0x3c00 : to == Type::BF16x2 ? 0x3f80 : 0xffff;
    if (bits_of(to) != 32 || to == Type::F32)
      d.refuse(std::string("result of type .") + name_of(to) + " is not supported");
    d.inst.run = &run_set_packed;
    return;
  }
  detail.test[0] = choose_test(d, compare, type, ftz);
  switch (to) {
    case Type::U32:
    case Type::S32:
      d.inst.imm = 0xffffffff;
      d.inst.run = &run_set<uint32_t>;
      return;
    case Type::F32:
      d.inst.imm = 0x3f800000;
      d.inst.run = &run_set<uint32_t>;
      return;
    case Type::U16:
    case Type::S16:
      d.inst.imm = 0xffff;
      d.inst.run = &run_set<uint16_t>;
      return;
    case Type::F16:
      d.inst.imm = 0x3c00;
      d.inst.run = &run_set<uint16_t>;
      return;
    case Type::BF16:
      d.inst.imm = 0x3f80;
      d.inst.run = &run_set<uint16_t>;
      return;
    default:
      d.refuse(std::string("result of type .") + name_of(to) + " is not supported");
  }
}

// Only the value that is chosen has to be defined.  o: result, a, b, predicate
template <class T>
void run_selp(Warp& w, const Inst& inst, Mask lanes) {
  const T *a = w.row<T>(inst.o[1]), *b = w.row<T>(inst.o[2]);
  T* d = w.row<T>(inst.o[0]);
  const Mask p = w.predicate(inst.o[3]);
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = p >> lane & 1 ? a[lane] : b[lane];
  } else {
    each_lane(lanes, [&](int lane) { d[lane] = p >> lane & 1 ? a[lane] : b[lane]; });
  }
  const Mask chosen = (p & w.defined[inst.o[1].row]) | (~p & w.defined[inst.o[2].row]);
  const Mask known = chosen & w.defined[inst.o[3].row];
  if ((known & lanes) == lanes) {
    w.defined[inst.o[0].row] |= lanes;
  } else {
    w.flow(inst.o[0], lanes, inst, inst.o[1], inst.o[2], inst.o[3]);
    w.defined[inst.o[0].row] |= known & lanes;
  }
}

void decode_selp(Decoder& d) {
  const Type type = d.take_type();
  d.need_args(4, 4);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), type);
  d.inst.o[3] = d.plain_predicate(d.arg(3));
  d.inst.counted = is_float(type) ? Class::Fp32 : Class::Int;
  switch (bits_of(type)) {
    case 16:
      d.inst.run = &run_selp<uint16_t>;
      return;
    case 32:
      d.inst.run = &run_selp<uint32_t>;
      return;
    case 64:
      d.inst.run = &run_selp<uint64_t>;
      return;
    default:
      d.refuse("needs 16, 32 or 64 bits");
  }
}

template <class T>
T select_by_sign(T a, T b, int32_t c) {
  return c >= 0 ? a : b;
}
template <class T>
T select_by_float(T a, T b, float c) {
  return c >= 0 ? a : b;
}
template <class T>
T select_by_flushed(T a, T b, float c) {
  return flush(c) >= 0 ? a : b;
}

void decode_slct(Decoder& d) {
  const bool ftz = d.take("ftz");
  const Type type = d.take_type(), by = d.take_type();
  d.need_args(4, 4);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), type);
  d.inst.o[3] = d.src(d.arg(3), by);
  d.inst.counted = Class::Int;
  if (ftz && by != Type::F32) d.refuse(".ftz is for .f32");
  if (by == Type::S32)
    d.inst.run = PTXEMU_BY_BITS(d, type, select_by_sign);
  else if (by == Type::F32)
    d.inst.run =
        ftz ? PTXEMU_BY_BITS(d, type, select_by_flushed) : PTXEMU_BY_BITS(d, type, select_by_float);
  else
    d.refuse("selects by .s32 or .f32");
}

}  // namespace

const std::vector<Opcode> kCompareOpcodes = {
    {"setp", decode_setp}, {"set", decode_set}, {"selp", decode_selp}, {"slct", decode_slct}};

}  // namespace ptxemu
