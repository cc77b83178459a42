// Shared memory of one block, and who may touch it when.
//
// Happens-before is kept in vector clocks. Every warp has a clock, and knows of each other warp the
// time up to which that one's accesses are ordered before its own next one (`seen`). A warp's own
// clock ticks where it synchronises: an access at time t is ordered before everything of a warp
// that has seen more than t. Each granule of memory (the bytes of the smallest access in the
// program) remembers its last writer and two last readers of different warps; that is FastTrack's
// idea (Flanagan and Freund, PLDI 2009) with the set of readers cut to two: a write by any warp
// then meets at least one reader that is not itself.
//
// Lanes of one warp are ordered by the warp's own synchronisation only (bar.warp.sync and
// barriers), as since sm_70. They share the warp's clock, though: what one of them releases counts
// as released by all.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace ptxemu {

/// Who accesses, at what time: clock << 14 | warp << 5 | lane. 0 is "nobody yet".
using Stamp = uint32_t;
constexpr int kWarpBits = 9, kLaneBits = 5;
constexpr uint32_t kMaxClock = (1u << (32 - kWarpBits - kLaneBits)) - 1;  // "not yet finished"
inline Stamp stamp(uint32_t clock, uint32_t warp, uint32_t lane) {
  return clock << (kWarpBits + kLaneBits) | warp << kLaneBits | lane;
}
inline uint32_t clock_of(Stamp s) { return s >> (kWarpBits + kLaneBits); }
inline uint32_t warp_of(Stamp s) { return s >> kLaneBits & ((1u << kWarpBits) - 1); }
inline uint32_t lane_of(Stamp s) { return s & (kLanes - 1); }

/// Times of other warps that a warp is ordered after: of its own cluster, and, by number, of
/// others.
using Elsewhere = std::map<uint32_t, std::vector<uint32_t>>;
struct Clocks : std::vector<uint32_t> {
  using std::vector<uint32_t>::vector;
  std::shared_ptr<const Elsewhere> elsewhere;
};
void join_elsewhere(Clocks& into, const std::shared_ptr<const Elsewhere>& from);
inline void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  for (size_t i = 0; i < into.size(); ++i)
    if (from[i] > into[i]) into[i] = from[i];
}
inline void join(Clocks& into, const Clocks& from) {
  join(static_cast<std::vector<uint32_t>&>(into), from);
  if (from.elsewhere && from.elsewhere != into.elsewhere) join_elsewhere(into, from.elsewhere);
}

struct Access {
  const uint32_t* seen;  // the clocks of the accessing warp
  Stamp self;            // its stamp now
  int instruction;
  bool atomic = false;  // atomic, volatile, relaxed or stronger: orders itself with its like
};

enum class Hazard : uint8_t {
  None,
  ReadAfterWrite,
  WriteAfterRead,
  WriteAfterWrite,
  Pending,
  Unfenced
};

struct HazardInfo {
  Hazard hazard = Hazard::None;
  Stamp other = 0;
  int other_instruction = -1;
  uint32_t at = 0;
};

class SharedMemory {
 public:
  SharedMemory(uint64_t size, int granule);

  uint8_t* bytes() { return bytes_.data(); }
  uint64_t size() const { return size_; }
  int granule() const { return granule_; }

  /// Checks and records a read. The caller has checked bounds and alignment.
  HazardInfo read(const Access& access, uint64_t at, uint64_t size) {
    HazardInfo found;
    for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g) {
      const Stamp w = writer_[g];
      if (__builtin_expect(!ordered(access, w), 0)) read_hazard(access, g, w, found);
      if (__builtin_expect(pending_total_ != 0, 0) && pending_[g] && found.hazard == Hazard::None)
        found = {Hazard::Pending, w, writer_instruction_[g], static_cast<uint32_t>(g << shift_)};
      if (__builtin_expect(access.atomic, 0)) {
        strong_reader_[g] = access.self;
      } else {
        note_reader(g, access.self);
      }
    }
    return found;
  }
  /// Checks and records a write of these bytes, and stores them. The same value over the same value
  /// is no race.
  HazardInfo write(const Access& access, uint64_t at, uint64_t size, const void* value);
  /// Bytes of a multiple of the granule, written outside of the program's own order (by a copy
  /// engine): checks readers and writers against the issuer's clocks now, and marks the bytes as
  /// pending until `arrived`.
  HazardInfo begin_async_write(const Access& issuer, uint64_t at, uint64_t size);
  void end_async_write(uint64_t at, uint64_t size, const void* value, Stamp writer,
                       int instruction);
  /// A reader that is not finished yet; `end_async_read` gives it its time.
  HazardInfo begin_async_read(const Access& access, uint64_t at, uint64_t size);
  void end_async_read(uint64_t at, uint64_t size, Stamp reader);

  bool defined(uint64_t at, uint64_t size) const {
    for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g)
      if (!defined_[g]) return false;
    return true;
  }
  void set_defined(uint64_t at, uint64_t size, bool value) {
    for (uint64_t g = at >> shift_, end = (at + size - 1) >> shift_; g <= end; ++g)
      defined_[g] = value;
  }
  Stamp writer(uint64_t at) const { return writer_[at >> shift_]; }
  int writer_instruction(uint64_t at) const { return writer_instruction_[at >> shift_]; }
  /// Forgets who accessed what: everything so far counts as ordered.
  void forget();
  bool any_pending() const { return pending_total_ != 0; }

  /// Clocks attached to a location by strong operations (release and acquire).
  std::unordered_map<uint64_t, Clocks> location_clocks;

 private:
  static bool ordered(const Access& a, Stamp other) {
    return clock_of(other) < a.seen[warp_of(other)] || other == a.self;
  }
  void note_reader(uint64_t g, Stamp self) {
    if (warp_of(reader_[g]) != warp_of(self)) other_reader_[g] = reader_[g];
    reader_[g] = self;
  }
  void read_hazard(const Access& access, uint64_t g, Stamp writer, HazardInfo& found) const;
  void write_hazard(const Access& access, uint64_t g, HazardInfo& found) const;

  uint64_t size_;
  int granule_, shift_;
  std::vector<uint8_t> bytes_;
  std::vector<Stamp> writer_, reader_, other_reader_;
  std::vector<int> writer_instruction_;
  std::vector<uint32_t>
      co_writers_;  // warps that wrote the same value unordered: each may read its own
  std::unordered_map<uint64_t, Stamp>
      strong_reader_;  // the last atomic one, which other atomics may meet
  std::vector<uint8_t> pending_, defined_, atomic_;
  uint64_t pending_total_ = 0;
};

}  // namespace ptxemu
