// mbarrier: barriers in shared memory that count arrivals and bytes (PTX ISA, "mbarrier").
//
// A phase ends when every expected arrival and every announced byte has come. Arrivals bring the clocks of their warps;
// who sees a phase ended is ordered after all of them.
#include <algorithm>

#include "async.h"
#include "pick.h"

namespace ptxemu {
namespace {

constexpr uint64_t kPollCost = 500;  // a wait in vain weighs more than a load in vain: only a few hundred are needed
constexpr uint64_t kMaxCount = (1u << 20) - 1;

enum class Act : uint8_t { Init, Inval, Arrive, ArriveDrop, ExpectTx, CompleteTx, ArriveExpectTx, TestWait, TryWait, AsyncArrive };

struct MbarrierDetail : Detail {
  Act act = Act::Init;
  bool parity = false, no_increment = false, has_state = false, has_count = false;
};

void maybe_complete(Block& block, MemoryBarrier& b) {
  if (b.arrivals != 0 || b.bytes != 0) return;
  ++b.phase;
  b.arrivals = b.expected;
  b.phase_clocks = b.clocks;
  for (const auto& other : block.cluster->blocks)
    for (const auto& warp : other->warps) warp->polls = 0;
}

void arrive(Warp& w, const Inst& inst, int lane, Block& block, MemoryBarrier& b, uint64_t count) {
  if (count > b.arrivals) {
    w.report(Kind::Invalid, inst, 1u << lane,
             std::to_string(count) + " arrivals at an mbarrier that expects " + std::to_string(b.arrivals) + " more in this phase");
    count = b.arrivals;
  }
  b.arrivals -= static_cast<uint32_t>(count);
  join(b.clocks, w.seen);
  maybe_complete(block, b);
}

void init(Warp& w, const Inst& inst, int lane, const Location& at, uint64_t count) {
  if (count < 1 || count > kMaxCount)
    w.report(Kind::Invalid, inst, 1u << lane, "an mbarrier for " + std::to_string(count) + " arrivals");
  if (at.block->memory_barriers.count(at.offset))
    w.report(Kind::Invalid, inst, 1u << lane, "initialises an mbarrier that is already there; mbarrier.inval ends it");
  const uint64_t opaque = 0x6d62000000000000u | count;
  write_memory(w, inst, lane, at, 8, &opaque, true);
  MemoryBarrier b;
  b.expected = b.arrivals = static_cast<uint32_t>(count);
  b.clocks.assign(w.seen.size(), 0);
  b.phase_clocks = b.clocks;
  at.block->memory_barriers[at.offset] = b;
}

// o[0] address, o[1] count, bytes, state or parity, o[2] result (state or predicate), o[3] count of arrive with bytes
void run_lane(Warp& w, const Inst& inst, int lane, const Location& at, Mask& succeeded) {
  const auto& detail = static_cast<const MbarrierDetail&>(*inst.detail);
  if (detail.act == Act::Init) return init(w, inst, lane, at, w.row<uint32_t>(inst.o[1])[lane]);
  MemoryBarrier* b = find_barrier(w, inst, lane, at);
  if (b == nullptr) return;
  if (detail.has_state) w.row<uint64_t>(inst.o[2])[lane] = b->phase;
  const uint64_t count = detail.has_count ? w.row<uint32_t>(inst.o[1])[lane] : 1;
  switch (detail.act) {
    case Act::Inval:
      at.block->memory_barriers.erase(at.offset);
      return;
    case Act::Arrive:
      return arrive(w, inst, lane, *at.block, *b, count);
    case Act::ArriveDrop:
      b->expected -= static_cast<uint32_t>(count);
      return arrive(w, inst, lane, *at.block, *b, count);
    case Act::AsyncArrive:
      // Without .noinc the phase first expects one arrival more, so that nothing changes but the order.
      finish_all_copies(w, 1u << lane);
      if (!detail.no_increment) ++b->arrivals;
      return arrive(w, inst, lane, *at.block, *b, 1);
    case Act::ExpectTx:
      b->bytes += w.row<uint32_t>(inst.o[1])[lane];
      return;
    case Act::CompleteTx:
      b->bytes -= w.row<uint32_t>(inst.o[1])[lane];
      return maybe_complete(*at.block, *b);
    case Act::ArriveExpectTx:
      b->bytes += w.row<uint32_t>(inst.o[1])[lane];
      return arrive(w, inst, lane, *at.block, *b, 1);
    case Act::TestWait:
    case Act::TryWait: {
      const uint64_t of = detail.parity ? w.row<uint32_t>(inst.o[1])[lane] : w.row<uint64_t>(inst.o[1])[lane];
      const bool done = detail.parity ? (b->phase & 1) != (of & 1) : b->phase > of;
      if (!done) return;
      succeeded |= 1u << lane;
      join(w.seen, b->phase_clocks);
      return;
    }
    case Act::Init:
      break;
  }
}

void run_mbarrier(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MbarrierDetail&>(*inst.detail);
  const Addresses a = addresses(w, inst, inst.o[0], lanes);
  if (detail.has_count) w.require_defined(inst.o[1], lanes, inst, "an operand of an mbarrier");
  const bool waits = detail.act == Act::TestWait || detail.act == Act::TryWait;
  if (!waits) w.tick();  // what came before is released
  Mask succeeded = 0;
  each_lane(lanes, [&](int lane) {
    const Location at = locate(w, inst, lane, inst.space, a.at[lane], 8, 8, true);
    if (at.host != nullptr && at.space == Space::Shared) run_lane(w, inst, lane, at, succeeded);
  });
  if (detail.has_state) w.define(inst.o[2], lanes, kAllLanes, inst);
  if (!waits) {
    w.tick();
    return;
  }
  Mask& p = w.predicate(inst.o[2]);
  p = (p & ~lanes) | (succeeded & lanes);
  w.define(inst.o[2], lanes, kAllLanes, inst);
  if (succeeded == lanes) {
    w.polls = 0;
  } else {
    w.polls += kPollCost;
    w.give_up_turn = true;
    finish_one_bulk(*w.launch, *w.block->cluster);
  }
}

Act take_act(Decoder& d) {
  switch (d.take_one({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait"})) {
    case 0: return Act::Init;
    case 1: return Act::Inval;
    case 2: return d.take("expect_tx") ? Act::ArriveExpectTx : Act::Arrive;
    case 3: return Act::ArriveDrop;
    case 4: return Act::ExpectTx;
    case 5: return Act::CompleteTx;
    case 6: return Act::TestWait;
    default: return Act::TryWait;
  }
}

void decode_mbarrier(Decoder& d) {
  auto& detail = d.detail<MbarrierDetail>();
  detail.act = take_act(d);
  detail.parity = d.take("parity");
  d.ignore({"release", "acquire", "relaxed", "cta", "cluster"});
  static constexpr Space kSpaces[] = {Space::Shared, Space::Shared, Space::SharedCluster, Space::Generic};
  d.inst.space = kSpaces[d.take_one({"shared", "shared::cta", "shared::cluster"}, 3)];
  if (d.take_type() != Type::B64) d.refuse("needs .b64");
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_mbarrier;
  d.touches_shared(8);
  const bool waits = detail.act == Act::TestWait || detail.act == Act::TryWait;
  // Whether there is a result in front of the address.
  const size_t at = d.arg(0).kind == Arg::Kind::Address ? 0 : 1;
  if (at == 1 && d.arg(0).kind != Arg::Kind::Sink) {
    detail.has_state = !waits;
    d.inst.o[2] = d.dst(d.arg(0), waits ? Type::Pred : Type::B64);
  } else if (waits) {
    d.refuse("needs a predicate");
  }
  switch (detail.act) {
    case Act::Init:
    case Act::ExpectTx:
    case Act::CompleteTx:
    case Act::ArriveExpectTx:
      d.need_args(at + 2, at + 2);
      d.inst.o[1] = d.src(d.arg(at + 1), Type::U32);
      detail.has_count = true;
      break;
    case Act::Arrive:
    case Act::ArriveDrop:
      d.need_args(at + 1, at + 2);
      detail.has_count = d.args() == at + 2;
      if (detail.has_count) d.inst.o[1] = d.src(d.arg(at + 1), Type::U32);
      break;
    case Act::TestWait:
    case Act::TryWait:
      d.need_args(at + 2, at + 3);  // the last is for how long to wait
      d.inst.o[1] = d.src(d.arg(at + 1), detail.parity ? Type::U32 : Type::B64);
      if (d.args() == at + 3) d.src(d.arg(at + 2), Type::U32);
      break;
    default:
      d.need_args(at + 1, at + 1);
  }
  d.inst.o[0] = d.address(d.arg(at));
}

void decode_async_arrive(Decoder& d) {
  auto& detail = d.detail<MbarrierDetail>();
  detail.act = Act::AsyncArrive;
  detail.no_increment = d.take("noinc");
  d.take("shared");
  d.take("shared::cta");
  d.take_type();
  d.need_args(1, 1);
  d.inst.space = Space::Shared;
  d.inst.o[0] = d.address(d.arg(0));
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_mbarrier;
  d.touches_shared(8);
}

}  // namespace

MemoryBarrier* find_barrier(Warp& w, const Inst& inst, int lane, const Location& location) {
  const auto found = location.block->memory_barriers.find(location.offset);
  if (found == location.block->memory_barriers.end()) {
    w.report(Kind::Invalid, inst, 1u << lane, "no mbarrier was initialised at shared byte " + std::to_string(location.offset));
    return nullptr;
  }
  uint64_t opaque;
  read_memory(w, inst, lane, location, 8, &opaque, true);  // is its initialisation ordered before this?
  return &found->second;
}

void complete_bytes(Block& block, uint64_t barrier, uint64_t bytes) {
  const auto found = block.memory_barriers.find(barrier);
  if (found == block.memory_barriers.end()) return;
  MemoryBarrier& b = found->second;
  b.bytes -= static_cast<int64_t>(bytes);
  Clocks& clocks = b.clocks;
  clocks.back() = std::max(clocks.back(), block.cluster->agent_clock);
  maybe_complete(block, b);
}

const std::vector<Opcode> kMbarrierOpcodes = {{"mbarrier", decode_mbarrier},
                                              {"cp.async.mbarrier.arrive", decode_async_arrive}};

}  // namespace ptxemu
