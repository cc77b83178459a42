// Where the lanes of a warp part and meet: which split runs, which wait for one another, and who
// exits.
#include <algorithm>

#include "machine.h"

namespace ptxemu {
namespace {

constexpr uint32_t kPatience = 16;  // turns with several splits before one is chosen at random

}  // namespace

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
      if (others[i].frame == others[j].frame && others[i].pc == others[j].pc &&
          others[i].wait == Wait::None && others[j].wait == Wait::None) {
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

// Lanes that wait for each other: those at one place come together. Where no more can come, the
// program is wrong.
bool Warp::wake_waiting() {
  bool some_elsewhere = false;
  std::vector<Split> kept, groups;
  for (const Split& s : others) {
    if (s.wait != Wait::Lanes) {
      kept.push_back(s);
      some_elsewhere = true;
      continue;
    }
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const Split& g) {
      return g.frame == s.frame && g.pc == s.pc;
    });
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
           groups.size() > 1
               ? "lanes wait here while others of their warp wait at " +
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
  bulk_stores.erase(
      std::remove_if(bulk_stores.begin(), bulk_stores.end(),
                     [&](const BulkStore& store) { return (lanes >> store.lane & 1) != 0; }),
      bulk_stores.end());
  launch->polls_in_vain = 0;
  live &= ~lanes;
  active &= ~lanes;
  if (active == 0) pick();
  if (live == 0) complete_cluster_barrier(*block->cluster);
}

// The turn begins: lanes that have been apart for long may go on in another order.
void Warp::begin_turn() {
  give_up_turn = false;
  turns_apart_ = others.empty() ? 0 : turns_apart_ + 1;
  if (turns_apart_ > kPatience || active == 0) pick();
}

}  // namespace ptxemu
