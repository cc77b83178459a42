// atom and red (PTX ISA, "Parallel Synchronization and Communication Instructions": atom, red).
// The lanes of a warp act one after another, in an order that the launch's seed decides.
#include <algorithm>
#include <cmath>

#include "../access.h"
#include "async.h"
#include "pick.h"

namespace ptxemu {
namespace {

enum class Op : uint8_t { And, Or, Xor, Add, Inc, Dec, Min, Max, Exch, Cas };

struct AtomicDetail : Detail {
  Op op = Op::Add;
  Type type = Type::None;
  bool returns = false;
  bool releases = false;
  int elements = 1;  // of a vector
  int register_bytes = 0;
};

template <class T>
T extreme(Op op, T a, T b) {
  return op == Op::Min ? std::min(a, b) : std::max(a, b);
}

// NaN, signalling or not, loses against a number; -0 < +0.
float extreme_number(Op op, float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == b) return std::signbit(a) == (op == Op::Min) ? a : b;
  return (a < b) == (op == Op::Min) ? a : b;
}

uint16_t half_op(Op op, Type type, uint16_t a, uint16_t b) {
  const bool brain = type == Type::BF16;
  const float x = brain ? bf16_to_float(a) : f16_to_float(a),
              y = brain ? bf16_to_float(b) : f16_to_float(b);
  const float v = op == Op::Add ? x + y : extreme_number(op, x, y);
  return brain ? float_to_bf16(v) : float_to_f16(v);
}

// PTX ISA, "atom": in global memory .add.f32 flushes subnormal numbers, in shared memory it does
// not.
uint64_t add_single(uint64_t old, uint64_t b, bool flushes) {
  const float x = bit_cast<float>(static_cast<uint32_t>(old)),
              y = bit_cast<float>(static_cast<uint32_t>(b));
  return bit_cast<uint32_t>(flushes ? flush(flush(x) + flush(y)) : x + y);
}

uint64_t combine(Op op, Type type, uint64_t old, uint64_t b, uint64_t c, bool flushes) {
  const int bits = bits_of(type);
  const uint64_t mask = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  switch (op) {
    case Op::And:
      return old & b;
    case Op::Or:
      return old | b;
    case Op::Xor:
      return old ^ b;
    case Op::Exch:
      return b;
    case Op::Cas:
      return old == (b & mask) ? c : old;
    case Op::Inc:
      return old >= b ? 0 : old + 1;
    case Op::Dec:
      return old == 0 || old > b ? b : old - 1;
    case Op::Add:
      switch (type) {
        case Type::F32:
          return add_single(old, b, flushes);
        case Type::F64:
          return bit_cast<uint64_t>(bit_cast<double>(old) + bit_cast<double>(b));
        case Type::F16:
        case Type::BF16:
          return half_op(op, type, static_cast<uint16_t>(old), static_cast<uint16_t>(b));
        default:
          return (old + b) & mask;
      }
    case Op::Min:
    case Op::Max:
      switch (type) {
        case Type::S32:
          return static_cast<uint32_t>(
              extreme(op, static_cast<int32_t>(old), static_cast<int32_t>(b)));
        case Type::S64:
          return static_cast<uint64_t>(
              extreme(op, static_cast<int64_t>(old), static_cast<int64_t>(b)));
        case Type::U32:
        case Type::U64:
          return extreme(op, old, b);
        case Type::F16:
        case Type::BF16:
          return half_op(op, type, static_cast<uint16_t>(old), static_cast<uint16_t>(b));
        default:
          throw std::logic_error("atomic extreme of this type");
      }
  }
  return old;
}

Type half_of(Type type) {
  return type == Type::F16x2 ? Type::F16 : type == Type::BF16x2 ? Type::BF16 : Type::None;
}

uint64_t combine_element(const AtomicDetail& detail, uint64_t old, uint64_t b, uint64_t c,
                         bool is_global) {
  const Type half = half_of(detail.type);
  if (half == Type::None) return combine(detail.op, detail.type, old, b, c, is_global);
  return combine(detail.op, half, old & 0xffff, b & 0xffff, 0, false) |
         combine(detail.op, half, old >> 16 & 0xffff, b >> 16 & 0xffff, 0, false) << 16;
}

uint64_t value_of(Warp& w, Operand o, int lane, int bytes) {
  uint64_t value = 0;
  std::memcpy(&value, w.row<uint8_t>(o) + lane * bytes, static_cast<size_t>(bytes));
  return value;
}

// o[0] address; more: results, sources, third operands
void run_atomic(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const AtomicDetail&>(*inst.detail);
  const Addresses a = addresses(w, inst, inst.o[0], lanes);
  const int n = detail.elements, bytes = bytes_of(detail.type);
  const Operand *results = inst.more.data(), *b = results + n, *c = b + n;
  for (int i = 0; i < n; ++i) {
    w.require_defined(b[i], lanes, inst, "what an atomic operation uses");
    if (detail.op == Op::Cas) w.require_defined(c[i], lanes, inst, "what an atomic operation uses");
  }
  int order[kLanes];
  for (int i = 0; i < kLanes; ++i) order[i] = i;
  std::shuffle(order, order + kLanes, w.launch->random);
  Mask known = 0;
  uint64_t seen = 0;
  bool changed = false;
  for (int lane : order) {
    if (!(lanes >> lane & 1)) continue;
    Location at = locate(w, inst, lane, inst.space, a.at[lane], static_cast<uint64_t>(bytes * n),
                         static_cast<uint64_t>(bytes * n), true);
    if (at.host == nullptr) continue;
    strong_acquire(w, at);
    uint8_t before[32], after[32];
    const bool was_known =
        read_memory(w, inst, lane, at, static_cast<uint64_t>(bytes * n), before, true);
    if (was_known) known |= 1u << lane;
    for (int i = 0; i < n; ++i) {
      uint64_t old = 0;
      std::memcpy(&old, before + i * bytes, static_cast<size_t>(bytes));
      const uint64_t next =
          combine_element(detail, old, value_of(w, b[i], lane, detail.register_bytes),
                          detail.op == Op::Cas ? value_of(w, c[i], lane, detail.register_bytes) : 0,
                          at.space == Space::Global);
      std::memcpy(after + i * bytes, &next, static_cast<size_t>(bytes));
      if (detail.returns)
        std::memcpy(w.row<uint8_t>(results[i]) + lane * detail.register_bytes, &old,
                    static_cast<size_t>(detail.register_bytes));
      seen = seen * 31 + old;
    }
    changed |= std::memcmp(before, after, static_cast<size_t>(bytes * n)) != 0;
    if (!is_float(detail.type))
      strong_release(w, at, detail.releases);  // sums of floats are no flags
    write_memory(w, inst, lane, at, static_cast<uint64_t>(bytes * n), after,
                 was_known || detail.op == Op::Exch, true);
    if (!was_known && detail.op != Op::Exch)
      w.report(Kind::Uninitialised, inst, 1u << lane,
               "an atomic operation on memory that was never written");
  }
  if (detail.returns)
    for (int i = 0; i < n; ++i) w.define(results[i], lanes, known, inst);
  if (changed)
    w.launch->polls_in_vain = 0;
  else if (detail.returns)
    note_poll(w, inst, seen);
}

}  // namespace

uint64_t reduce_element(BulkReduce op, Type type, uint64_t old, uint64_t value) {
  static constexpr Op kOps[] = {Op::Add, Op::Min, Op::Max, Op::Inc,
                                Op::Dec, Op::And, Op::Or,  Op::Xor};
  AtomicDetail detail;
  detail.op = kOps[static_cast<size_t>(op)];
  detail.type = type;
  return combine_element(detail, old, value, 0, true);
}

namespace {

Op take_op(Decoder& d) {
  static constexpr Op kOps[] = {Op::And, Op::Or,  Op::Xor, Op::Add,  Op::Inc,
                                Op::Dec, Op::Min, Op::Max, Op::Exch, Op::Cas};
  return kOps[d.take_one({"and", "or", "xor", "add", "inc", "dec", "min", "max", "exch", "cas"})];
}

// The types of an operation; vectors are of floats, in global memory.
bool is_type_of(Op op, Type type, bool vector) {
  const bool half =
      type == Type::F16 || type == Type::BF16 || type == Type::F16x2 || type == Type::BF16x2;
  if (vector)
    return half ? op == Op::Add || op == Op::Min || op == Op::Max
                : type == Type::F32 && op == Op::Add;
  switch (op) {
    case Op::And:
    case Op::Or:
    case Op::Xor:
    case Op::Exch:
      return type == Type::B32 || type == Type::B64;
    case Op::Cas:
      return type == Type::B16 || type == Type::B32 || type == Type::B64;
    case Op::Inc:
    case Op::Dec:
      return type == Type::U32;
    case Op::Min:
    case Op::Max:
      return type == Type::U32 || type == Type::S32 || type == Type::U64 || type == Type::S64;
    case Op::Add:
      return half || type == Type::U32 || type == Type::S32 || type == Type::U64 ||
             type == Type::F32 || type == Type::F64;
  }
  return false;
}

void decode_atomic(Decoder& d, bool returns) {
  auto& detail = d.detail<AtomicDetail>();
  detail.returns = returns;
  switch (d.take_one({"global", "shared", "shared::cta", "shared::cluster"}, 4)) {
    case 0:
      d.inst.space = Space::Global;
      break;
    case 3:
      d.inst.space = Space::SharedCluster;
      break;
    case 4:
      d.inst.space = Space::Generic;
      break;
    default:
      d.inst.space = Space::Shared;
      break;
  }
  detail.releases = d.take_one({"release", "acq_rel", "relaxed", "acquire"}, 3) < 2;
  d.ignore({"cta", "cluster", "gpu", "sys"});
  const bool hint = d.take("L2::cache_hint");
  static constexpr int kCounts[] = {2, 4, 8, 1};
  detail.elements = kCounts[d.take_one({"v2", "v4", "v8"}, 3)];
  detail.op = take_op(d);
  detail.type = d.take_type();
  const int bytes = bytes_of(detail.type);
  const bool vector = detail.elements > 1;
  if (!is_type_of(detail.op, detail.type, vector))
    d.refuse(std::string("type .") + name_of(detail.type) + " is not supported");
  if (vector && (d.inst.space == Space::Shared || bytes * detail.elements > 16))
    d.refuse("this vector is not supported");
  if (!returns && (detail.op == Op::Exch || detail.op == Op::Cas))
    d.refuse("an operation without effect but its result");
  if (is_float(detail.type) && detail.type != Type::F32 && detail.type != Type::F64)
    d.take_one({"noftz"});
  const size_t sources = detail.op == Op::Cas ? 2 : 1;
  d.need_args(returns + 1 + sources + hint, returns + 1 + sources + hint);
  d.inst.o[0] = d.address(d.arg(returns ? 1 : 0));
  d.inst.counted = Class::Atomic;
  d.inst.run = &run_atomic;
  detail.register_bytes = bytes;
  const auto add = [&](const Arg& a, bool is_result) {
    const std::vector<Arg> parts = Decoder::elements(a);
    if (parts.size() != static_cast<size_t>(detail.elements))
      d.refuse("has " + std::to_string(parts.size()) + " elements");
    for (const Arg& part : parts)
      d.inst.more.push_back(is_result ? d.dst(part, detail.type) : d.src(part, detail.type));
  };
  if (returns) {
    add(d.arg(0), true);
  } else {
    d.inst.more.resize(static_cast<size_t>(detail.elements));
  }
  add(d.arg(returns ? 2 : 1), false);
  if (detail.op == Op::Cas) add(d.arg(returns ? 3 : 2), false);
  if (d.inst.space != Space::Global) d.touches_shared(bytes);
  if (d.inst.space != Space::Shared) d.writes_global(bytes);
}

}  // namespace

const std::vector<Opcode> kAtomicOpcodes = {
    {"atom", [](Decoder& d) { decode_atomic(d, true); }},
    {"red", [](Decoder& d) { decode_atomic(d, false); }},
};

}  // namespace ptxemu
