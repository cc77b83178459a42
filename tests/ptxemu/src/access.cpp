#include "access.h"

#include <algorithm>
#include <cstring>

#include "ops/lanes.h"

namespace ptxemu {

Addresses addresses(Warp& w, const Inst& inst, Operand base, Mask lanes) {
  if (__builtin_expect((w.defined[base.row] & lanes) != lanes, 0))
    w.require_defined(base, lanes, inst, "an address");
  Addresses a;
  const auto offset = static_cast<uint64_t>(inst.imm);
  if (inst.address_is_64) {
    const uint64_t* from = w.row<uint64_t>(base);
    for (int lane = 0; lane < kLanes; ++lane) a.at[lane] = from[lane] + offset;
  } else {
    const uint32_t* from = w.row<uint32_t>(base);
    for (int lane = 0; lane < kLanes; ++lane)
      a.at[lane] = uint32_t(from[lane] + static_cast<uint32_t>(offset));
  }
  return a;
}

namespace {

Space space_of(uint64_t address) {
  switch (address / kWindow) {
    case kSharedWindow / kWindow:
      return Space::Shared;
    case kLocalWindow / kWindow:
      return Space::Local;
    case kParamWindow / kWindow:
      return Space::Param;
    case kConstWindow / kWindow:
      return Space::Const;
    default:
      return Space::Global;
  }
}

Location out_of_bounds(Warp& w, const Inst& inst, int lane, bool is_write,
                       const std::string& what) {
  w.report(Kind::OutOfBounds, inst, 1u << lane,
           std::string(is_write ? "writes " : "reads ") + what);
  return {};
}

Location locate_shared(Warp& w, const Inst& inst, int lane, Space space, uint64_t address,
                       uint64_t bytes, bool is_write) {
  Location l;
  l.space = Space::Shared;
  const uint64_t rank = address >> kClusterShift;
  l.offset = address & ((uint64_t{1} << kClusterShift) - 1);
  l.block = w.block;
  if (rank > w.block->cluster->blocks.size())
    return out_of_bounds(w, inst, lane, is_write,
                         "shared address " + std::to_string(address) + ", which is of no block");
  if (rank) l.block = w.block->cluster->blocks[rank - 1].get();
  if (l.block != w.block) {
    const auto& warps = l.block->warps;
    if (space == Space::Shared)
      return out_of_bounds(w, inst, lane, is_write,
                           "shared memory of block " + std::to_string(rank - 1) +
                               " of the cluster, which only .shared::cluster is for");
    if (std::all_of(warps.begin(), warps.end(), [](const auto& warp) { return warp->done(); }))
      return out_of_bounds(w, inst, lane, is_write,
                           "shared memory of block " + std::to_string(rank - 1) +
                               " of the cluster, which has exited");
  }
  SharedMemory& s = *l.block->shared;
  if (l.offset + bytes > s.size())
    return out_of_bounds(w, inst, lane, is_write,
                         "shared bytes " + std::to_string(l.offset) + " to " +
                             std::to_string(l.offset + bytes - 1) + ", the block has " +
                             std::to_string(s.size()));
  l.host = s.bytes() + l.offset;
  return l;
}

Location locate_local(Warp& w, const Inst& inst, int lane, uint64_t address, uint64_t bytes,
                      bool is_write) {
  Location l;
  l.space = Space::Local;
  l.offset = address;
  if (address + bytes > w.local[lane].size())
    return out_of_bounds(w, inst, lane, is_write,
                         "local bytes " + std::to_string(address) + " to " +
                             std::to_string(address + bytes - 1) + ", the lane has " +
                             std::to_string(w.local[lane].size()));
  l.host = w.local[lane].data() + address;
  return l;
}

Location locate_param(Warp& w, const Inst& inst, int lane, uint64_t address, uint64_t bytes,
                      bool is_write) {
  Location l;
  l.space = Space::Param;
  l.offset = address;
  std::vector<uint8_t>& own = w.frame->params[lane];
  std::vector<uint8_t>& bank = own.empty() ? w.launch->config.params : own;
  if (address + bytes > bank.size())
    return out_of_bounds(w, inst, lane, is_write,
                         "parameter bytes " + std::to_string(address) + " to " +
                             std::to_string(address + bytes - 1) + " of " +
                             std::to_string(bank.size()));
  l.host = bank.data() + address;
  return l;
}

Location locate_global(Warp& w, const Inst& inst, int lane, uint64_t address, uint64_t bytes,
                       bool is_write) {
  Location l;
  Allocation* a = w.launch->memory.find(address);
  const uint64_t offset = a ? address - a->base : 0;
  if (a == nullptr || address < a->base || offset + bytes > a->size)
    return out_of_bounds(w, inst, lane, is_write, w.launch->memory.describe(address, bytes));
  if (a->shadow)
    for (uint64_t i = 0; i < bytes; ++i)
      if (a->shadow[offset + i] & kHole)
        return out_of_bounds(w, inst, lane, is_write, w.launch->memory.describe(address + i, 1));
  l.allocation = a;
  l.offset = offset;
  l.host = a->host + offset;
  return l;
}

}  // namespace

Location locate(Warp& w, const Inst& inst, int lane, Space space, uint64_t address, uint64_t bytes,
                uint64_t align, bool is_write) {
  if (__builtin_expect((address & (align - 1)) != 0, 0)) {
    w.report(
        Kind::Misaligned, inst, 1u << lane, "address 0x" + [&] {
          char text[20];
          std::snprintf(text, sizeof text, "%llx", static_cast<unsigned long long>(address));
          return std::string(text);
        }() + " is not a multiple of " + std::to_string(align));
    return {};
  }
  if (space == Space::Generic) {
    space = space_of(address);
    if (space != Space::Global) address %= kWindow;
    if (space == Space::Shared) space = Space::SharedCluster;
  }
  switch (space) {
    case Space::Global:
      return locate_global(w, inst, lane, address, bytes, is_write);
    case Space::Shared:
    case Space::SharedCluster:
      return locate_shared(w, inst, lane, space, address, bytes, is_write);
    case Space::Local:
      return locate_local(w, inst, lane, address, bytes, is_write);
    case Space::Param:
      return locate_param(w, inst, lane, address, bytes, is_write);
    case Space::Const: {
      Location l;
      l.space = Space::Const;
      l.offset = address;
      if (is_write || address + bytes > w.launch->module.constants.size())
        return out_of_bounds(w, inst, lane, is_write, "constant byte " + std::to_string(address));
      l.host = w.launch->module.constants.data() + address;
      return l;
    }
    case Space::Generic:
      break;
  }
  throw std::logic_error("an access in no space");
}

bool read_memory(Warp& w, const Inst& inst, int lane, const Location& from, uint64_t bytes,
                 void* to, bool atomic) {
  std::memcpy(to, from.host, bytes);
  const auto all_set = [&](const std::vector<uint8_t>& defined) {
    for (uint64_t i = 0; i < bytes; ++i)
      if (!defined[from.offset + i]) return false;
    return true;
  };
  switch (from.space) {
    case Space::Shared: {
      SharedMemory& s = *from.block->shared;
      const HazardInfo hazard = s.read(w.access(inst, lane, atomic), from.offset, bytes);
      if (__builtin_expect(hazard.hazard != Hazard::None, 0)) {
        w.report_hazard(hazard, inst, lane);
        return true;  // that is what is wrong with it
      }
      return s.defined(from.offset, bytes);
    }
    case Space::Global: {
      if (from.allocation->tags && !check_global_read(w, inst, lane, from, bytes, atomic))
        return false;
      if (!from.allocation->shadow) return true;
      for (uint64_t i = 0; i < bytes; ++i)
        if (from.allocation->shadow[from.offset + i] & kUndefined) return false;
      return true;
    }
    case Space::Local:
      return all_set(w.local_defined[lane]);
    case Space::Param:
      return w.frame->params_defined[lane].empty() || all_set(w.frame->params_defined[lane]);
    default:
      return true;
  }
}

void write_memory(Warp& w, const Inst& inst, int lane, const Location& to, uint64_t bytes,
                  const void* from, bool known, bool atomic) {
  if (std::memcmp(to.host, from, bytes) != 0) w.launch->polls_in_vain = 0;
  if (to.space == Space::Shared) {
    SharedMemory& s = *to.block->shared;
    const HazardInfo hazard = s.write(w.access(inst, lane, atomic), to.offset, bytes, from);
    if (__builtin_expect(hazard.hazard != Hazard::None, 0)) w.report_hazard(hazard, inst, lane);
    if (!known) s.set_defined(to.offset, bytes, false);
    return;
  }
  if (to.space == Space::Global) note_global_write(w, inst, lane, to, bytes, from, atomic);
  std::memcpy(to.host, from, bytes);
  if (to.space == Space::Global && to.allocation->shadow) {
    for (uint64_t i = 0; i < bytes; ++i)
      to.allocation->shadow[to.offset + i] &= static_cast<uint8_t>(~kUndefined);
  } else if (to.space == Space::Local) {
    std::fill_n(w.local_defined[lane].begin() + static_cast<ptrdiff_t>(to.offset), bytes, known);
  } else if (to.space == Space::Param && !w.frame->params_defined[lane].empty()) {
    std::fill_n(w.frame->params_defined[lane].begin() + static_cast<ptrdiff_t>(to.offset), bytes,
                known);
  }
}

void count_sectors(Warp& w, const Inst& inst, Mask lanes, const Addresses& a, uint64_t bytes) {
  uint64_t sectors[kLanes * 2];
  int count = 0;
  bool sorted = true;
  uint64_t span = 0;  // distinct bytes, if no two lanes overlap in part
  uint64_t last_address = ~uint64_t{0};
  each_lane(lanes, [&](int lane) {
    if (a.at[lane] != last_address) span += bytes;
    last_address = a.at[lane];
    for (uint64_t s = a.at[lane] / 32; s <= (a.at[lane] + bytes - 1) / 32; ++s) {
      if (count && sectors[count - 1] == s) continue;
      sorted &= count == 0 || sectors[count - 1] < s;
      sectors[count++] = s;
    }
  });
  if (!sorted) {
    std::sort(sectors, sectors + count);
    count = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
  }
  AccessStats& stats = w.stats[inst.index];
  const bool copy = inst.counted == Class::CpAsync;
  (copy ? stats.copied : stats.actual) += static_cast<uint64_t>(count);
  (copy ? stats.copied_ideal : stats.ideal) +=
      std::min<uint64_t>(static_cast<uint64_t>(count), (span + 31) / 32);
}

// 32 banks of 4 bytes. Lanes that read the same word share a wavefront; accesses of 8 and 16 bytes
// go in halves and quarters of a warp, each one wavefront at best.
void count_wavefronts(Warp& w, const Inst& inst, Mask lanes, const Addresses& a, uint64_t bytes) {
  const int words = static_cast<int>((bytes + 3) / 4), group = kLanes / words;
  uint64_t actual = 0, ideal = 0;
  for (int first = 0; first < kLanes; first += group) {
    const Mask part = lanes & (group == kLanes ? kAllLanes : ((1u << group) - 1) << first);
    if (!part) continue;
    uint64_t seen[kLanes * 4];
    uint8_t in_bank[32] = {};
    int count = 0, most = 0;
    each_lane(part, [&](int lane) {
      for (int word = 0; word < words; ++word) {
        const uint64_t address = a.at[lane] / 4 + static_cast<uint64_t>(word);
        if (std::find(seen, seen + count, address) != seen + count) continue;
        seen[count++] = address;
        most = std::max<int>(most, ++in_bank[address % 32]);
      }
    });
    actual += static_cast<uint64_t>(most);
    ideal += static_cast<uint64_t>((count + 31) / 32);
  }
  AccessStats& stats = w.stats[inst.index];
  stats.actual += actual;
  stats.ideal += ideal;
}

void strong_acquire(Warp& w, Location& location) {
  if (location.space == Space::Global) acquire_global(w, location);
  if (location.space != Space::Shared) return;
  const auto found = location.block->shared->location_clocks.find(location.offset);
  if (found != location.block->shared->location_clocks.end()) join(w.seen, found->second);
}

void strong_release(Warp& w, Location& location, bool released) {
  if (location.space == Space::Global && (released || w.block->fences)) release_global(w, location);
  if (location.space != Space::Shared) return;
  w.tick();
  Clocks& clocks = location.block->shared->location_clocks[location.offset];
  if (clocks.empty()) clocks.assign(w.seen.size(), 0);
  join(clocks, w.seen);
}

void note_poll(Warp& w, const Inst& inst, uint64_t seen) {
  const auto [last, is_new] = w.last_strong.try_emplace(&inst, seen);
  if (!is_new && last->second == seen) {
    ++w.launch->polls_in_vain;
    w.give_up_turn = true;
  } else {
    w.launch->polls_in_vain = 0;
    last->second = seen;
  }
}

}  // namespace ptxemu
