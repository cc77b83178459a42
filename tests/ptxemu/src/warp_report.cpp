// What a warp reports: undefined values where they matter, hazards in shared memory, and where its
// lanes stand.
#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace ptxemu {

void Warp::taint(Operand destination, Mask lanes, Mask known, const Inst& inst,
                 const uint32_t* rows, size_t count) {
  int origin = inst.index;
  Mask low = inst.in_halves && count ? kAllLanes : 0, high = low;
  for (size_t i = 0; i < count; ++i) {
    low &= low_defined(rows[i]);
    high &= high_defined(rows[i]);
    if ((defined[rows[i]] & lanes) != lanes && frame->origin[rows[i]] >= 0)
      origin = frame->origin[rows[i]];
  }
  frame->origin[destination.row] = origin;
  defined[destination.row] = (defined[destination.row] & ~lanes) | (known & lanes);
  frame->low_defined[destination.row] =
      (frame->low_defined[destination.row] & ~lanes) | (low & lanes);
  frame->high_defined[destination.row] =
      (frame->high_defined[destination.row] & ~lanes) | (high & lanes);
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
    report(Kind::Race, *from, undefined,
           race->second + "; the value is used as " + use + " at " + where(launch->module, inst));
  } else {
    std::string message = std::string("uses an undefined value as ") + use;
    if (from) message += "; it comes from " + where(launch->module, *from);
    if (origin < 0) message += "; the register was never written";
    report(Kind::Uninitialised, inst, undefined, message);
  }
  defined[source.row] |= lanes;  // once is enough
}

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
  std::snprintf(who, sizeof who, "block (%u, %u, %u), warp %u, lane %d%s", block->id.x, block->id.y,
                block->id.z, index, lane,
                count > 1 ? (" and " + std::to_string(count - 1) + " more").c_str() : "");
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
      if (h.other_instruction >= 0 && i.index == h.other_instruction)
        place = " at " + where(launch->module, i);
  const std::string at = "shared byte " + std::to_string(h.at);
  switch (h.hazard) {
    case Hazard::None:
      return;
    case Hazard::ReadAfterWrite:
      return report(
          Kind::Race, inst, 1u << lane,
          "reads " + at + ", which " + who + " wrote" + place + " with no synchronisation between");
    case Hazard::WriteAfterWrite:
      return report(Kind::Race, inst, 1u << lane,
                    "writes " + at + ", which " + who + " wrote" + place +
                        " with no synchronisation between");
    case Hazard::WriteAfterRead:
      return report(
          Kind::Race, inst, 1u << lane,
          "writes " + at + ", which " + who + " reads or has read with no synchronisation between");
    case Hazard::Pending:
      return report(Kind::AsyncUnwaited, inst, 1u << lane,
                    "touches " + at + ", to which an asynchronous copy" + place +
                        " is under way, not waited for");
    case Hazard::Unfenced:
      return report(Kind::AsyncUnwaited, inst, 1u << lane,
                    "reads " + at + " through the asynchronous proxy; " + who + " wrote it" +
                        place + " with no fence.proxy.async between");
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
