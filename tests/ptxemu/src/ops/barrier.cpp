// Barriers of a block and of a cluster, and fences (PTX ISA, "Parallel Synchronization and
// Communication Instructions").
#include <algorithm>

#include "pick.h"

namespace ptxemu {
namespace {

enum class Action : uint8_t { Sync, Arrive, RedPopc, RedAnd, RedOr };

struct BarrierDetail : Detail {
  Action action = Action::Sync;
  bool aligned = true, has_count = false, negated = false;
};

constexpr uint32_t kClusterBarrier = 1000;  // beside the 16 of a block

// Gives the waiting lanes the result of a reduction.
void set_result(const BarrierWait& wait, const Barrier& b, Action action) {
  const Operand o = wait.inst->o[2];
  uint8_t* row = wait.frame->registers + o.at;
  if (action == Action::RedPopc) {
    auto* d = reinterpret_cast<uint32_t*>(row);
    each_lane(wait.lanes, [&](int lane) { d[lane] = b.reduce_count; });
  } else {
    const bool value = action == Action::RedAnd ? b.reduce_and : b.reduce_or;
    Mask& d = *reinterpret_cast<Mask*>(row);
    d = (d & ~wait.lanes) | (value ? wait.lanes : 0);
  }
  wait.frame->defined[o.row] |= wait.lanes;
}

void complete(Barrier& b, uint32_t id) {
  const Barrier done = b;
  b = Barrier();
  for (const BarrierWait& wait : done.waiting) {
    const auto action = static_cast<const BarrierDetail&>(*wait.inst->detail).action;
    join(wait.warp->seen, done.clocks);
    if (action >= Action::RedPopc) set_result(wait, done, action);
    wait.warp->release(id);
  }
}

// Lanes arrive: a whole warp if the instruction is aligned.
void arrive(Warp& w, Barrier& b, uint32_t expected, uint32_t threads) {
  if (b.clocks.empty()) b.clocks.assign(w.seen.size(), 0);
  b.expected = expected;
  b.arrived += threads;
  w.tick();
  join(b.clocks, w.seen);
}

// A warp counts whole when all lanes that it still has are there, before that lane by lane.
uint32_t threads_of(Warp& w, Barrier& b, Mask lanes) {
  Mask& there = b.lanes[&w];
  const Mask before = there;
  there |= lanes;
  if ((there & w.live) != w.live) return static_cast<uint32_t>(__builtin_popcount(lanes));
  return kLanes - static_cast<uint32_t>(__builtin_popcount(before));
}

// o: barrier, count, result, predicate
void run_barrier(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const BarrierDetail&>(*inst.detail);
  const int first = __builtin_ctz(lanes);
  w.require_defined(inst.o[0], lanes, inst, "the number of a barrier");
  const uint32_t id = w.row<uint32_t>(inst.o[0])[first];
  const auto all = static_cast<uint32_t>(w.block->warps.size()) * kLanes;
  const uint32_t expected = detail.has_count ? w.row<uint32_t>(inst.o[1])[first] : all;
  const bool waits = detail.action != Action::Arrive;
  if (id > 15) {
    w.report(Kind::Invalid, inst, lanes, "barrier " + std::to_string(id) + " of 16");
    return;
  }
  if (expected == 0 || expected % kLanes != 0 || expected > all) {
    w.report(Kind::Invalid, inst, lanes,
             "a barrier of " + std::to_string(expected) + " threads, the block has " +
                 std::to_string(all));
    return;
  }
  if (detail.aligned && lanes != w.live) {
    if (lanes == w.active && w.await_others()) return;
    w.report(Kind::DivergentBarrier, inst, w.live & ~lanes,
             "only " + std::to_string(__builtin_popcount(lanes)) + " of the warp's " +
                 std::to_string(__builtin_popcount(w.live)) + " lanes come to the barrier");
  }
  Barrier& b = w.block->barriers[id];
  if (b.arrived && b.expected != expected)
    w.report(Kind::Invalid, inst, lanes,
             "barrier " + std::to_string(id) + " for " + std::to_string(expected) +
                 " threads, others expect " + std::to_string(b.expected));
  if (detail.action >= Action::RedPopc) {
    w.require_defined(inst.o[3], lanes, inst, "what a barrier reduces");
    const Mask p = w.predicate(inst.o[3]);
    const Mask yes = (detail.negated ? ~p : p) & lanes;
    b.reduce_and &= yes == lanes;
    b.reduce_or |= yes != 0;
    b.reduce_count += static_cast<uint32_t>(__builtin_popcount(yes));
  }
  arrive(w, b, expected, detail.aligned ? uint32_t{kLanes} : threads_of(w, b, lanes));
  if (waits) {
    b.waiting.push_back({&w, &inst, w.frame, lanes});
    w.suspend(Wait::Barrier, id);
  } else {
    w.tick();
  }
  if (b.arrived >= b.expected) complete(b, id);
}

void decode_block_barrier(Decoder& d, bool aligned) {
  auto& detail = d.detail<BarrierDetail>();
  d.take("cta");
  detail.aligned = d.take("aligned") || aligned;
  const int action = d.take_one({"sync", "arrive", "red"});
  d.inst.counted = Class::Barrier;
  d.inst.flow = Flow::Blocking;
  d.inst.run = &run_barrier;
  size_t at = 0;
  if (action == 2) {
    static constexpr Action kReductions[] = {Action::RedPopc, Action::RedAnd, Action::RedOr};
    detail.action = kReductions[d.take_one({"popc", "and", "or"})];
    const Type type = d.take_type();
    if (type != (detail.action == Action::RedPopc ? Type::U32 : Type::Pred))
      d.refuse("gives a count of .u32 or a predicate");
    d.need_args(3, 4);
    d.inst.o[2] = d.dst(d.arg(at++), type);
    d.inst.o[0] = d.src(d.arg(at++), Type::U32);
    detail.has_count = d.args() == 4;
    if (detail.has_count) d.inst.o[1] = d.src(d.arg(at++), Type::U32);
    d.inst.o[3] = d.predicate(d.arg(at), detail.negated);
    return;
  }
  detail.action = action == 0 ? Action::Sync : Action::Arrive;
  d.need_args(action == 0 ? 1 : 2, 2);
  d.inst.o[0] = d.src(d.arg(0), Type::U32);
  detail.has_count = d.args() == 2;
  if (detail.has_count) d.inst.o[1] = d.src(d.arg(1), Type::U32);
}

// ---- clusters: every thread that has not exited arrives, then waits

struct ClusterDetail : Detail {
  bool relaxed = false;
};

void run_cluster_arrive(Warp& w, const Inst& inst, Mask lanes) {
  if (lanes != w.live)
    w.report(Kind::DivergentBarrier, inst, w.live & ~lanes,
             "lanes do not come to the barrier of the cluster");
  if (w.cluster_phase != 0)
    return w.report(Kind::Invalid, inst, lanes,
                    "arrives at the barrier of the cluster again, with no wait between");
  Cluster& c = *w.block->cluster;
  w.cluster_phase = c.barrier_phase + 1;
  Barrier& b = c.barrier;
  if (b.clocks.empty()) b.clocks.assign(w.seen.size(), 0);
  b.arrived += kLanes;
  w.tick();
  if (!static_cast<const ClusterDetail&>(*inst.detail).relaxed) {
    join(b.clocks, w.seen);
  } else if (!w.fenced.empty()) {
    join(b.clocks, w.fenced);
  }
  w.tick();
  complete_cluster_barrier(c);
}

void run_cluster_wait(Warp& w, const Inst& inst, Mask lanes) {
  Cluster& c = *w.block->cluster;
  if (w.cluster_phase == 0)
    return w.report(Kind::Invalid, inst, lanes,
                    "waits for a barrier of the cluster at which it has not arrived");
  if (w.cluster_phase > c.barrier_phase) return w.wait_again(kClusterBarrier);
  w.cluster_phase = 0;
  join(w.seen, c.barrier_clocks);
}

void decode_cluster_barrier(Decoder& d) {
  auto& detail = d.detail<ClusterDetail>();
  const bool waits = d.take_one({"arrive", "wait"}) == 1;
  if (waits) {
    d.take("acquire");
  } else {
    detail.relaxed = d.take_one({"release", "relaxed"}, 0) == 1;
  }
  d.take("aligned");
  d.need_args(0, 0);
  d.inst.counted = Class::Barrier;
  d.inst.flow = Flow::Blocking;
  d.inst.run = waits ? &run_cluster_wait : &run_cluster_arrive;
}

// ---- fences. Executed in order as here, memory needs none; but what they hand over is kept
// account of.

void run_fence(Warp& w, const Inst&, Mask) {
  w.block->fences = true;
  w.fenced = w.seen;
  ++w.fenced[w.clock_index];  // lanes of the warp are not ordered by it, so its clock goes on
}

void run_proxy_fence(Warp& w, const Inst&, Mask) {
  w.tick();
  w.proxy_fence_clock = w.clock();
  w.seen_at_proxy_fence = w.seen;
}

void decode_fence(Decoder& d) {
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_fence;
  if (d.take("proxy")) {
    const int kind =
        d.take_one({"async", "async.global", "tensormap::generic", "alias", "async::generic"});
    d.ignore({"global", "shared::cta", "shared::cluster", "acquire", "release", "cta", "cluster",
              "gpu", "sys", "sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
    if (kind == 0 || kind == 4) d.inst.run = &run_proxy_fence;
    d.need_args(0, 2);  // of an address and a size, for tensormap::generic
    return;
  }
  d.need_args(0, 0);
  if (d.name() == "membar") {
    d.take_one({"cta", "gl", "sys"});
    return;
  }
  const bool of_barriers = d.take("mbarrier_init");
  d.ignore({"sc", "acq_rel", "acquire", "release", "sync_restrict::shared::cta",
            "sync_restrict::shared::cluster"});
  d.take_one({"cta", "cluster", "gpu", "sys"});
  if (of_barriers) d.inst.run = &run_fence;
}

}  // namespace

void complete_cluster_barrier(Cluster& c) {
  if (c.barrier.arrived == 0) return;
  for (const auto& block : c.blocks)
    for (const auto& warp : block->warps)
      if (!warp->done() && warp->cluster_phase != c.barrier_phase + 1) return;
  c.barrier_clocks = c.barrier.clocks;
  ++c.barrier_phase;
  c.barrier = Barrier();
  for (const auto& block : c.blocks)
    for (const auto& warp : block->warps) warp->release(kClusterBarrier);
}

const std::vector<Opcode> kBarrierOpcodes = {
    {"bar", [](Decoder& d) { decode_block_barrier(d, true); }},
    {"barrier", [](Decoder& d) { decode_block_barrier(d, false); }},
    {"barrier.cluster", decode_cluster_barrier},
    {"membar", decode_fence},
    {"fence", decode_fence},
};

}  // namespace ptxemu
