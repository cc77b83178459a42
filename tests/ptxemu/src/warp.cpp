// The interpreter of one warp: fetch, guard, run, and what moves its lanes.
#include "machine.h"

namespace ptxemu {

void check_watched_registers(Warp& w, const Inst& inst);  // ops/wgmma.cpp

void Warp::run(uint64_t turns) {
  begin_turn();
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
      report(Kind::OutOfBounds, inst, 1u << lane,
             "branch " + std::to_string(index[lane]) + " of a table of " +
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
  for (uint32_t i = 0; i < callee->function->register_rows; ++i) {  // what a call before has left
    callee->defined[i] &= ~lanes;
    callee->low_defined[i] &= ~lanes;
    callee->high_defined[i] &= ~lanes;
  }
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

}  // namespace ptxemu
