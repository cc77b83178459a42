// mov and address conversion (PTX ISA, "Data Movement and Conversion Instructions").
#include <algorithm>

#include "../memory.h"
#include "pick.h"

namespace ptxemu {
namespace {

template <class T>
T same(T a) {
  return a;
}

template <bool kNegated>
void run_mov_pred(Warp& w, const Inst& inst, Mask lanes) {
  const Mask value = w.predicate(inst.o[1]);
  Mask& d = w.predicate(inst.o[0]);
  d = (d & ~lanes) | ((kNegated ? ~value : value) & lanes);
  w.flow(inst.o[0], lanes, inst, inst.o[1]);
}

// mov.b64 %rd, {%r0, %r1}: the first is the lowest
// Part: what a register of a part holds, at least 16 bits.
template <class Whole, class Part, size_t kParts = sizeof(Whole) / sizeof(Part)>
void run_pack(Warp& w, const Inst& inst, Mask lanes) {
  constexpr size_t kBits = 8 * sizeof(Whole) / kParts;
  constexpr auto kMask = static_cast<Part>((uint64_t{1} << kBits) - 1);
  Whole* d = w.row<Whole>(inst.o[0]);
  alignas(64) Whole value[kLanes] = {};
  Mask low = kAllLanes, high = kAllLanes;
  for (size_t i = 0; i < kParts; ++i) {
    const Part* s = w.row<Part>(inst.o[1 + i]);
    for (int lane = 0; lane < kLanes; ++lane)
      value[lane] |= static_cast<Whole>(static_cast<Whole>(s[lane] & kMask) << kBits * i);
    (i < kParts / 2 ? low : high) &= w.defined[inst.o[1 + i].row];
  }
  merge(d, value, lanes);
  if constexpr (kParts == 2) {
    w.flow(inst.o[0], lanes, inst, inst.o[1], inst.o[2]);
  } else {
    w.define(inst.o[0], lanes, low & high, inst);
  }
  if ((low & high & lanes) != lanes) w.define_halves(inst.o[0], lanes, low, high);
}

template <class Whole, class Part, size_t kParts = sizeof(Whole) / sizeof(Part)>
void run_unpack(Warp& w, const Inst& inst, Mask lanes) {
  constexpr size_t kBits = 8 * sizeof(Whole) / kParts;
  constexpr auto kMask = static_cast<Part>((uint64_t{1} << kBits) - 1);
  Whole value[kLanes];
  std::copy_n(w.row<Whole>(inst.o[0]), kLanes, value);  // a part may be the whole's own register
  for (size_t i = 0; i < kParts; ++i) {
    Part* d = w.row<Part>(inst.o[1 + i]);
    alignas(64) Part part[kLanes];
    for (int lane = 0; lane < kLanes; ++lane)
      part[lane] = static_cast<Part>(value[lane] >> kBits * i) & kMask;
    merge(d, part, lanes);
    const Mask known =
        i < kParts / 2 ? w.low_defined(inst.o[0].row) : w.high_defined(inst.o[0].row);
    if ((known & lanes) == lanes) {
      w.define(inst.o[1 + i], lanes, kAllLanes, inst);
    } else {
      w.flow(inst.o[1 + i], lanes, inst, inst.o[0]);
      w.defined[inst.o[1 + i].row] |= known & lanes;
    }
  }
}

template <class T>
void run_clock(Warp& w, const Inst& inst, Mask lanes) {
  const auto now = static_cast<T>(w.launch->clock_counter >> inst.imm);
  T* d = w.row<T>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = now; });
  w.define(inst.o[0], lanes, kAllLanes, inst);
}

// Time does not pass here as on a GPU: the clocks count executed warp instructions.
bool decode_clock(Decoder& d, Type type) {
  const Arg& a = d.arg(1);
  if (a.kind != Arg::Kind::Special) return false;
  const bool is_high = a.name == "%clock_hi" || a.name == "%globaltimer_hi";
  if (a.name != "%clock" && a.name != "%clock64" && a.name != "%globaltimer" &&
      a.name != "%globaltimer_lo" && !is_high)
    return false;
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.imm = is_high ? 32 : 0;
  d.inst.run = bits_of(type) == 64 ? &run_clock<uint64_t> : &run_clock<uint32_t>;
  return true;
}

void decode_vector(Decoder& d, Type type, const Arg& whole, const Arg& parts, bool is_pack) {
  const size_t count = parts.children.size();
  const int part_bits = bits_of(type) / static_cast<int>(std::max<size_t>(count, 1));
  const Type part = part_bits == 16   ? Type::B16
                    : part_bits == 32 ? Type::B32
                    : part_bits == 8  ? Type::B8
                                      : Type::None;
  if (count * static_cast<size_t>(part_bits) != static_cast<size_t>(bits_of(type)) ||
      part == Type::None)
    d.refuse("the parts do not make up the whole");
  d.inst.o[0] = is_pack ? d.dst(whole, type) : d.src(whole, type);
  for (size_t i = 0; i < count; ++i)
    d.inst.o[1 + i] = is_pack ? d.src(parts.children[i], part) : d.dst(parts.children[i], part);
  if (bits_of(type) == 32 && count == 2)
    d.inst.run = is_pack ? &run_pack<uint32_t, uint16_t> : &run_unpack<uint32_t, uint16_t>;
  else if (bits_of(type) == 64 && count == 2)
    d.inst.run = is_pack ? &run_pack<uint64_t, uint32_t> : &run_unpack<uint64_t, uint32_t>;
  else if (bits_of(type) == 64 && count == 4)
    d.inst.run = is_pack ? &run_pack<uint64_t, uint16_t> : &run_unpack<uint64_t, uint16_t>;
  else if (bits_of(type) == 32 && count == 4)
    d.inst.run = is_pack ? &run_pack<uint32_t, uint16_t, 4> : &run_unpack<uint32_t, uint16_t, 4>;
  else if (bits_of(type) == 16 && count == 2)
    d.inst.run = is_pack ? &run_pack<uint16_t, uint16_t, 2> : &run_unpack<uint16_t, uint16_t, 2>;
  else
    d.refuse("parts of this size are not supported");
}

void decode_mov(Decoder& d) {
  const Type type = d.take_type();
  if (is_float(type) && type != Type::F32 && type != Type::F64) d.refuse("type is not supported");
  d.need_args(2, 2);
  d.inst.counted = Class::Int;
  const Arg &to = d.arg(0), &from = d.arg(1);
  if (from.kind == Arg::Kind::Vector) return decode_vector(d, type, to, from, true);
  if (to.kind == Arg::Kind::Vector) return decode_vector(d, type, from, to, false);
  if (decode_clock(d, type)) return;
  d.inst.o[0] = d.dst(to, type);
  if (type == Type::Pred) {
    bool negated = false;
    d.inst.o[1] = d.predicate(from, negated);
    d.inst.run = negated ? &run_mov_pred<true> : &run_mov_pred<false>;
    return;
  }
  d.inst.o[1] = d.src(from, type);
  d.inst.in_halves = true;
  d.inst.run = PTXEMU_BY_BITS(d, type, same);
}

// ---- cvta: between addresses in a space and generic ones, which lie in the space's window

template <class T>
T plus(T a, T b) {
  return a + b;
}
template <class T>
T minus(T a, T b) {
  return a - b;
}

void decode_cvta(Decoder& d) {
  const bool to_space = d.take("to");
  const int space = d.take_one({"global", "shared", "shared::cta", "shared::cluster", "local",
                                "const", "param", "param::entry"});
  const Type type = d.take_type();
  d.need_args(2, 2);
  d.inst.counted = Class::Int;
  if (bits_of(type) != 64) d.refuse("needs 64-bit addresses");
  static constexpr uint64_t kWindows[] = {0,
                                          kSharedWindow,
                                          kSharedWindow,
                                          kSharedWindow,
                                          kLocalWindow,
                                          kConstWindow,
                                          kParamWindow,
                                          kParamWindow};
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.constant(kWindows[space], 8);
  d.inst.run = to_space ? &Lanewise<&minus<uint64_t>>::run : &Lanewise<&plus<uint64_t>>::run;
}

template <uint64_t kIndex>
bool in_window(uint64_t a) {
  return a / kWindow == kIndex;
}
// The window of parameters lies in that of global memory.
bool in_global(uint64_t a) {
  return a >> kAllocationShift != 0 || a / kWindow == kParamWindow / kWindow;
}

template <auto F>
void run_isspacep(Warp& w, const Inst& inst, Mask lanes) {
  Mask& p = w.predicate(inst.o[0]);
  p = (p & ~lanes) | (LanewiseTest<F>::apply(w, inst, 1) & lanes);
  w.flow(inst.o[0], lanes, inst, inst.o[1]);
}

void decode_isspacep(Decoder& d) {
  const int space = d.take_one({"global", "shared", "shared::cta", "shared::cluster", "local",
                                "const", "param", "param::entry"});
  d.need_args(2, 2);
  d.inst.o[0] = d.dst(d.arg(0), Type::Pred);
  d.inst.o[1] = d.src(d.arg(1), Type::B64);
  static constexpr Handler kTests[] = {&run_isspacep<&in_global>,
                                       &run_isspacep<&in_window<kSharedWindow / kWindow>>,
                                       &run_isspacep<&in_window<kSharedWindow / kWindow>>,
                                       &run_isspacep<&in_window<kSharedWindow / kWindow>>,
                                       &run_isspacep<&in_window<kLocalWindow / kWindow>>,
                                       &run_isspacep<&in_window<kConstWindow / kWindow>>,
                                       &run_isspacep<&in_window<kParamWindow / kWindow>>,
                                       &run_isspacep<&in_window<kParamWindow / kWindow>>};
  d.inst.run = kTests[space];
}

}  // namespace

const std::vector<Opcode> kMoveOpcodes = {
    {"mov", decode_mov}, {"cvta", decode_cvta}, {"isspacep", decode_isspacep}};

}  // namespace ptxemu
