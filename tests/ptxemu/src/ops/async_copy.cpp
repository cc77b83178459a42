// cp.async: copies from global to shared memory that are waited for in groups (PTX ISA,
// "cp.async"). The bytes arrive when the thread waits, as late as the program allows: what is read
// before shows as unwaited.
#include <algorithm>

#include "../access.h"
#include "async.h"
#include "pick.h"

namespace ptxemu {

void finish_copy(Warp& w, const AsyncCopy& copy, uint32_t clock) {
  w.launch->polls_in_vain = 0;
  uint8_t data[16] = {};
  std::memcpy(data, copy.from, copy.zero_from);
  w.block->shared->end_async_write(copy.to, copy.bytes, data,
                                   stamp(clock, w.clock_index, static_cast<uint32_t>(copy.lane)),
                                   copy.inst->index);
}

void finish_copies(Warp& w, Mask lanes, uint32_t groups_left) {
  const auto is_due = [&](const AsyncCopy& copy) {
    return (lanes >> copy.lane & 1) && copy.group + groups_left < w.copy_groups[copy.lane];
  };
  for (const AsyncCopy& copy : w.copies)
    if (is_due(copy)) finish_copy(w, copy, w.clock());
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), is_due), w.copies.end());
}

void finish_all_copies(Warp& w, Mask lanes) {
  const auto is_due = [&](const AsyncCopy& copy) { return (lanes >> copy.lane & 1) != 0; };
  for (const AsyncCopy& copy : w.copies)
    if (is_due(copy)) finish_copy(w, copy, w.clock());
  w.copies.erase(std::remove_if(w.copies.begin(), w.copies.end(), is_due), w.copies.end());
}

namespace {

struct CopyDetail : Detail {
  bool has_size = false, has_ignore = false, negated = false;
};

// o: shared address, global address, source size, predicate to ignore the source; imm: offset of
// the shared one, inst.target: offset of the global one
void run_cp_async(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const CopyDetail&>(*inst.detail);
  const Addresses to = addresses(w, inst, inst.o[0], lanes);
  w.require_defined(inst.o[1], lanes, inst, "an address");
  Addresses from;
  for (int lane = 0; lane < kLanes; ++lane)
    from.at[lane] =
        w.row<uint64_t>(inst.o[1])[lane] + static_cast<uint64_t>(static_cast<int64_t>(inst.target));
  if (detail.has_size) w.require_defined(inst.o[2], lanes, inst, "a size");
  const Mask ignored =
      detail.has_ignore ? (detail.negated ? ~w.predicate(inst.o[3]) : w.predicate(inst.o[3])) : 0;
  count_wavefronts(w, inst, lanes, to, inst.size);
  Mask reading = 0;
  each_lane(lanes & ~ignored, [&](int lane) {
    if (!detail.has_size || w.row<uint32_t>(inst.o[2])[lane]) reading |= 1u << lane;
  });
  if (reading) count_sectors(w, inst, reading, from, inst.size);
  each_lane(lanes, [&](int lane) {
    AsyncCopy copy;
    copy.bytes = copy.zero_from = inst.size;
    if (detail.has_size) {
      const uint32_t size = w.row<uint32_t>(inst.o[2])[lane];
      if (size > inst.size)
        w.report(Kind::Invalid, inst, 1u << lane,
                 "copies " + std::to_string(size) + " bytes into " + std::to_string(inst.size));
      copy.zero_from = std::min<uint32_t>(size, inst.size);
    }
    if (ignored >> lane & 1) copy.zero_from = 0;
    const Location target =
        locate(w, inst, lane, Space::Shared, to.at[lane], inst.size, inst.size, true);
    if (target.host == nullptr) return;
    if (copy.zero_from) {
      const Location source =
          locate(w, inst, lane, Space::Global, from.at[lane], copy.zero_from, 1, false);
      if (source.host == nullptr) return;
      if (from.at[lane] % inst.size)
        w.report(Kind::Misaligned, inst, 1u << lane,
                 "the source is not a multiple of " + std::to_string(inst.size));
      copy.from = source.host;
      uint8_t unused[16];
      if (!read_memory(w, inst, lane, source, copy.zero_from, unused)) {
        const auto race = w.launch->racy_reads.find(inst.index);
        if (race != w.launch->racy_reads.end())
          w.report(Kind::Race, inst, 1u << lane, race->second);
        else
          w.report(Kind::Uninitialised, inst, 1u << lane,
                   "copies global memory that was never written");
      }
    }
    copy.to = target.offset;
    copy.lane = lane;
    copy.group = w.copy_groups[lane];
    copy.inst = &inst;
    const HazardInfo hazard =
        w.block->shared->begin_async_write(w.access(inst, lane), target.offset, inst.size);
    if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, lane);
    w.copies.push_back(copy);
  });
}

void decode_cp_async(Decoder& d) {
  auto& detail = d.detail<CopyDetail>();
  const bool bypass = d.take_one({"ca", "cg"}) == 1;
  d.take_one({"shared", "shared::cta"});
  d.take_one({"global"});
  const bool hint = d.take("L2::cache_hint");
  d.ignore({"L2::64B", "L2::128B", "L2::256B"});
  d.need_args(3 + hint, 4 + hint);
  d.inst.o[1] = d.address(d.arg(1));
  if (!d.inst.address_is_64) d.refuse("a global address of 32 bits");
  if (d.inst.imm != static_cast<int32_t>(d.inst.imm)) d.refuse("an offset of more than 32 bits");
  d.inst.target = static_cast<int32_t>(d.inst.imm);
  d.inst.o[0] = d.address(d.arg(0));
  d.inst.size = static_cast<uint8_t>(d.integer(d.arg(2)));
  if (d.inst.size != 16 && (bypass || (d.inst.size != 4 && d.inst.size != 8)))
    d.refuse("copies 4, 8 or 16 bytes, .cg 16");
  if (d.args() == size_t{4} + hint) {
    const Arg& last = d.arg(3);
    detail.has_ignore = last.kind == Arg::Kind::Register &&
                        d.ast.registers[static_cast<size_t>(last.reg)].type == Type::Pred;
    detail.has_size = !detail.has_ignore;
    if (detail.has_ignore)
      d.inst.o[3] = d.predicate(last, detail.negated);
    else
      d.inst.o[2] = d.src(last, Type::B32);
  }
  d.inst.counted = Class::CpAsync;
  d.inst.run = &run_cp_async;
  d.touches_shared(d.inst.size);
}

// A copy belongs to the group that its thread commits next.
void run_commit(Warp& w, const Inst&, Mask lanes) {
  each_lane(lanes, [&](int lane) { ++w.copy_groups[lane]; });
}

void run_wait(Warp& w, const Inst& inst, Mask lanes) {
  finish_copies(w, lanes, static_cast<uint32_t>(inst.imm));
}

void run_wait_all(Warp& w, const Inst&, Mask lanes) { finish_all_copies(w, lanes); }

void decode_commit(Decoder& d) {
  d.need_args(0, 0);
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_commit;
}

void decode_wait(Decoder& d) {
  d.need_args(1, 1);
  d.inst.imm = static_cast<int64_t>(d.integer(d.arg(0)));
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_wait;
}

void decode_wait_all(Decoder& d) {
  d.need_args(0, 0);
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_wait_all;
}

}  // namespace

const std::vector<Opcode> kAsyncOpcodes = {{"cp.async", decode_cp_async},
                                           {"cp.async.commit_group", decode_commit},
                                           {"cp.async.wait_group", decode_wait},
                                           {"cp.async.wait_all", decode_wait_all}};

}  // namespace ptxemu
