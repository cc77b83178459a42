// Instructions by which the lanes of a warp exchange values (PTX ISA: shfl.sync, vote.sync,
// match.sync, redux.sync, activemask, elect.sync, bar.warp.sync).
#include <algorithm>
#include <map>

#include "pick.h"

namespace ptxemu {
namespace {

void by_members(Decoder& d, const Arg& a) {
  d.inst.flow = Flow::Sync;
  d.inst.by_lane = true;
  d.inst.members = d.src(a, Type::B32);
  d.inst.counted = Class::Shuffle;
}

// ---- shfl

enum class Shuffle { Up, Down, Butterfly, Index };

// o: result, predicate, value, b (lane or distance), c (clamp and segment mask)
template <Shuffle kMode>
void run_shfl(Warp& w, const Inst& inst, Mask lanes) {
  uint32_t value[kLanes];
  std::copy_n(w.row<uint32_t>(inst.o[2]), kLanes, value);
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  const uint32_t *b = w.row<uint32_t>(inst.o[3]), *c = w.row<uint32_t>(inst.o[4]);
  const Mask defined =
      w.defined[inst.o[2].row] & w.defined[inst.o[3].row] & w.defined[inst.o[4].row];
  Mask known = 0, inside = 0, switched_off = 0;
  each_lane(lanes, [&](int lane) {
    const int clamp = static_cast<int>(c[lane] & 31), segment = static_cast<int>(c[lane] >> 8 & 31);
    const int by = static_cast<int>(b[lane] & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = 0;
    bool p = false;
    switch (kMode) {
      case Shuffle::Up:
        from = lane - by;
        p = from >= last;
        break;
      case Shuffle::Down:
        from = lane + by;
        p = from <= last;
        break;
      case Shuffle::Butterfly:
        from = lane ^ by;
        p = from <= last;
        break;
      case Shuffle::Index:
        from = first | (by & ~segment);
        p = from <= last;
        break;
    }
    if (!p) from = lane;
    inside |= static_cast<Mask>(p) << lane;
    d[lane] = value[from];
    known |= (defined >> from & 1) << lane;
    if (!(lanes >> from & 1)) switched_off |= 1u << lane;
  });
  if (switched_off)
    w.report(Kind::Invalid, inst, switched_off, "shuffles from a lane that does not take part");
  w.define(inst.o[0], lanes, known & ~switched_off, inst);
  if (inst.imm) {
    Mask& p = w.predicate(inst.o[1]);
    p = (p & ~lanes) | (inside & lanes);
    w.define(inst.o[1], lanes, kAllLanes, inst);
  }
}

void decode_shfl(Decoder& d) {
  const int mode = d.take_one({"up", "down", "bfly", "idx"});
  if (d.take_type() != Type::B32) d.refuse("needs .b32");
  d.need_args(5, 5);
  const bool pair = d.arg(0).kind == Arg::Kind::Pair;
  d.inst.o[0] = d.dst(pair ? d.arg(0).children[0] : d.arg(0), Type::B32);
  if (pair) d.inst.o[1] = d.dst(d.arg(0).children[1], Type::Pred);
  d.inst.imm = pair;
  for (size_t i = 1; i <= 3; ++i) d.inst.o[1 + i] = d.src(d.arg(i), Type::B32);
  by_members(d, d.arg(4));
  static constexpr Handler kModes[] = {&run_shfl<Shuffle::Up>, &run_shfl<Shuffle::Down>,
                                       &run_shfl<Shuffle::Butterfly>, &run_shfl<Shuffle::Index>};
  d.inst.run = kModes[mode];
}

// ---- vote.  imm: whether the source predicate is negated; o: result, predicate

enum class Vote { All, Any, Uniform, Ballot };

template <Vote kMode>
void run_vote(Warp& w, const Inst& inst, Mask lanes) {
  w.require_defined(inst.o[1], lanes, inst, "a vote");
  const Mask p = w.predicate(inst.o[1]);
  const Mask yes = (inst.imm ? ~p : p) & lanes;
  if (kMode == Vote::Ballot) {
    uint32_t* d = w.row<uint32_t>(inst.o[0]);
    each_lane(lanes, [&](int lane) { d[lane] = yes; });
  } else {
    const bool result = kMode == Vote::All   ? yes == lanes
                        : kMode == Vote::Any ? yes != 0
                                             : yes == 0 || yes == lanes;
    Mask& d = w.predicate(inst.o[0]);
    d = (d & ~lanes) | (result ? lanes : 0);
  }
  w.define(inst.o[0], lanes, kAllLanes, inst);
}

void decode_vote(Decoder& d) {
  const int mode = d.take_one({"all", "any", "uni", "ballot"});
  const Type type = d.take_type();
  if ((mode == 3) != (type == Type::B32)) d.refuse("gives a predicate, or a ballot of .b32");
  d.need_args(3, 3);
  d.inst.o[0] = d.dst(d.arg(0), type);
  bool negated = false;
  d.inst.o[1] = d.predicate(d.arg(1), negated);
  d.inst.imm = negated;
  by_members(d, d.arg(2));
  static constexpr Handler kModes[] = {&run_vote<Vote::All>, &run_vote<Vote::Any>,
                                       &run_vote<Vote::Uniform>, &run_vote<Vote::Ballot>};
  d.inst.run = kModes[mode];
}

// ---- match.  o: result, predicate, value

template <class T>
void run_match_any(Warp& w, const Inst& inst, Mask lanes) {
  w.require_defined(inst.o[2], lanes, inst, "what it compares");
  const T* value = w.row<T>(inst.o[2]);
  std::map<T, Mask> same;
  each_lane(lanes, [&](int lane) { same[value[lane]] |= 1u << lane; });
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = same[value[lane]]; });
  w.define(inst.o[0], lanes, kAllLanes, inst);
}

template <class T>
void run_match_all(Warp& w, const Inst& inst, Mask lanes) {
  w.require_defined(inst.o[2], lanes, inst, "what it compares");
  const T* value = w.row<T>(inst.o[2]);
  bool all = true;
  each_lane(lanes, [&](int lane) { all &= value[lane] == value[__builtin_ctz(lanes)]; });
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = all ? lanes : 0; });
  w.define(inst.o[0], lanes, kAllLanes, inst);
  if (!inst.imm) return;
  Mask& p = w.predicate(inst.o[1]);
  p = (p & ~lanes) | (all ? lanes : 0);
  w.define(inst.o[1], lanes, kAllLanes, inst);
}

void decode_match(Decoder& d) {
  const bool all = d.take_one({"any", "all"}) == 1;
  d.take_one({"sync"});
  const Type type = d.take_type();
  d.need_args(3, 3);
  const bool pair = d.arg(0).kind == Arg::Kind::Pair;
  d.inst.o[0] = d.dst(pair ? d.arg(0).children[0] : d.arg(0), Type::B32);
  if (pair && !all) d.refuse("gives no predicate");
  if (pair) d.inst.o[1] = d.dst(d.arg(0).children[1], Type::Pred);
  d.inst.imm = pair;
  d.inst.o[2] = d.src(d.arg(1), type);
  by_members(d, d.arg(2));
  if (type == Type::B32)
    d.inst.run = all ? &run_match_all<uint32_t> : &run_match_any<uint32_t>;
  else if (type == Type::B64)
    d.inst.run = all ? &run_match_all<uint64_t> : &run_match_any<uint64_t>;
  else
    d.refuse("needs .b32 or .b64");
}

// ---- redux

// kWithItself: a lone value is changed too.
template <class T, T (*F)(T, T), bool kWithItself = false>
void run_redux(Warp& w, const Inst& inst, Mask lanes) {
  const T* value = w.row<T>(inst.o[1]);
  const bool known = (w.defined[inst.o[1].row] & lanes) == lanes;
  T result = value[__builtin_ctz(lanes)];
  if (kWithItself) result = F(result, result);
  each_lane(lanes & (lanes - 1), [&](int lane) { result = F(result, value[lane]); });
  T* d = w.row<T>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = result; });
  w.define(inst.o[0], lanes, known ? kAllLanes : 0, inst);
}

uint32_t sum(uint32_t a, uint32_t b) { return a + b; }
uint32_t bits_and(uint32_t a, uint32_t b) { return a & b; }
uint32_t bits_or(uint32_t a, uint32_t b) { return a | b; }
uint32_t bits_xor(uint32_t a, uint32_t b) { return a ^ b; }
template <class T>
T smaller(T a, T b) {
  return std::min(a, b);
}
template <class T>
T larger(T a, T b) {
  return std::max(a, b);
}

// Of floats, by their bits: NaN, signalling or not, loses against a number, or gives the canonical
// NaN; -0 < +0.
template <bool kLarger, bool kNan, bool kAbs>
uint32_t extreme_float(uint32_t a, uint32_t b) {
  constexpr uint32_t kCanonical = 0x7fffffff;
  if (kAbs) a &= 0x7fffffff, b &= 0x7fffffff;
  const bool a_is_nan = (a & 0x7fffffff) > 0x7f800000, b_is_nan = (b & 0x7fffffff) > 0x7f800000;
  if (kNan ? a_is_nan || b_is_nan : a_is_nan && b_is_nan) return kCanonical;
  if (a_is_nan) return b;
  if (b_is_nan) return a;
  // As integers of sign and magnitude, floats are in order.
  const auto ordered = [](uint32_t v) {
    return static_cast<int32_t>(v & 0x80000000 ? ~(v ^ 0x80000000) : v);
  };
  return (ordered(a) < ordered(b)) != kLarger ? a : b;
}
template <bool kLarger>
Handler float_redux(bool nan, bool abs) {
  if (nan)
    return abs ? &run_redux<uint32_t, extreme_float<kLarger, true, true>, true>
               : &run_redux<uint32_t, extreme_float<kLarger, true, false>, true>;
  return abs ? &run_redux<uint32_t, extreme_float<kLarger, false, true>, true>
             : &run_redux<uint32_t, extreme_float<kLarger, false, false>, true>;
}

void decode_redux(Decoder& d) {
  const int op = d.take_one({"add", "and", "or", "xor", "min", "max"});
  const bool abs = d.take("abs"), nan = d.take("NaN");
  const Type type = d.take_type();
  d.need_args(3, 3);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  by_members(d, d.arg(2));
  if (type == Type::F32) {
    if (op < 4) d.refuse("of .f32 only min and max are supported");
    if (d.module.ast.target < 100) d.refuse(".f32 needs sm_100");
    d.inst.run = op == 4 ? float_redux<false>(nan, abs) : float_redux<true>(nan, abs);
    return;
  }
  const bool is_logic = op >= 1 && op <= 3, is_integer = type == Type::U32 || type == Type::S32;
  if (abs || nan || (is_logic ? type != Type::B32 : !is_integer)) d.refuse("is not supported");
  static constexpr Handler kUnsigned[] = {
      &run_redux<uint32_t, sum>,      &run_redux<uint32_t, bits_and>, &run_redux<uint32_t, bits_or>,
      &run_redux<uint32_t, bits_xor>, &run_redux<uint32_t, smaller>,  &run_redux<uint32_t, larger>};
  d.inst.run = kUnsigned[op];
  if (is_signed(type) && op == 4) d.inst.run = &run_redux<int32_t, smaller>;
  if (is_signed(type) && op == 5) d.inst.run = &run_redux<int32_t, larger>;
}

// ---- activemask, elect, bar.warp.sync

void run_activemask(Warp& w, const Inst& inst, Mask lanes) {
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = lanes; });
  w.define(inst.o[0], lanes, kAllLanes, inst);
}

void decode_activemask(Decoder& d) {
  if (d.take_type() != Type::B32) d.refuse("needs .b32");
  d.need_args(1, 1);
  d.inst.o[0] = d.dst(d.arg(0), Type::B32);
  d.inst.run = &run_activemask;
}

// o: the elected lane, whether this is it
void run_elect(Warp& w, const Inst& inst, Mask lanes) {
  const int leader = __builtin_ctz(lanes);
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = static_cast<uint32_t>(leader); });
  Mask& p = w.predicate(inst.o[1]);
  p = (p & ~lanes) | 1u << leader;
  w.define(inst.o[0], lanes, kAllLanes, inst);
  w.define(inst.o[1], lanes, kAllLanes, inst);
}

void decode_elect(Decoder& d) {
  d.need_args(2, 2);
  if (d.arg(0).kind != Arg::Kind::Pair) d.refuse("needs d|p");
  d.inst.o[0] = d.dst(d.arg(0).children[0], Type::B32);
  d.inst.o[1] = d.dst(d.arg(0).children[1], Type::Pred);
  by_members(d, d.arg(1));
  d.inst.run = &run_elect;
}

void run_warp_barrier(Warp& w, const Inst&, Mask) { w.tick(); }

void decode_warp_barrier(Decoder& d) {
  d.need_args(1, 1);
  by_members(d, d.arg(0));
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_warp_barrier;
}

}  // namespace

const std::vector<Opcode> kWarpOpcodes = {
    {"shfl.sync", decode_shfl},
    {"vote.sync", decode_vote},
    {"match", decode_match},
    {"redux.sync", decode_redux},
    {"activemask", decode_activemask},
    {"elect.sync", decode_elect},
    {"bar.warp.sync", decode_warp_barrier},
};

}  // namespace ptxemu
