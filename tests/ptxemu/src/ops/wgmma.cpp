// wgmma: matrix products of a warpgroup (four warps), asynchronous (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Instructions").
//
// Each of the four warps computes 16 of the 64 rows. A product is carried out when the program
// waits for its group, as late as it may: what reads the accumulators before, changes the operands'
// registers or overwrites shared memory is seen, and gives wrong numbers too. While it is under way
// its registers are watched (Function::watched).
#include "wgmma.h"

#include <algorithm>

#include "async.h"

namespace ptxemu {
namespace {

constexpr uint8_t kAccumulator = 1, kSource = 2, kUnfenced = 4;
// In Warp::watched_rows, which has no such row: the warp has executed a wgmma.fence.
constexpr uint32_t kFenceSeen = UINT32_MAX;

// ---- watching registers

void set_watch(Warp& w, const AsyncMatrix& m, bool on) {
  const auto& detail = static_cast<const WgmmaDetail&>(*m.inst->detail);
  const auto mark = [&](const Operand& o, uint8_t bit) {
    uint8_t& flags = w.watched_rows[o.row];
    flags = on ? flags | bit : flags & ~bit;
  };
  for (int i = 0; i < detail.d_count; ++i) mark(m.inst->more[static_cast<size_t>(i)], kAccumulator);
  if (detail.a_in_registers)
    for (int i = 0; i < 4; ++i) mark(sources(*m.inst)[i], kSource);
}

void finish(Warp& w, const AsyncMatrix& m) {
  carry_out(w, m);
  set_watch(w, m, false);
  for (const auto& [at, size] : m.read)
    w.block->shared->end_async_read(at, size, stamp(w.clock(), w.clock_index, 0));
}

// ---- instructions

void run_fence(Warp& w, const Inst&, Mask) {
  for (auto& [row, flags] : w.watched_rows) flags &= static_cast<uint8_t>(~kUnfenced);
  w.watched_rows[kFenceSeen] = 1;
}

void check_registers(Warp& w, const Inst& inst) {
  const auto& detail = static_cast<const WgmmaDetail&>(*inst.detail);
  if (!w.watched_rows.count(kFenceSeen))
    w.report(Kind::AsyncUnwaited, inst, w.live, "there was no wgmma.fence before the first wgmma");
  for (size_t i = 0; i < inst.more.size(); ++i) {
    const auto found = w.watched_rows.find(inst.more[i].row);
    const uint8_t flags = found == w.watched_rows.end() ? 0 : found->second;
    const bool is_source = i >= static_cast<size_t>(detail.d_count);
    if (flags & kUnfenced) {
      w.report(Kind::AsyncUnwaited, inst, w.live,
               "its registers were written with no wgmma.fence since");
      found->second &= static_cast<uint8_t>(~kUnfenced);
    }
    if ((is_source && (flags & kAccumulator)) || (!is_source && (flags & kSource)))
      w.report(Kind::AsyncUnwaited, inst, w.live,
               "uses a register of a wgmma that is under way, not waited for");
  }
}

// The value that all lanes have, which the instruction demands.
uint64_t descriptor(Warp& w, const Inst& inst, Operand o) {
  w.require_defined(o, kAllLanes, inst, "a matrix descriptor");
  const uint64_t* values = w.row<uint64_t>(o);
  if (std::any_of(values, values + kLanes, [&](uint64_t v) { return v != values[0]; }))
    w.report(Kind::Invalid, inst, kAllLanes, "the lanes have different matrix descriptors");
  if (values[0] & MatrixDescriptor::kUnsupported)
    w.report(Kind::Invalid, inst, kAllLanes,
             "a matrix descriptor with a base offset, or with other bits set, is not supported");
  return values[0];
}

void run_mma(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const WgmmaDetail&>(*inst.detail);
  if (lanes != kAllLanes) w.report(Kind::Invalid, inst, ~lanes, "needs all lanes of the warp");
  if (w.block->warps.size() <= (w.index | 3))
    w.report(Kind::Invalid, inst, lanes, "needs a warpgroup: four warps");
  check_registers(w, inst);
  auto m = std::make_shared<AsyncMatrix>();
  m->inst = &inst;
  m->frame = w.frame;
  if (!detail.a_in_registers) {
    m->a_descriptor = descriptor(w, inst, inst.o[0]);
  } else {
    for (int i = 0; i < 4; ++i) w.require_defined(sources(inst)[i], lanes, inst, "a factor");
  }
  m->b_descriptor = descriptor(w, inst, inst.o[1]);
  const Mask scale = w.predicate(inst.o[2]);
  w.require_defined(inst.o[2], lanes, inst, "whether to accumulate");
  if (scale != 0 && scale != kAllLanes)
    w.report(Kind::Invalid, inst, lanes, "the lanes have different scale-d");
  m->accumulate = (scale & 1) != detail.scale_d_negated;
  for (int i = 0; i < detail.d_count; ++i) {
    if (m->accumulate)
      w.require_defined(inst.more[static_cast<size_t>(i)], lanes, inst, "an accumulator");
    w.defined[inst.more[static_cast<size_t>(i)].row] = kAllLanes;
  }
  begin_reading(w, *m);
  set_watch(w, *m, true);
  w.open_matrices.push_back(std::move(m));
}

void run_commit(Warp& w, const Inst&, Mask) {
  w.matrix_groups.push_back(std::move(w.open_matrices));
  w.open_matrices.clear();
}

// What is still under way keeps its registers, and its shared memory, of which another may have
// read the same.
void keep(Warp& w, const AsyncMatrix& m) {
  set_watch(w, m, true);
  for (const auto& [at, size] : m.read)
    w.block->shared->begin_async_read(w.access(*m.inst, 0), at, size);
}

void run_wait(Warp& w, const Inst& inst, Mask) {
  if (w.matrix_groups.size() <= static_cast<size_t>(inst.imm)) return;
  while (w.matrix_groups.size() > static_cast<size_t>(inst.imm)) {
    for (const auto& m : w.matrix_groups.front()) finish(w, *m);
    w.matrix_groups.erase(w.matrix_groups.begin());
  }
  for (const auto& group : w.matrix_groups)
    for (const auto& m : group) keep(w, *m);
  for (const auto& m : w.open_matrices) keep(w, *m);
}

// ---- decoding

bool is_integer(Element e) { return e == Element::S8 || e == Element::U8; }

void decode_shape(Decoder& d, WgmmaDetail& detail) {
  const std::string shape = d.take_next();
  int used = 0;
  if (std::sscanf(shape.c_str(), "m64n%dk%d%n", &detail.n, &detail.k, &used) != 2 ||
      used != static_cast<int>(shape.size()) || detail.n < 8 || detail.n > 256 || detail.n % 8)
    d.refuse("shape ." + shape + " is not supported");
}

// PTX ISA, "wgmma.mma_async": which types go together.
void decode_types(Decoder& d, WgmmaDetail& detail) {
  detail.saturate = d.take("satfinite");
  detail.result = d.take_type();
  detail.a = matrix_element(d, d.take_type());
  detail.b = matrix_element(d, d.take_type());
  const int bits = bits_of(detail.a);
  const bool is_int = is_integer(detail.a);
  if (bits > 32 || detail.k * bits != 256) d.refuse("this shape is not of these types");
  if (bits == 8 ? bits_of(detail.b) != 8 || is_integer(detail.b) != is_int : detail.b != detail.a)
    d.refuse("A and B of these types do not go together");
  const bool has_half = detail.a == Element::F16 || (bits == 8 && !is_int);
  if (is_int ? detail.result != Type::S32
             : detail.result != Type::F32 && !(detail.result == Type::F16 && has_half))
    d.refuse(std::string("a result of .") + name_of(detail.result) + " is not supported");
  if (detail.saturate && !is_int) d.refuse("only integers have .satfinite");
  if (is_int && detail.n > 32 && detail.n % 16) d.refuse("integers have no shape with this n");
}

// An immediate that may be one of two values; gives whether it is the second.
bool take_flag(Decoder& d, size_t arg, int64_t no, int64_t yes) {
  const auto value = static_cast<int64_t>(d.integer(d.arg(arg)));
  if (value != no && value != yes)
    d.refuse("operand " + std::to_string(arg) + " is " + std::to_string(value) + ", needs " +
             std::to_string(no) + " or " + std::to_string(yes));
  return value == yes;
}

void decode_mma(Decoder& d) {
  auto& detail = d.detail<WgmmaDetail>();
  d.take_one({"sync"});
  d.take_one({"aligned"});
  decode_shape(d, detail);
  decode_types(d, detail);
  if (detail.result == Type::F32 && bits_of(detail.a) >= 16)
    detail.rule = sum_rule(detail.a, d.module.ast.target);
  detail.d_count = detail.result == Type::F16 ? detail.n / 4 : detail.n / 2;
  d.need_args(4, 8);
  const std::vector<Arg> results = Decoder::elements(d.arg(0));
  if (results.size() != static_cast<size_t>(detail.d_count))
    d.refuse("has " + std::to_string(results.size()) + " accumulators, needs " +
             std::to_string(detail.d_count));
  for (const Arg& a : results)
    d.inst.more.push_back(d.dst(a, detail.result == Type::F32 ? Type::F32 : Type::B32));
  detail.a_in_registers = d.arg(1).kind == Arg::Kind::Vector;
  if (detail.a_in_registers) {
    if (d.arg(1).children.size() != 4) d.refuse("A has 4 registers");
    for (const Arg& a : d.arg(1).children) d.inst.more.push_back(d.src(a, Type::B32));
  } else {
    d.inst.o[0] = d.src(d.arg(1), Type::B64);
  }
  d.inst.o[1] = d.src(d.arg(2), Type::B64);
  d.inst.o[2] = d.predicate(d.arg(3), detail.scale_d_negated);
  const bool has_signs = !is_integer(detail.a), has_majors = bits_of(detail.a) == 16;
  const size_t count = 4u + 2 * has_signs + has_majors * (detail.a_in_registers ? 1u : 2u);
  d.need_args(count, count);
  if (has_signs) {
    detail.sign_a = take_flag(d, 4, -1, 1) ? 1.0f : -1.0f;
    detail.sign_b = take_flag(d, 5, -1, 1) ? 1.0f : -1.0f;
  }
  if (has_majors && !detail.a_in_registers) detail.transposed_a = take_flag(d, 6, 0, 1);
  if (has_majors) detail.transposed_b = take_flag(d, count - 1, 0, 1);
  d.inst.flow = Flow::Sync;
  d.inst.counted = Class::Wgmma;
  d.inst.run = &run_mma;
}

template <Handler kRun>
void decode_plain(Decoder& d) {
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.inst.flow = Flow::Sync;
  d.inst.counted = Class::Barrier;
  d.inst.run = kRun;
  const size_t count = kRun == &run_wait;
  d.need_args(count, count);
  if (count) d.inst.imm = static_cast<int64_t>(d.integer(d.arg(0)));
  if (d.inst.imm < 0) d.refuse("needs a number of groups");
}

}  // namespace

// A row that a wgmma uses is touched by another instruction. PTX wants a fence after reads, too;
// compilers put these behind the fence (Triton's does).
void check_watched_registers(Warp& w, const Inst& inst) {
  for (const auto& [row, touch] : w.frame->function->watched.at(inst.index)) {
    const bool is_write = touch != Touch::Read;
    uint8_t& flags = w.watched_rows[row];
    if ((flags & kAccumulator) || (is_write && (flags & kSource)))
      w.report(Kind::AsyncUnwaited, inst, w.live,
               std::string(is_write ? "writes" : "reads") +
                   " a register of a wgmma that is under way, not waited for");
    if (touch == Touch::Write) flags |= kUnfenced;
  }
}

const std::vector<Opcode> kWgmmaOpcodes = {{"wgmma.mma_async", decode_mma},
                                           {"wgmma.fence", decode_plain<&run_fence>},
                                           {"wgmma.commit_group", decode_plain<&run_commit>},
                                           {"wgmma.wait_group", decode_plain<&run_wait>}};

}  // namespace ptxemu
