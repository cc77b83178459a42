// mbarrier: barriers in shared memory that count arrivals and bytes (PTX ISA, "mbarrier").
//
// A phase ends when every expected arrival and every announced byte has come. Arrivals bring the
// clocks of their warps; who sees a phase ended is ordered after all of them.
#include <algorithm>

#include "async.h"
#include "pick.h"

namespace ptxemu {
namespace {

constexpr uint64_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes

enum class Act : uint8_t {
  Init,
  Inval,
  Arrive,
  ArriveDrop,
  ExpectTx,
  CompleteTx,
  TestWait,
  TryWait,
  AsyncArrive
};

struct MbarrierDetail : Detail {
  Act act = Act::Init;
  bool parity = false, no_increment = false, has_state = false, has_count = false;
  bool expects = false;  // an arrival that announces bytes
};

bool is_wait(Act act) { return act == Act::TestWait || act == Act::TryWait; }

void maybe_complete(Block& block, MemoryBarrier& b) {
  if (b.arrivals != 0 || b.bytes != 0) return;
  ++b.phase;
  b.arrivals = b.expected;
  b.phase_clocks = b.clocks;
  block.launch->polls_in_vain = 0;
}

void arrive(Warp& w, const Inst& inst, int lane, Block& block, MemoryBarrier& b, uint64_t count,
            const Clocks& released) {
  if (count < 1 || count > b.arrivals) {
    w.report(Kind::Invalid, inst, 1u << lane,
             std::to_string(count) + " arrivals at an mbarrier that expects " +
                 std::to_string(b.arrivals) + " more in this phase");
    count = std::min<uint64_t>(count, b.arrivals);
  }
  b.arrivals -= static_cast<uint32_t>(count);
  join(b.clocks, released);
  maybe_complete(block, b);
}

void expect(Warp& w, const Inst& inst, int lane, MemoryBarrier& b, int64_t bytes) {
  b.bytes += bytes;
  if (std::abs(b.bytes) > static_cast<int64_t>(kMaxCount))
    w.report(
        Kind::Invalid, inst, 1u << lane,
        "an mbarrier that waits for " + std::to_string(b.bytes) + " bytes, can count 2^20 - 1");
}

// The arrival of a thread's copies so far, which comes when they are done: as late as somebody
// waits for it, unless the thread itself waits for them before. Without .noinc the phase expects
// one arrival more, so that nothing changes but the order.
void arrive_with_copies(Warp& w, const Inst& inst, int lane, Block& block, uint64_t barrier,
                        MemoryBarrier& b) {
  if (!static_cast<const MbarrierDetail&>(*inst.detail).no_increment) ++b.arrivals;
  std::vector<AsyncCopy> mine;
  for (const AsyncCopy& copy : w.copies)
    if (copy.lane == lane) mine.push_back(copy);
  if (mine.empty()) return arrive(w, inst, lane, block, b, 1, w.seen);
  const Clocks released = w.seen;
  block.cluster->bulk.push_back(
      {[&w, &inst, lane, &block, barrier, mine, released] {
         const auto is_due = [&](const AsyncCopy& copy) {
           return std::any_of(mine.begin(), mine.end(), [&](const AsyncCopy& m) {
             return m.lane == copy.lane && m.group == copy.group && m.to == copy.to &&
                    m.inst == copy.inst;
           });
         };
         for (const AsyncCopy& copy : w.copies)
           if (is_due(copy)) finish_copy(w, copy, released[w.clock_index] - 1);
         w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), is_due), w.copies.end());
         const auto found = block.memory_barriers.find(barrier);
         if (found != block.memory_barriers.end())
           arrive(w, inst, lane, block, found->second, 1, released);
       },
       &inst});
}

void init(Warp& w, const Inst& inst, int lane, const Location& at, uint64_t count) {
  if (count < 1 || count > kMaxCount)
    w.report(Kind::Invalid, inst, 1u << lane,
             "an mbarrier for " + std::to_string(count) + " arrivals");
  if (at.block->memory_barriers.count(at.offset))
    w.report(Kind::Invalid, inst, 1u << lane,
             "initialises an mbarrier that is already there; mbarrier.inval ends it");
  const uint64_t opaque = 0x6d62000000000000u | count;
  write_memory(w, inst, lane, at, 8, &opaque, true);
  MemoryBarrier b;
  b.expected = b.arrivals = static_cast<uint32_t>(count);
  b.clocks.assign(w.seen.size(), 0);
  b.phase_clocks = b.clocks;
  at.block->memory_barriers[at.offset] = b;
}

// Whether the phase is over that a state (given by an arrival in it) or a parity names: the current
// one or the last.
bool is_over(Warp& w, const Inst& inst, int lane, const MemoryBarrier& b) {
  if (static_cast<const MbarrierDetail&>(*inst.detail).parity) {
    const uint32_t parity = w.row<uint32_t>(inst.o[1])[lane];
    if (parity > 1)
      w.report(Kind::Invalid, inst, 1u << lane, "a parity of " + std::to_string(parity));
    return (b.phase & 1) != (parity & 1);
  }
  const uint64_t phase = w.row<uint64_t>(inst.o[1])[lane];
  if (phase > b.phase || phase + 1 < b.phase)
    w.report(Kind::Invalid, inst, 1u << lane,
             "the state is of neither the current nor the last phase of this mbarrier");
  return b.phase > phase;
}

// o[0] address, o[1] count, bytes, state or parity, o[2] result (state or predicate)
void run_lane(Warp& w, const Inst& inst, int lane, const Location& at, Mask& succeeded) {
  const auto& detail = static_cast<const MbarrierDetail&>(*inst.detail);
  if (detail.act == Act::Init) return init(w, inst, lane, at, w.row<uint32_t>(inst.o[1])[lane]);
  MemoryBarrier* b = find_barrier(w, inst, lane, at);
  if (b == nullptr) return;
  if (detail.has_state) w.row<uint64_t>(inst.o[2])[lane] = b->phase;
  const uint64_t operand = detail.has_count ? w.row<uint32_t>(inst.o[1])[lane] : 1,
                 count = detail.expects ? 1 : operand;
  switch (detail.act) {
    case Act::Inval:
      at.block->memory_barriers.erase(at.offset);
      return;
    case Act::Arrive:
    case Act::ArriveDrop:
      if (detail.expects) expect(w, inst, lane, *b, static_cast<int64_t>(operand));
      if (detail.act == Act::ArriveDrop)
        b->expected -= static_cast<uint32_t>(std::min<uint64_t>(count, b->expected));
      return arrive(w, inst, lane, *at.block, *b, count, w.seen);
    case Act::AsyncArrive:
      return arrive_with_copies(w, inst, lane, *at.block, at.offset, *b);
    case Act::ExpectTx:
      return expect(w, inst, lane, *b, static_cast<int64_t>(operand));
    case Act::CompleteTx:
      expect(w, inst, lane, *b, -static_cast<int64_t>(operand));
      return maybe_complete(*at.block, *b);
    case Act::TestWait:
    case Act::TryWait:
      if (!is_over(w, inst, lane, *b)) return;
      succeeded |= 1u << lane;
      return join(w.seen, b->phase_clocks);
    case Act::Init:
      break;
  }
}

void run_mbarrier(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MbarrierDetail&>(*inst.detail);
  const Addresses a = addresses(w, inst, inst.o[0], lanes);
  const bool waits = is_wait(detail.act);
  if (detail.has_count || waits)
    w.require_defined(inst.o[1], lanes, inst, "an operand of an mbarrier");
  if (!waits) w.tick();  // what came before is released
  Mask succeeded = 0;
  each_lane(lanes, [&](int lane) {
    const Location at = locate(w, inst, lane, inst.space, a.at[lane], 8, 8, true);
    if (at.host == nullptr) return;
    const bool may_be_elsewhere = !waits && detail.act != Act::Init && detail.act != Act::Inval &&
                                  detail.act != Act::AsyncArrive;
    if (at.space != Space::Shared ||
        (at.block != w.block && (!may_be_elsewhere || detail.has_state)))
      return w.report(Kind::Invalid, inst, 1u << lane,
                      "the mbarrier is not in the block's own shared memory");
    if (has_exited(*at.block))
      return w.report(Kind::Invalid, inst, 1u << lane, "the mbarrier's block has exited");
    run_lane(w, inst, lane, at, succeeded);
  });
  if (detail.has_state) w.define(inst.o[2], lanes, kAllLanes, inst);
  if (!waits) {
    w.tick();
    return;
  }
  Mask& p = w.predicate(inst.o[2]);
  p = (p & ~lanes) | (succeeded & lanes);
  w.define(inst.o[2], lanes, kAllLanes, inst);
  if (succeeded != lanes) {
    ++w.launch->polls_in_vain;
    w.give_up_turn = true;
    finish_one_bulk(*w.launch, *w.block->cluster);
  }
}

Act take_act(Decoder& d) {
  static constexpr Act kActs[] = {Act::Init,     Act::Inval,      Act::Arrive,   Act::ArriveDrop,
                                  Act::ExpectTx, Act::CompleteTx, Act::TestWait, Act::TryWait};
  // .expect_tx is also a modifier of the arrivals.
  return kActs[d.take_one({"init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx",
                           "test_wait", "try_wait"})];
}

// Init, waits and what gives a state work on the block's own barriers only.
void take_space(Decoder& d, const MbarrierDetail& detail) {
  static constexpr Space kSpaces[] = {Space::Shared, Space::Shared, Space::SharedCluster,
                                      Space::Generic};
  d.inst.space = kSpaces[d.take_one({"shared", "shared::cta", "shared::cluster"}, 3)];
  const bool own = is_wait(detail.act) || detail.act == Act::Init || detail.act == Act::Inval ||
                   detail.has_state;
  if (own && d.inst.space == Space::SharedCluster)
    d.refuse("works on the block's own mbarriers only");
}

// Operand 1, behind the address.
void decode_operand(Decoder& d, MbarrierDetail& detail, size_t at) {
  const bool waits = is_wait(detail.act);
  const bool is_arrival = detail.act == Act::Arrive || detail.act == Act::ArriveDrop;
  const size_t least = detail.act == Act::Inval || (is_arrival && !detail.expects) ? 1 : 2;
  const size_t most = detail.act == Act::TryWait ? 3
                      : detail.act == Act::Inval ? 1
                                                 : 2;  // the third: for how long
  d.need_args(at + least, at + most);
  if (d.args() == at + 3) d.src(d.arg(at + 2), Type::U32);
  if (d.args() == at + 1) return;
  d.inst.o[1] = d.src(d.arg(at + 1), waits && !detail.parity ? Type::B64 : Type::U32);
  detail.has_count = !waits;
}

void decode_mbarrier(Decoder& d) {
  auto& detail = d.detail<MbarrierDetail>();
  detail.act = take_act(d);
  const bool is_arrival = detail.act == Act::Arrive || detail.act == Act::ArriveDrop,
             waits = is_wait(detail.act);
  detail.expects = is_arrival && d.take("expect_tx");
  detail.parity = waits && d.take("parity");
  d.ignore({"release", "acquire", "relaxed", "cta", "cluster"});
  // Whether there is a result in front of the address.
  const size_t at = d.arg(0).kind == Arg::Kind::Address ? 0 : 1;
  if ((at == 1) != (is_arrival || waits)) d.refuse(at ? "has no result" : "needs a result");
  if (at == 1 && d.arg(0).kind != Arg::Kind::Sink) {
    detail.has_state = is_arrival;
    d.inst.o[2] = d.dst(d.arg(0), waits ? Type::Pred : Type::B64);
  } else if (waits) {
    d.refuse("needs a predicate");
  }
  take_space(d, detail);
  if (d.take_type() != Type::B64) d.refuse("needs .b64");
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_mbarrier;
  d.touches_shared(8);
  decode_operand(d, detail, at);
  d.inst.o[0] = d.address(d.arg(at));
}

void decode_async_arrive(Decoder& d) {
  auto& detail = d.detail<MbarrierDetail>();
  detail.act = Act::AsyncArrive;
  detail.no_increment = d.take("noinc");
  d.inst.space = d.take_one({"shared", "shared::cta"}, 2) == 2 ? Space::Generic : Space::Shared;
  if (d.take_type() != Type::B64) d.refuse("needs .b64");
  d.need_args(1, 1);
  d.inst.o[0] = d.address(d.arg(0));
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_mbarrier;
  d.touches_shared(8);
}

}  // namespace

MemoryBarrier* find_barrier(Warp& w, const Inst& inst, int lane, const Location& location) {
  const auto found = location.block->memory_barriers.find(location.offset);
  if (found == location.block->memory_barriers.end()) {
    w.report(Kind::Invalid, inst, 1u << lane,
             "no mbarrier was initialised at shared byte " + std::to_string(location.offset));
    return nullptr;
  }
  uint64_t opaque;
  read_memory(w, inst, lane, location, 8, &opaque,
              true);  // is its initialisation ordered before this?
  return &found->second;
}

void complete_bytes(Block& block, const Inst& inst, uint64_t barrier, uint64_t bytes) {
  const auto found = block.memory_barriers.find(barrier);
  if (found == block.memory_barriers.end())
    return block.launch->report.add(Kind::Invalid, block.launch->module, inst,
                                    "its mbarrier has been invalidated when the copy ends");
  MemoryBarrier& b = found->second;
  b.bytes -= static_cast<int64_t>(bytes);
  Clocks& clocks = b.clocks;
  clocks.back() = std::max(clocks.back(), block.cluster->agent_clock);
  maybe_complete(block, b);
}

const std::vector<Opcode> kMbarrierOpcodes = {{"mbarrier", decode_mbarrier},
                                              {"cp.async.mbarrier.arrive", decode_async_arrive}};

}  // namespace ptxemu
