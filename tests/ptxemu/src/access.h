// Memory as the instructions see it: bounds, alignment, definedness, and how well a warp's accesses
// fit the hardware.
#pragma once

#include "machine.h"

namespace ptxemu {

/// The addresses that a warp uses, one a lane.
struct Addresses {
  uint64_t at[kLanes];
};
Addresses addresses(Warp& w, const Inst& inst, Operand base, Mask lanes);

/// A checked place in memory. host is null where the access is not allowed, which has been
/// reported.
struct Location {
  uint8_t* host = nullptr;
  Space space = Space::Global;
  Allocation* allocation = nullptr;  // Global
  Block* block = nullptr;            // Shared
  uint64_t offset =
      0;  // in the allocation, the shared memory, the lane's local memory, the parameters
};
/// Checks one lane's access of `bytes` at `address` in `space` (Generic: by its window).
Location locate(Warp& w, const Inst& inst, int lane, Space space, uint64_t address, uint64_t bytes,
                uint64_t align, bool is_write);

/// Copies from a location; false if some of it is undefined. Checks races in shared memory.
bool read_memory(Warp& w, const Inst& inst, int lane, const Location& from, uint64_t bytes,
                 void* to, bool atomic = false);
void write_memory(Warp& w, const Inst& inst, int lane, const Location& to, uint64_t bytes,
                  const void* from, bool known, bool atomic = false);

/// Counts the sectors (32 bytes) of a global access, the wavefronts of a shared one, and the fewest
/// possible.
void count_sectors(Warp& w, const Inst& inst, Mask lanes, const Addresses& a, uint64_t bytes);
void count_wavefronts(Warp& w, const Inst& inst, Mask lanes, const Addresses& a, uint64_t bytes);

/// Strong accesses (atomic, volatile, relaxed, acquire, release) synchronise through their
/// location, and one that sees the same again and again is a poll.
void strong_acquire(Warp& w, Location& location);
/// released: global memory's atomics need a release, or a fence before them, to hand over what came
/// before.
void strong_release(Warp& w, Location& location, bool released);
void note_poll(Warp& w, const Inst& inst, uint64_t seen);

/// Races in global memory (global_races.cpp), and the same for its strong accesses.
/// False if the read is not ordered after a write: its value is then undefined (Launch::racy_reads
/// says why).
bool check_global_read(Warp& w, const Inst& inst, int lane, const Location& from, uint64_t bytes,
                       bool atomic);
void note_global_write(Warp& w, const Inst& inst, int lane, const Location& to, uint64_t bytes,
                       const void* value, bool atomic);
void acquire_global(Warp& w, const Location& location);
void release_global(Warp& w, const Location& location);

}  // namespace ptxemu
