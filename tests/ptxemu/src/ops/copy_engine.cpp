// The copy engine: what bulk copies and copies of tensors' boxes share.
//
// A load is finished at a random moment before the program may rely on it, a store when the program
// waits for its group. Between issue and end its shared memory must not be touched, nor read; that
// is checked.
#include <algorithm>
#include <cstring>

#include "../memory.h"
#include "async.h"

namespace ptxemu {

HazardInfo proxy_hazard(const Warp& w, const SharedMemory& shared, uint64_t at) {
  const Stamp writer = shared.writer(at);
  const size_t warps =
      w.seen.size() - 1;  // the last is the copy engine, which writes through this proxy itself
  if (clock_of(writer) == 0 || warp_of(writer) >= warps) return {};
  const Warp& other = *w.block->cluster->blocks[warp_of(writer) / w.block->warps.size()]
                           ->warps[warp_of(writer) % w.block->warps.size()];
  const bool fenced = clock_of(writer) < other.proxy_fence_clock ||
                      clock_of(writer) < w.seen_at_proxy_fence[warp_of(writer)];
  if (fenced) return {};
  return {Hazard::Unfenced, writer, shared.writer_instruction(at), static_cast<uint32_t>(at)};
}

bool has_exited(const Block& block) {
  return std::all_of(block.warps.begin(), block.warps.end(),
                     [](const auto& warp) { return warp->done(); });
}

void start_bulk_load(Warp& w, const Inst& inst, int lane, const std::vector<Block*>& blocks,
                     const std::vector<BulkPiece>& pieces, uint64_t barrier) {
  for (Block* block : blocks) {
    for (const BulkPiece& piece : pieces) {
      if (piece.shared + piece.bytes > block->shared->size()) {
        w.report(Kind::OutOfBounds, inst, 1u << lane,
                 "copies to shared bytes " + std::to_string(piece.shared) + " to " +
                     std::to_string(piece.shared + piece.bytes - 1) + ", the block has " +
                     std::to_string(block->shared->size()));
        return;
      }
      const HazardInfo hazard =
          block->shared->begin_async_write(w.access(inst, lane), piece.shared, piece.bytes);
      if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, lane);
    }
    Cluster* cluster = block->cluster;
    const auto agent = static_cast<uint32_t>(w.seen.size() - 1);
    const Inst* copy = &inst;
    cluster->bulk.push_back(
        {[=] {
           uint64_t total = 0;
           std::vector<uint8_t> data;
           for (const BulkPiece& piece : pieces) {
             data.resize(piece.bytes);
             for (uint64_t i = 0; i < piece.bytes; ++i)
               data[i] = static_cast<uint8_t>(piece.fill >> 8 * (i % 4));
             if (piece.first < piece.last)
               std::memcpy(data.data() + piece.first, piece.global, piece.last - piece.first);
             block->shared->end_async_write(piece.shared, piece.bytes, data.data(),
                                            stamp(cluster->agent_clock, agent, 0), copy->index);
             total += piece.bytes;
           }
           ++cluster->agent_clock;
           complete_bytes(*block, *copy, barrier, total);
         },
         &inst});
  }
}

void start_bulk_store(Warp& w, const Inst& inst, int lane, const Location& from,
                      const std::vector<BulkPiece>& pieces, BulkReduce reduce, Type type) {
  if (from.block != w.block)
    return w.report(Kind::Invalid, inst, 1u << lane,
                    "copies from the block's own shared memory only");
  SharedMemory& s = *w.block->shared;
  for (const BulkPiece& piece : pieces) {
    if (piece.shared + piece.bytes > s.size()) {
      w.report(Kind::OutOfBounds, inst, 1u << lane,
               "copies from shared byte " + std::to_string(piece.shared + piece.bytes - 1) +
                   ", the block has " + std::to_string(s.size()));
      return;
    }
    HazardInfo hazard = s.begin_async_read(w.access(inst, lane), piece.shared, piece.bytes);
    const uint64_t first = piece.shared + piece.first, last = piece.shared + piece.last;
    for (uint64_t at = first; at < last && hazard.hazard == Hazard::None;
         at += static_cast<uint64_t>(s.granule()))
      hazard = proxy_hazard(w, s, at);
    if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, lane);
    if (first < last && !s.defined(first, last - first))
      w.report(Kind::Uninitialised, inst, 1u << lane,
               "copies shared memory that was never written, from byte " + std::to_string(first));
  }
  BulkStore store;
  store.lane = lane;
  store.group = w.bulk_groups[lane];
  store.finish = [&w, &s, lane, pieces, reduce, type] {
    for (const BulkPiece& piece : pieces) {
      s.end_async_read(piece.shared, piece.bytes,
                       stamp(w.clock(), w.clock_index, static_cast<uint32_t>(lane)));
      const uint64_t size = piece.last - piece.first;
      if (size == 0) continue;
      const uint8_t* source = s.bytes() + piece.shared + piece.first;
      if (reduce == BulkReduce::None) {
        std::memcpy(piece.global, source, size);
        continue;
      }
      const auto bytes = static_cast<uint64_t>(bytes_of(type));
      for (uint64_t i = 0; i < size; i += bytes) {
        uint64_t old = 0, value = 0;
        std::memcpy(&old, piece.global + i, bytes);
        std::memcpy(&value, source + i, bytes);
        const uint64_t next = reduce_element(reduce, type, old, value);
        std::memcpy(piece.global + i, &next, bytes);
      }
    }
  };
  w.bulk_stores.push_back(std::move(store));
}

std::vector<Block*> copy_targets(Warp& w, const Inst& inst, int lane, const Location& data,
                                 const Location& barrier, const uint16_t* mask) {
  const auto refuse = [&](const std::string& why) {
    w.report(Kind::Invalid, inst, 1u << lane, why);
    return std::vector<Block*>();
  };
  const auto& all = w.block->cluster->blocks;
  if (barrier.block != data.block) return refuse("the mbarrier is in another block than the data");
  if (mask && *mask >> all.size()) return refuse("a mask of blocks that the cluster does not have");
  std::vector<Block*> blocks;
  for (const auto& block : all) {
    if (mask ? !(*mask >> block->rank & 1) : block.get() != data.block) continue;
    Location there = barrier;
    there.block = block.get();
    if (has_exited(*block)) return refuse("copies into a block that has exited");
    if (find_barrier(w, inst, lane, there) == nullptr) return {};
    blocks.push_back(block.get());
  }
  return blocks;
}

uint8_t* global_range(Warp& w, const Inst& inst, int lane, uint64_t address, uint64_t bytes,
                      bool is_write) {
  const Location l = locate(w, inst, lane, Space::Global, address, bytes, 1, is_write);
  if (l.host == nullptr || l.allocation->shadow == nullptr) return l.host;
  for (uint64_t i = 0; i < bytes; ++i) {
    uint8_t& flags = l.allocation->shadow[l.offset + i];
    if (is_write) {
      flags &= static_cast<uint8_t>(~kUndefined);
    } else if (flags & kUndefined) {
      w.report(Kind::Uninitialised, inst, 1u << lane,
               "copies global memory that was never written");
      break;
    }
  }
  return l.host;
}

BulkReduce take_reduction(Decoder& d) {
  return static_cast<BulkReduce>(
      d.take_one({"add", "min", "max", "inc", "dec", "and", "or", "xor"}));
}

bool can_reduce(BulkReduce op, Type type) {
  const auto is_one_of = [&](std::initializer_list<Type> types) {
    return std::find(types.begin(), types.end(), type) != types.end();
  };
  switch (op) {
    case BulkReduce::Add:
      return is_one_of(
          {Type::U32, Type::S32, Type::U64, Type::F16, Type::BF16, Type::F32, Type::F64});
    case BulkReduce::Min:
    case BulkReduce::Max:
      return is_one_of({Type::U32, Type::S32, Type::U64, Type::S64, Type::F16, Type::BF16});
    case BulkReduce::Inc:
    case BulkReduce::Dec:
      return type == Type::U32;
    default:
      return is_one_of({Type::B32, Type::B64});
  }
}

void finish_bulk_stores(Warp& w, Mask lanes, uint32_t groups_left) {
  const auto is_due = [&](const BulkStore& store) {
    return (lanes >> store.lane & 1) && store.group + groups_left < w.bulk_groups[store.lane];
  };
  for (const BulkStore& store : w.bulk_stores)
    if (is_due(store)) store.finish();
  w.bulk_stores.erase(std::remove_if(w.bulk_stores.begin(), w.bulk_stores.end(), is_due),
                      w.bulk_stores.end());
}

}  // namespace ptxemu
