// The machine while it runs: launch, cluster, block, warp, and the frames and splits of a warp.
//
// A warp executes one split at a time: lanes that stand at the same instruction of the same frame.
// A divergent branch makes two splits of one; splits that meet at the start of a basic block become
// one again. Of several the one runs whose block does not post-dominate another's, so that all
// lanes reach the point where their paths join before any goes on: the convergence that compilers
// assume, found from the control flow instead of from a stack.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "memory.h"
#include "program.h"
#include "report.h"
#include "shared.h"

namespace ptxemu {

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

struct Launch;
struct Block;
struct Cluster;

/// One activation of a function: registers and parameters of all lanes.
struct Frame {
  const Function* function = nullptr;
  Frame* caller = nullptr;
  const Inst* call = nullptr;
  uint8_t* registers = nullptr;
  std::vector<Mask> defined;
  std::vector<Mask> low_defined,
      high_defined;  // halves, looked at where a value is not defined as a whole
  std::vector<int>
      origin;  // by row: the instruction where an undefined value came in, -1: never written
  std::vector<uint8_t> params[kLanes];
  std::vector<uint8_t> params_defined[kLanes];
  uint64_t local_base = 0;
  std::map<const Inst*, std::unique_ptr<Frame>> callees;
  std::unique_ptr<uint8_t[]> storage;
};

enum class Wait : uint8_t { None, Lanes, Barrier, BarrierAgain };

struct Split {
  Frame* frame = nullptr;
  int pc = 0;
  Mask mask = 0;
  Wait wait = Wait::None;
  uint32_t barrier = 0;
};

/// A copy to shared memory that has been issued and not waited for.
struct AsyncCopy {
  uint64_t to = 0;
  const uint8_t* from = nullptr;
  uint32_t bytes = 0, zero_from = 0;  // the rest is zero
  int lane = 0;
  uint32_t group = 0;  // of its lane
  const Inst* inst = nullptr;
};

/// A copy from shared memory by the copy engine that has been issued and not waited for.
struct BulkStore {
  int lane = 0;
  uint32_t group = 0;
  std::function<void()> finish;
};

struct AsyncMatrix;  // an issued wgmma

struct Warp {
  Launch* launch = nullptr;
  Block* block = nullptr;
  uint32_t index = 0;        // in the block
  uint32_t clock_index = 0;  // in the cluster
  Mask exists = 0, live = 0;

  // The split that runs.
  Frame* frame = nullptr;
  uint8_t* r = nullptr;  // frame->registers
  Mask* defined = nullptr;
  const Inst* code = nullptr;
  int pc = 0;
  Mask active = 0;
  std::vector<Split> others;

  std::unique_ptr<Frame> base;
  std::vector<uint8_t> local[kLanes];
  std::vector<uint8_t> local_defined[kLanes];
  Clocks seen;
  Clocks seen_at_proxy_fence;
  uint32_t proxy_fence_clock = 0;
  AccessStats* stats = nullptr;  // of the launch, by instruction
  bool give_up_turn = false;
  std::vector<AsyncCopy> copies;      // under way, oldest first
  uint32_t copy_groups[kLanes] = {};  // committed by each lane so far
  std::vector<std::shared_ptr<AsyncMatrix>> open_matrices;
  std::vector<std::vector<std::shared_ptr<AsyncMatrix>>> matrix_groups;
  std::map<uint32_t, uint8_t> watched_rows;  // registers of wgmma: kInFlight, kUnfenced
  uint64_t cluster_phase = 0;  // of barrier.cluster at which it arrived, plus one; 0: it has waited
  Clocks fenced;               // what came before its last fence
  std::vector<BulkStore> bulk_stores;           // under way, oldest first
  uint32_t bulk_groups[kLanes] = {};            // committed by each lane so far
  std::map<const Inst*, uint64_t> last_strong;  // what strong accesses last saw, to notice spinning

  template <class T>
  T* row(Operand o) {
    return reinterpret_cast<T*>(r + o.at);
  }
  Mask& predicate(Operand o) { return *reinterpret_cast<Mask*>(r + o.at); }

  /// Marks lanes of a destination as defined where all sources are; notes where what is undefined
  /// came from.
  template <class... Sources>
  void flow(Operand destination, Mask lanes, const Inst& inst, Sources... sources) {
    const Mask all = (kAllLanes & ... & defined[sources.row]);
    if ((all & lanes) == lanes) {
      defined[destination.row] |= lanes;
    } else {
      const uint32_t rows[] = {sources.row..., 0};
      taint(destination, lanes, all, inst, rows, sizeof...(sources));
    }
  }
  /// The same for a destination whose defined lanes the caller knows.
  void define(Operand destination, Mask lanes, Mask known, const Inst& inst) {
    if ((known & lanes) == lanes) {
      defined[destination.row] |= lanes;
    } else {
      taint(destination, lanes, known, inst, nullptr, 0);
    }
  }
  void taint(Operand destination, Mask lanes, Mask known, const Inst& inst, const uint32_t* rows,
             size_t count);
  /// Reports lanes that use an undefined value where it matters: as an address, a condition, a
  /// result. Lanes whose lower or upper half is defined.
  Mask low_defined(uint32_t row) const { return defined[row] | frame->low_defined[row]; }
  Mask high_defined(uint32_t row) const { return defined[row] | frame->high_defined[row]; }
  /// Says of lanes that are not defined as a whole which of their halves are.
  void define_halves(Operand destination, Mask lanes, Mask low, Mask high) {
    frame->low_defined[destination.row] |= lanes & low;
    frame->high_defined[destination.row] |= lanes & high;
  }
  void require_defined(Operand source, Mask lanes, const Inst& inst, const char* use);

  uint32_t clock() const { return seen[clock_index]; }
  void tick();
  Access access(const Inst& inst, int lane, bool atomic = false) const {
    return {seen.data(), stamp(clock(), clock_index, static_cast<uint32_t>(lane)), inst.index,
            atomic};
  }
  bool done() const { return live == 0; }
  bool runnable() const { return live != 0 && active != 0; }

  void start(const Function& entry);
  void run(uint64_t turns);
  void report(Kind kind, const Inst& inst, Mask lanes, const std::string& message);
  void report_hazard(const HazardInfo& hazard, const Inst& inst, int lane);
  void exit_lanes(Mask lanes, const Inst& inst);
  void suspend(Wait why, uint32_t barrier);  // the current split, at its pc
  /// Suspends the current split if the warp's other lanes are still to come here for certain; then
  /// it runs again.
  bool await_others();
  void wait_again(uint32_t barrier);  // the same, but the instruction is run again when released
  void release(uint32_t barrier);     // splits that wait there go on
  std::string position() const;       // where its lanes stand, for reports

 private:
  Frame* enter(Frame* caller, const Inst* call, const Function& function);
  void load_split(const Split& split);
  void store_split();
  void pick();
  void begin_turn();
  bool wake_waiting();
  void branch(const Inst& inst, Mask taken);
  void branch_table(const Inst& inst, Mask active_lanes);
  void call(const Inst& inst, Mask lanes);
  void leave(const Inst& inst, Mask lanes);
  Mask missing_lanes(const Inst& inst, Mask lanes);
  void control(const Inst& inst, Mask lanes);
  bool goes_before(const Split& a, const Split& b) const;
  Split* next_split();

  bool suspended_ = false, force_sync_ = false;
  uint32_t turns_apart_ = 0;
};

/// Lanes that wait at a barrier.
struct BarrierWait {
  Warp* warp;
  const Inst* inst;
  Frame* frame;
  Mask lanes;
};

struct Barrier {
  uint32_t arrived = 0, expected = 0;
  std::map<Warp*, Mask> lanes;  // that have arrived in this phase
  Clocks clocks;
  std::vector<BarrierWait> waiting;
  uint32_t reduce_and = 1, reduce_or = 0, reduce_count = 0;  // bar.red
};

struct MemoryBarrier {  // mbarrier
  uint32_t expected = 0, arrivals = 0;
  int64_t bytes = 0;
  uint64_t phase = 0;
  Clocks clocks, phase_clocks;  // of the phase that fills; of the last that completed
};

struct Block {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  uint32_t rank = 0;  // in the cluster
  Dim3 id;
  std::unique_ptr<SharedMemory> shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<uint32_t, Barrier> barriers;
  std::map<uint64_t, MemoryBarrier> memory_barriers;  // by shared address
  bool fences = false;  // it has executed a fence: its relaxed atomics may release what came before
};

struct PendingBulk {
  std::function<void()> complete;
  const Inst* inst;
};

struct Cluster {
  uint32_t number = 0;  // in the launch, from 1 on
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<PendingBulk> bulk;
  Barrier barrier;  // barrier.cluster
  uint64_t barrier_phase = 0;
  Clocks barrier_clocks;     // of the phase that completed last
  uint32_t agent_clock = 1;  // of the copy engine, the last entry of every Clocks
  bool done() const;
};

struct LaunchConfig {
  Dim3 grid, block, cluster;
  uint64_t dynamic_shared = 0, seed = 0;
  uint64_t max_instructions = 0;
  std::vector<uint8_t> params;
};

struct Launch {
  Launch(Module& m, Memory& mem, const LaunchConfig& c)
      : module(m), memory(mem), config(c), random(c.seed) {}
  Module& module;
  Memory& memory;
  LaunchConfig config;
  Report report;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Cluster>> resident;
  bool trapped = false;
  uint64_t clock_counter = 0;  // %clock: executed warp instructions
  std::unordered_map<uint64_t, std::shared_ptr<const Elsewhere>>
      strong_locations;  // by global address: who released there
  std::unordered_map<int, std::string>
      racy_reads;              // by index of a load whose value is undefined because of a race
  uint32_t era = 1;            // changes when clocks start again
  uint64_t polls_in_vain = 0;  // of all warps, since something last changed

  void run(const Function& entry);

 private:
  std::unique_ptr<Cluster> make_cluster(const Function& entry, uint64_t index);
  bool run_turn(Cluster& cluster);
  bool all_poll_in_vain(uint64_t times_a_warp) const;
  void report_deadlock(const char* why);
};

/// Ends the phase of barrier.cluster if every warp that has not exited has arrived.
void complete_cluster_barrier(Cluster& cluster);

/// Lets the copy engine finish one of the copies that are under way, chosen at random; false if
/// there is none.
bool finish_one_bulk(Launch& launch, Cluster& cluster);

Report run(Module& module, Memory& memory, const std::string& entry, const LaunchConfig& config);

}  // namespace ptxemu
