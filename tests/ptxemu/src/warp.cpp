// The interpreter of one warp: fetch, guard, run; and where its lanes part and meet.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "machine.h"

namespace ptxemu {

void check_watched_registers(Warp& w, const Inst& inst);  // ops/wgmma.cpp

namespace {

constexpr uint32_t kPatience = 16;  // turns with several splits before one is chosen at random

uint64_t special_value(const Warp& w, SpecialKind kind, int lane) {
  using K = SpecialKind;
  const Block& b = *w.block;
  const LaunchConfig& c = w.launch->config;
  const uint64_t thread = uint64_t{w.index} * kLanes + static_cast<uint64_t>(lane);
  const Dim3 in_cluster{b.id.x % c.cluster.x, b.id.y % c.cluster.y, b.id.z % c.cluster.z};
  switch (kind) {
    case K::TidX: return thread % c.block.x;
    case K::TidY: return thread / c.block.x % c.block.y;
    case K::TidZ: return thread / c.block.x / c.block.y;
    case K::NtidX: return c.block.x;
    case K::NtidY: return c.block.y;
    case K::NtidZ: return c.block.z;
    case K::CtaidX: return b.id.x;
    case K::CtaidY: return b.id.y;
    case K::CtaidZ: return b.id.z;
    case K::NctaidX: return c.grid.x;
    case K::NctaidY: return c.grid.y;
    case K::NctaidZ: return c.grid.z;
    case K::LaneId: return static_cast<uint64_t>(lane);
    case K::WarpId: return w.index;
    case K::NwarpId: return b.warps.size();
    case K::SmId: return 0;
    case K::NsmId: return 1;
    case K::GridId: return 1;
    case K::LanemaskEq: return 1u << lane;
    case K::LanemaskLt: return (1u << lane) - 1;
    case K::LanemaskLe: return (2u << lane) - 1;
    case K::LanemaskGt: return ~((2u << lane) - 1);
    case K::LanemaskGe: return ~((1u << lane) - 1);
    case K::ClusterCtaRank: return b.rank;
    case K::ClusterNctaRank: return c.cluster.count();
    case K::ClusterCtaidX: return in_cluster.x;
    case K::ClusterCtaidY: return in_cluster.y;
    case K::ClusterCtaidZ: return in_cluster.z;
    case K::ClusterNctaidX: return c.cluster.x;
    case K::ClusterNctaidY: return c.cluster.y;
    case K::ClusterNctaidZ: return c.cluster.z;
    case K::ClusteridX: return b.id.x / c.cluster.x;
    case K::ClusteridY: return b.id.y / c.cluster.y;
    case K::ClusteridZ: return b.id.z / c.cluster.z;
    case K::NclusteridX: return c.grid.x / c.cluster.x;
    case K::NclusteridY: return c.grid.y / c.cluster.y;
    case K::NclusteridZ: return c.grid.z / c.cluster.z;
    case K::DynamicSmem: return c.dynamic_shared;
    case K::TotalSmem: return b.shared->size();
    case K::Zero: return 0;
  }
  throw std::logic_error("a special register without a value");
}

uint64_t lower_half(SpecialKind kind, int bytes, uint64_t value) {
  const bool is_mask = kind >= SpecialKind::LanemaskEq && kind <= SpecialKind::LanemaskGe;
  return bytes == 4 || is_mask ? value & 0xffffffffu : value;
}

}  // namespace

// ---- frames

Frame* Warp::enter(Frame* caller, const Inst* call_inst, const Function& function) {
  std::unique_ptr<Frame>& slot = caller ? caller->callees[call_inst] : base;
  if (!slot) slot = std::make_unique<Frame>();
  Frame& f = *slot;
  if (f.function == &function) return &f;
  f.function = &function;
  f.caller = caller;
  f.call = call_inst;
  const size_t bytes = function.register_bytes + function.constants.size();
  f.storage.reset(new uint8_t[bytes + 64]);
  f.registers = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(f.storage.get()) + 63) & ~uintptr_t{63});
  std::memset(f.registers, 0xff, function.register_bytes);
  if (!function.constants.empty())
    std::memcpy(f.registers + function.register_bytes, function.constants.data(), function.constants.size());
  f.defined.assign(function.rows, kAllLanes);
  std::fill_n(f.defined.begin(), function.register_rows, 0);
  f.low_defined.assign(function.rows, 0);
  f.high_defined.assign(function.rows, 0);
  f.origin.assign(function.rows, -1);
  f.local_base = caller ? caller->local_base + caller->function->local_bytes : 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (function.local_bytes) {
      local[lane].resize(f.local_base + function.local_bytes, 0xff);
      local_defined[lane].resize(f.local_base + function.local_bytes, 0);
    }
    if (!function.is_entry) {
      f.params[lane].assign(function.param_bytes, 0xff);
      f.params_defined[lane].assign(function.param_bytes, 0);
    } else if (function.param_bytes > launch->config.params.size()) {  // .param variables of the body, for calls
      f.params[lane].assign(function.param_bytes, 0xff);
      std::copy(launch->config.params.begin(), launch->config.params.end(), f.params[lane].begin());
      f.params_defined[lane].assign(function.param_bytes, 1);
    }
  }
  for (const SpecialRow& s : function.specials)
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t value = lower_half(s.kind, s.bytes, special_value(*this, s.kind, lane));
      std::memcpy(f.registers + s.place.at + lane * s.bytes, &value, static_cast<size_t>(s.bytes));
    }
  for (const Operand& o : function.local_addresses)
    for (int lane = 0; lane < kLanes; ++lane)
      reinterpret_cast<uint64_t*>(f.registers + o.at)[lane] += f.local_base;
  return &f;
}

void Warp::start(const Function& entry) {
  stats = launch->report.stats.data();
  live = exists;
  load_split({enter(nullptr, nullptr, entry), 0, exists, Wait::None, 0});
}

void Warp::load_split(const Split& s) {
  frame = s.frame;
  r = frame->registers;
  defined = frame->defined.data();
  code = frame->function->code.data();
  pc = s.pc;
  active = s.mask;
}

void Warp::store_split() {
  if (active) others.push_back({frame, pc, active, Wait::None, 0});
  active = 0;
}

// ---- choosing among splits

// Lanes of `a` should run before those of `b`, since b stands where a will come to as well.
bool Warp::goes_before(const Split& a, const Split& b) const {
  if (a.frame != b.frame) {
    for (const Frame* f = a.frame; f; f = f->caller)
      if (f->caller == b.frame) return true;  // inside a call that b has left or not begun
    return false;
  }
  const Function& f = *a.frame->function;
  const int block_a = f.code[a.pc].block, block_b = f.code[b.pc].block;
  if (block_a == block_b) return a.pc < b.pc;
  const BasicBlock &x = f.blocks[block_a], &y = f.blocks[block_b];
  return y.enter <= x.enter && x.leave <= y.leave;
}

Split* Warp::next_split() {
  std::vector<Split*> ready;
  for (Split& s : others)
    if (s.wait == Wait::None) ready.push_back(&s);
  if (ready.empty()) return nullptr;
  if (turns_apart_ > kPatience) return ready[launch->random() % ready.size()];
  Split* best = ready[0];
  for (Split* s : ready)
    if (goes_before(*s, *best)) best = s;
  return best;
}

void Warp::pick() {
  store_split();
  for (size_t i = 0; i < others.size(); ++i)  // those that stand at the same place are one
    for (size_t j = others.size(); j-- > i + 1;)
      if (others[i].frame == others[j].frame && others[i].pc == others[j].pc && others[i].wait == Wait::None &&
          others[j].wait == Wait::None) {
        others[i].mask |= others[j].mask;
        others.erase(others.begin() + static_cast<std::ptrdiff_t>(j));
      }
  Split* next = next_split();
  if (next == nullptr && wake_waiting()) next = next_split();
  if (next == nullptr) return;  // all wait at barriers, or nobody is left
  const Split chosen = *next;
  others.erase(others.begin() + (next - others.data()));
  load_split(chosen);
}

// Lanes that wait for each other: those at one place come together. Where no more can come, the program is wrong.
bool Warp::wake_waiting() {
  bool some_elsewhere = false;
  std::vector<Split> kept, groups;
  for (const Split& s : others) {
    if (s.wait != Wait::Lanes) {
      kept.push_back(s);
      some_elsewhere = true;
      continue;
    }
    const auto same = std::find_if(groups.begin(), groups.end(),
                                   [&](const Split& g) { return g.frame == s.frame && g.pc == s.pc; });
    if (same == groups.end()) {
      groups.push_back(s);
    } else {
      same->mask |= s.mask;
    }
  }
  if (groups.empty()) return false;
  bool woken = false;
  for (Split& g : groups) {
    const Split before{frame, pc, active, Wait::None, 0};
    load_split(g);
    Mask lanes = g.mask;
    const Inst& inst = code[pc];
    if (inst.guarded) lanes &= inst.guard_negated ? ~predicate(inst.guard) : predicate(inst.guard);
    if (missing_lanes(inst, lanes) == 0) g.wait = Wait::None, woken = true;
    if (before.frame) load_split(before);
  }
  if (!woken && !some_elsewhere) {
    load_split(groups[0]);
    report(Kind::DivergentBarrier, code[pc], active,
           groups.size() > 1 ? "lanes wait here while others of their warp wait at " +
                                   where(launch->module, groups[1].frame->function->code[groups[1].pc])
                             : "lanes wait here for lanes of their warp that do not come");
    active = 0;
    groups[0].wait = Wait::None;
    force_sync_ = woken = true;
  }
  others = std::move(kept);
  others.insert(others.end(), groups.begin(), groups.end());
  return woken;
}

void Warp::suspend(Wait why, uint32_t barrier) {
  others.push_back({frame, pc, active, why, barrier});
  active = 0;
  suspended_ = true;
  pick();
}

bool Warp::await_others() {
  if (force_sync_) {
    force_sync_ = false;
    return false;
  }
  const Split here{frame, pc, active, Wait::None, 0};
  for (const Split& s : others)
    if (!(s.frame == frame && s.pc == pc) && !goes_before(s, here)) return false;
  suspend(Wait::Lanes, 0);
  return true;
}

void Warp::wait_again(uint32_t barrier) { suspend(Wait::BarrierAgain, barrier); }

void Warp::release(uint32_t barrier) {
  for (Split& s : others)
    if ((s.wait == Wait::Barrier || s.wait == Wait::BarrierAgain) && s.barrier == barrier) {
      if (s.wait == Wait::Barrier) ++s.pc;
      s.wait = Wait::None;
    }
  if (active == 0) pick();
}

void Warp::exit_lanes(Mask lanes, const Inst& inst) {
  for (BulkStore& store : bulk_stores)
    if (lanes >> store.lane & 1) {
      report(Kind::AsyncUnwaited, inst, 1u << store.lane,
             "exits while a bulk copy from shared memory is under way, not waited for");
      store.finish();
    }
  bulk_stores.erase(std::remove_if(bulk_stores.begin(), bulk_stores.end(),
                                   [&](const BulkStore& store) { return (lanes >> store.lane & 1) != 0; }),
                    bulk_stores.end());
  launch->polls_in_vain = 0;
  live &= ~lanes;
  active &= ~lanes;
  if (active == 0) pick();
}

// ---- running

void Warp::run(uint64_t turns) {
  give_up_turn = false;
  turns_apart_ = others.empty() ? 0 : turns_apart_ + 1;
  if (turns_apart_ > kPatience || active == 0) pick();
  while (turns-- > 0 && active && !give_up_turn) {
    const Inst& inst = code[pc];
    Mask lanes = active;
    if (inst.guarded) {
      if (__builtin_expect((defined[inst.guard.row] & lanes) != lanes, 0))
        require_defined(inst.guard, lanes, inst, "a condition");
      const Mask p = predicate(inst.guard);
      lanes &= inst.guard_negated ? ~p : p;
    }
    ++launch->clock_counter;
    if (inst.flow == Flow::Plain) {
      if (lanes) {
        ++stats[inst.index].executed;
        if (__builtin_expect(inst.watched, 0)) check_watched_registers(*this, inst);
        inst.run(*this, inst, lanes);
      }
      ++pc;
    } else {
      control(inst, lanes);
    }
    if (__builtin_expect(!others.empty(), 0) && active && code[pc].block != inst.block) pick();
  }
}

Mask Warp::missing_lanes(const Inst& inst, Mask lanes) {
  Mask needed = live;
  if (inst.by_lane && lanes) needed = row<Mask>(inst.members)[__builtin_ctz(lanes)] & live;
  if (!lanes) needed = 0;
  return needed & ~lanes;
}

void Warp::control(const Inst& inst, Mask lanes) {
  if (lanes) ++stats[inst.index].executed;
  switch (inst.flow) {
    case Flow::Branch:
      return branch(inst, lanes);
    case Flow::BranchTable:
      return branch_table(inst, lanes);
    case Flow::Call:
      return call(inst, lanes);
    case Flow::Return:
      return leave(inst, lanes);
    case Flow::Exit:
      if (lanes != active) ++pc;
      if (lanes == 0) return;
      return exit_lanes(lanes, inst);
    case Flow::Sync: {
      const Mask missing = missing_lanes(inst, lanes);
      if (missing && !force_sync_) {
        if ((missing & active) == 0) {  // elsewhere: they may still come
          stats[inst.index].executed -= 1;
          return suspend(Wait::Lanes, 0);
        }
        report(Kind::DivergentBarrier, inst, missing & active,
               "lanes that the instruction waits for are switched off by its predicate");
      }
      force_sync_ = false;
      if (lanes) {
        if (inst.watched) check_watched_registers(*this, inst);
        inst.run(*this, inst, lanes);
      }
      ++pc;
      return;
    }
    case Flow::Blocking:
      suspended_ = false;
      if (lanes) inst.run(*this, inst, lanes);
      if (!suspended_) ++pc;
      return;
    case Flow::Plain:
      break;
  }
  throw std::logic_error("an instruction without a flow");
}

void Warp::branch(const Inst& inst, Mask taken) {
  if (taken == active) {
    pc = inst.target;
  } else if (taken == 0) {
    ++pc;
  } else {
    others.push_back({frame, inst.target, taken, Wait::None, 0});
    active &= ~taken;
    ++pc;
    pick();
  }
}

void Warp::branch_table(const Inst& inst, Mask lanes) {
  const uint32_t* index = row<uint32_t>(inst.o[0]);
  require_defined(inst.o[0], lanes, inst, "the index of a branch");
  std::map<int, Mask> targets;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    if (index[lane] >= inst.more.size()) {
      report(Kind::OutOfBounds, inst, 1u << lane, "branch " + std::to_string(index[lane]) + " of a table of " +
                                                      std::to_string(inst.more.size()));
      exit_lanes(1u << lane, inst);
      return;
    }
    targets[static_cast<int>(inst.more[index[lane]].at)] |= 1u << lane;
  }
  for (const auto& [target, mask] : targets) others.push_back({frame, target, mask, Wait::None, 0});
  active &= ~lanes;
  ++pc;
  pick();
}

// ---- calls

// ops/control.cpp
void pass_arguments(Warp& w, const Inst& inst, Frame& caller, Frame& callee, Mask lanes);
void pass_results(const Inst& call, Frame& caller, Frame& callee, Mask lanes);
const Function* callee_of(const Inst& inst);

void Warp::call(const Inst& inst, Mask lanes) {
  if (lanes == 0) {
    ++pc;
    return;
  }
  Frame* callee = enter(frame, &inst, *callee_of(inst));
  for (uint32_t i = 0; i < callee->function->register_rows; ++i) callee->defined[i] &= ~lanes;  // of a call before
  pass_arguments(*this, inst, *frame, *callee, lanes);
  others.push_back({callee, 0, lanes, Wait::None, 0});
  active &= ~lanes;
  ++pc;
  pick();
}

void Warp::leave(const Inst& inst, Mask lanes) {
  if (frame->caller == nullptr) {
    if (lanes != active) ++pc;
    if (lanes) exit_lanes(lanes, inst);
    return;
  }
  if (lanes) {
    Frame* caller = frame->caller;
    pass_results(*frame->call, *caller, *frame, lanes);
    const int back = static_cast<int>(frame->call - caller->function->code.data()) + 1;
    others.push_back({caller, back, lanes, Wait::None, 0});
  }
  active &= ~lanes;
  ++pc;
  pick();
}

// ---- what is undefined

void Warp::taint(Operand destination, Mask lanes, Mask known, const Inst& inst, const uint32_t* rows, size_t count) {
  int origin = inst.index;
  Mask low = inst.in_halves && count ? kAllLanes : 0, high = low;
  for (size_t i = 0; i < count; ++i) {
    low &= low_defined(rows[i]);
    high &= high_defined(rows[i]);
    if ((defined[rows[i]] & lanes) != lanes && frame->origin[rows[i]] >= 0) origin = frame->origin[rows[i]];
  }
  frame->origin[destination.row] = origin;
  defined[destination.row] = (defined[destination.row] & ~lanes) | (known & lanes);
  frame->low_defined[destination.row] = (frame->low_defined[destination.row] & ~lanes) | (low & lanes);
  frame->high_defined[destination.row] = (frame->high_defined[destination.row] & ~lanes) | (high & lanes);
}

void Warp::require_defined(Operand source, Mask lanes, const Inst& inst, const char* use) {
  const Mask undefined = lanes & ~defined[source.row];
  if (undefined == 0) return;
  const int origin = frame->origin[source.row];
  const Inst* from = nullptr;
  for (const Inst& other : frame->function->code)
    if (other.index == origin && &other != &inst) from = &other;
  const auto race = launch->racy_reads.find(origin);
  if (race != launch->racy_reads.end() && from) {
    report(Kind::Race, *from, undefined, race->second + "; the value is used as " + use + " at " + where(launch->module, inst));
  } else {
    std::string message = std::string("uses an undefined value as ") + use;
    if (from) message += "; it comes from " + where(launch->module, *from);
    if (origin < 0) message += "; the register was never written";
    report(Kind::Uninitialised, inst, undefined, message);
  }
  defined[source.row] |= lanes;  // once is enough
}

// ---- reports

void Warp::tick() {
  if (++seen[clock_index] >= kMaxClock) {
    // Time is used up: forget all of it. A race across this moment goes unseen.
    ++launch->era;
    for (auto& b : block->cluster->blocks) {
      b->shared->forget();
      for (auto& w : b->warps) std::fill(w->seen.begin(), w->seen.end(), 1);
    }
  }
}

void Warp::report(Kind kind, const Inst& inst, Mask lanes, const std::string& message) {
  char who[160];
  const int lane = lanes ? __builtin_ctz(lanes) : 0;
  const int count = __builtin_popcount(lanes);
  std::snprintf(who, sizeof who, "block (%u, %u, %u), warp %u, lane %d%s", block->id.x, block->id.y, block->id.z, index,
                lane, count > 1 ? (" and " + std::to_string(count - 1) + " more").c_str() : "");
  launch->report.add(kind, launch->module, inst, message + " [" + who + "]");
}

void Warp::report_hazard(const HazardInfo& h, const Inst& inst, int lane) {
  const bool is_async = h.hazard == Hazard::Pending || h.hazard == Hazard::Unfenced;
  if (launch->report.again(is_async ? Kind::AsyncUnwaited : Kind::Race, inst)) return;
  const uint32_t warps_a_block = static_cast<uint32_t>(block->warps.size());
  const uint32_t other = warp_of(h.other);
  const bool is_engine = other == block->cluster->blocks.size() * warps_a_block;
  std::string who = is_engine ? "the copy engine"
                    : other == clock_index
                        ? "lane " + std::to_string(lane_of(h.other)) + " of the same warp"
                        : "warp " + std::to_string(other % warps_a_block);
  std::string place;
  for (const auto& [name, f] : launch->module.functions)
    for (const Inst& i : f->code)
      if (h.other_instruction >= 0 && i.index == h.other_instruction) place = " at " + where(launch->module, i);
  const std::string at = "shared byte " + std::to_string(h.at);
  switch (h.hazard) {
    case Hazard::None:
      return;
    case Hazard::ReadAfterWrite:
      return report(Kind::Race, inst, 1u << lane,
                    "reads " + at + ", which " + who + " wrote" + place + " with no synchronisation between");
    case Hazard::WriteAfterWrite:
      return report(Kind::Race, inst, 1u << lane,
                    "writes " + at + ", which " + who + " wrote" + place + " with no synchronisation between");
    case Hazard::WriteAfterRead:
      return report(Kind::Race, inst, 1u << lane,
                    "writes " + at + ", which " + who + " reads or has read with no synchronisation between");
    case Hazard::Pending:
      return report(Kind::AsyncUnwaited, inst, 1u << lane,
                    "touches " + at + ", to which an asynchronous copy" + place + " is under way, not waited for");
    case Hazard::Unfenced:
      return report(Kind::AsyncUnwaited, inst, 1u << lane,
                    "reads " + at + " through the asynchronous proxy; " + who + " wrote it" + place +
                        " with no fence.proxy.async between");
  }
}

std::string Warp::position() const {
  std::string text;
  const auto add = [&](const Frame* f, int at, Mask mask) {
    const Inst& inst = f->function->code[at];
    text += (text.empty() ? "" : "; ") + std::to_string(__builtin_popcount(mask)) + " lanes at " +
            where(launch->module, inst);
  };
  if (active) add(frame, pc, active);
  for (const Split& s : others) add(s.frame, s.pc, s.mask);
  return "warp " + std::to_string(index) + ": " + (text.empty() ? "has exited" : text);
}

}  // namespace ptxemu
