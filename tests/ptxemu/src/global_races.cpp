// Who wrote global memory last, and whether an access is ordered after that.
//
// As in shared memory (shared.h), but of writers only and across blocks: what one cluster did is
// ordered before another by a strong access (to a lock, a flag, a counter) that the first releases
// and the second sees. Two writes without order are a race unless they write the same. A read
// without order after a write gives an undefined value, and is a race once that value matters:
// compilers let lanes that hold copies of an element load it, and drop what they make of it. A read
// that comes before such a write is not noted: another seed runs the blocks the other way round.
//
// Lenient on fences: in a block that has executed any, every strong write releases, and every
// strong read acquires. Atomics on floats hand nothing over. Bulk copies are not noted.
#include <cstring>

#include "access.h"

namespace ptxemu {

void join_elsewhere(Clocks& into, const std::shared_ptr<const Elsewhere>& from) {
  if (into.elsewhere == nullptr) {
    into.elsewhere = from;
    return;
  }
  std::shared_ptr<Elsewhere> merged;  // made when there is something new
  for (const auto& [cluster, clocks] : *from) {
    const auto known = into.elsewhere->find(cluster);
    bool is_new = known == into.elsewhere->end();
    for (size_t i = 0; !is_new && i < clocks.size(); ++i) is_new = clocks[i] > known->second[i];
    if (!is_new) continue;
    if (merged == nullptr) merged = std::make_shared<Elsewhere>(*into.elsewhere);
    const auto [entry, inserted] = merged->try_emplace(cluster, clocks);
    if (!inserted) join(entry->second, clocks);
  }
  if (merged) into.elsewhere = merged;
}

void acquire_global(Warp& w, const Location& location) {
  const auto found = w.launch->strong_locations.find(location.allocation->base + location.offset);
  if (found == w.launch->strong_locations.end()) return;
  join_elsewhere(w.seen, found->second);
  const auto own = found->second->find(w.block->cluster->number);
  if (own != found->second->end()) join(w.seen, own->second);
}

void release_global(Warp& w, const Location& location) {
  w.tick();
  Clocks all;
  auto& released = w.launch->strong_locations[location.allocation->base + location.offset];
  all.elsewhere = released;
  const uint32_t number = w.block->cluster->number;
  join_elsewhere(all, std::make_shared<Elsewhere>(Elsewhere{{number, w.seen}}));
  if (w.seen.elsewhere) join_elsewhere(all, w.seen.elsewhere);
  released = all.elsewhere;
}

namespace {

bool is_ordered(const Warp& w, const WriteTag& tag, int lane) {
  if (tag.cluster == 0 || tag.era != w.launch->era) return true;
  if (tag.cluster == w.block->cluster->number)
    return clock_of(tag.stamp) < w.seen[warp_of(tag.stamp)] ||
           tag.stamp == stamp(w.clock(), w.clock_index, static_cast<uint32_t>(lane));
  if (w.seen.elsewhere == nullptr) return false;
  const auto known = w.seen.elsewhere->find(tag.cluster);
  return known != w.seen.elsewhere->end() &&
         clock_of(tag.stamp) < known->second[warp_of(tag.stamp)];
}

std::string describe_race(const Warp& w, const Location& l, uint64_t at, const WriteTag& tag,
                          const char* verb) {
  const LaunchConfig& c = w.launch->config;
  const uint32_t index = tag.cluster - 1, columns = c.grid.x / c.cluster.x,
                 rows = c.grid.y / c.cluster.y;
  const auto warps = static_cast<uint32_t>(w.block->warps.size());
  const uint32_t warp = warp_of(tag.stamp) % warps, rank = warp_of(tag.stamp) / warps;
  std::string who = "warp " + std::to_string(warp);
  if (tag.cluster != w.block->cluster->number || rank != w.block->rank)
    who = "block (" + std::to_string(index % columns * c.cluster.x + rank % c.cluster.x) + ", " +
          std::to_string(index / columns % rows * c.cluster.y + rank / c.cluster.x % c.cluster.y) +
          ", " +
          std::to_string(index / columns / rows * c.cluster.z + rank / c.cluster.x / c.cluster.y) +
          "), " + who;
  else if (warp == w.index)
    who = "lane " + std::to_string(lane_of(tag.stamp)) + " of the same warp";
  std::string place;
  for (const auto& [name, f] : w.launch->module.functions)
    for (const Inst& i : f->code)
      if (i.index == tag.instruction) place = " at " + where(w.launch->module, i);
  return std::string(verb) + " byte " + std::to_string(at) + " of " + l.allocation->name +
         ", which " + who + " wrote" + place + " with no synchronisation between";
}

int shift_of(const Module& module) {
  return __builtin_ctz(static_cast<unsigned>(module.global_granule));
}

}  // namespace

bool check_global_read(Warp& w, const Inst& inst, int lane, const Location& l, uint64_t bytes,
                       bool atomic) {
  const int shift = shift_of(w.launch->module);
  const uint64_t base = l.allocation->base >> shift, first = l.allocation->base + l.offset;
  for (uint64_t g = first >> shift; g <= (first + bytes - 1) >> shift; ++g) {
    const WriteTag& tag = l.allocation->tags[g - base];
    if (__builtin_expect(is_ordered(w, tag, lane), 1) || (atomic && tag.atomic)) continue;
    if (tag.same_across || (tag.same_within && tag.cluster == w.block->cluster->number))
      continue;  // may be its own
    if (atomic) {
      if (!w.launch->report.again(Kind::Race, inst))
        w.report(Kind::Race, inst, 1u << lane, describe_race(w, l, l.offset, tag, "reads"));
      return true;
    }
    if (w.launch->racy_reads.count(inst.index) == 0)
      w.launch->racy_reads[inst.index] = describe_race(w, l, l.offset, tag, "reads");
    return false;
  }
  return true;
}

void note_global_write(Warp& w, const Inst& inst, int lane, const Location& l, uint64_t bytes,
                       const void* value, bool atomic) {
  const int shift = shift_of(w.launch->module);
  if (l.allocation->tags == nullptr) w.launch->memory.add_tags(*l.allocation, shift);
  const uint64_t base = l.allocation->base >> shift, first = l.allocation->base + l.offset;
  const uint64_t unit = std::min(bytes, uint64_t{1} << shift);
  const auto* from = static_cast<const uint8_t*>(value);
  for (uint64_t at = 0; at < bytes; at += unit) {
    WriteTag& tag = l.allocation->tags[((first + at) >> shift) - base];
    if (__builtin_expect(!is_ordered(w, tag, lane), 0) && !(atomic && tag.atomic)) {
      if (std::memcmp(l.host + at, from + at, unit) == 0) {
        if (tag.cluster == w.block->cluster->number)
          tag.same_within = 1;
        else
          tag.same_across = 1;
        continue;
      }
      if (!w.launch->report.again(Kind::Race, inst))
        w.report(Kind::Race, inst, 1u << lane, describe_race(w, l, l.offset + at, tag, "writes"));
    }
    tag.cluster = w.block->cluster->number;
    tag.stamp = stamp(w.clock(), w.clock_index, static_cast<uint32_t>(lane));
    tag.instruction = inst.index;
    tag.era = w.launch->era;
    tag.atomic = atomic;
    tag.same_within = tag.same_across = 0;
  }
}

}  // namespace ptxemu
