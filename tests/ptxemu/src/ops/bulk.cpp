// Bulk copies: the copy engine moves bytes between global and shared memory (PTX ISA, "cp.async.bulk",
// "cp.reduce.async.bulk"), and the addresses of other blocks of a cluster (mapa).
//
// A load is finished at a random moment before the program may rely on it, a store when the program waits for its
// group. Between issue and end its shared memory must not be touched, nor read; that is checked.
#include <algorithm>

#include "../memory.h"
#include "async.h"
#include "pick.h"

namespace ptxemu {

HazardInfo proxy_hazard(const Warp& w, const SharedMemory& shared, uint64_t at) {
  const Stamp writer = shared.writer(at);
  const size_t warps = w.seen.size() - 1;  // the last is the copy engine, which writes through this proxy itself
  if (clock_of(writer) == 0 || warp_of(writer) >= warps) return {};
  const Warp& other = *w.block->cluster->blocks[warp_of(writer) / w.block->warps.size()]
                           ->warps[warp_of(writer) % w.block->warps.size()];
  const bool fenced = clock_of(writer) < other.proxy_fence_clock || clock_of(writer) < w.seen_at_proxy_fence[warp_of(writer)];
  if (fenced) return {};
  return {Hazard::Unfenced, writer, shared.writer_instruction(at), static_cast<uint32_t>(at)};
}

void start_bulk_load(Warp& w, const Inst& inst, int lane, const std::vector<Block*>& blocks,
                     const std::vector<BulkPiece>& pieces, uint64_t barrier) {
  for (Block* block : blocks) {
    for (const BulkPiece& piece : pieces) {
      if (piece.shared + piece.bytes > block->shared->size()) {
        w.report(Kind::OutOfBounds, inst, 1u << lane,
                 "copies to shared bytes " + std::to_string(piece.shared) + " to " +
                     std::to_string(piece.shared + piece.bytes - 1) + ", the block has " + std::to_string(block->shared->size()));
        return;
      }
      const HazardInfo hazard = block->shared->begin_async_write(w.access(inst, lane), piece.shared, piece.bytes);
      if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, lane);
    }
    Cluster* cluster = block->cluster;
    const auto agent = static_cast<uint32_t>(w.seen.size() - 1);
    const int instruction = inst.index;
    cluster->bulk.push_back({[=] {
      uint64_t total = 0;
      std::vector<uint8_t> data;
      for (const BulkPiece& piece : pieces) {
        data.resize(piece.bytes);
        for (uint64_t i = 0; i < piece.bytes; ++i) data[i] = static_cast<uint8_t>(piece.fill >> 8 * (i % 4));
        if (piece.first < piece.last) std::memcpy(data.data() + piece.first, piece.global, piece.last - piece.first);
        block->shared->end_async_write(piece.shared, piece.bytes, data.data(), stamp(cluster->agent_clock, agent, 0), instruction);
        total += piece.bytes;
      }
      ++cluster->agent_clock;
      complete_bytes(*block, barrier, total);
    }, &inst});
  }
}

void start_bulk_store(Warp& w, const Inst& inst, int lane, const std::vector<BulkPiece>& pieces, BulkReduce reduce, Type type) {
  SharedMemory& s = *w.block->shared;
  for (const BulkPiece& piece : pieces) {
    if (piece.shared + piece.bytes > s.size()) {
      w.report(Kind::OutOfBounds, inst, 1u << lane, "copies from shared byte " + std::to_string(piece.shared + piece.bytes - 1) +
                                                        ", the block has " + std::to_string(s.size()));
      return;
    }
    HazardInfo hazard = s.begin_async_read(w.access(inst, lane), piece.shared, piece.bytes);
    for (uint64_t at = piece.shared; at < piece.shared + piece.bytes && hazard.hazard == Hazard::None; at += 4)
      hazard = proxy_hazard(w, s, at);
    if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, lane);
    if (piece.first < piece.last && !s.defined(piece.shared, piece.bytes))
      w.report(Kind::Uninitialised, inst, 1u << lane, "copies shared memory that was never written, from byte " + std::to_string(piece.shared));
  }
  BulkStore store;
  store.lane = lane;
  store.group = w.bulk_groups[lane];
  store.finish = [&w, &s, lane, pieces, reduce, type] {
    for (const BulkPiece& piece : pieces) {
      s.end_async_read(piece.shared, piece.bytes, stamp(w.clock(), w.clock_index, static_cast<uint32_t>(lane)));
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

std::vector<Block*> copy_targets(Warp& w, Block* own, bool multicast, uint32_t mask) {
  if (!multicast) return {own};
  std::vector<Block*> blocks;
  for (const auto& block : w.block->cluster->blocks)
    if (mask >> block->rank & 1) blocks.push_back(block.get());
  return blocks;
}

uint8_t* global_range(Warp& w, const Inst& inst, int lane, uint64_t address, uint64_t bytes, bool is_write) {
  const Location l = locate(w, inst, lane, Space::Global, address, bytes, 1, is_write);
  if (l.host == nullptr || l.allocation->shadow == nullptr) return l.host;
  for (uint64_t i = 0; i < bytes; ++i) {
    uint8_t& flags = l.allocation->shadow[l.offset + i];
    if (is_write) {
      flags &= static_cast<uint8_t>(~kUndefined);
    } else if (flags & kUndefined) {
      w.report(Kind::Uninitialised, inst, 1u << lane, "copies global memory that was never written");
      break;
    }
  }
  return l.host;
}

BulkReduce take_reduction(Decoder& d) {
  return static_cast<BulkReduce>(d.take_one({"add", "min", "max", "inc", "dec", "and", "or", "xor"}, 8));
}

void finish_bulk_stores(Warp& w, Mask lanes, uint32_t groups_left) {
  const auto is_due = [&](const BulkStore& store) {
    return (lanes >> store.lane & 1) && store.group + groups_left < w.bulk_groups[store.lane];
  };
  for (const BulkStore& store : w.bulk_stores)
    if (is_due(store)) store.finish();
  w.bulk_stores.erase(std::remove_if(w.bulk_stores.begin(), w.bulk_stores.end(), is_due), w.bulk_stores.end());
}

namespace {

struct BulkDetail : Detail {
  Pointer to, from, barrier;
  Operand bytes, mask;
  bool is_load = true, multicast = false;
  BulkReduce reduce = BulkReduce::None;
  Type type = Type::None;
};

void run_bulk(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const BulkDetail&>(*inst.detail);
  for (const Operand& o : {detail.to.base, detail.from.base, detail.bytes})
    w.require_defined(o, lanes, inst, "an operand of a bulk copy");
  each_lane(lanes, [&](int lane) {
    const uint64_t bytes = w.row<uint32_t>(detail.bytes)[lane];
    const uint64_t global = (detail.is_load ? detail.from : detail.to).at(w, lane);
    if (bytes % 16 || global % 16)
      return w.report(Kind::Misaligned, inst, 1u << lane, "bulk copies are of multiples of 16 bytes, at such addresses");
    if (bytes == 0) return;
    const Location shared = locate(w, inst, lane, Space::Shared, (detail.is_load ? detail.to : detail.from).at(w, lane),
                                   bytes, 16, detail.is_load);
    BulkPiece piece;
    piece.shared = shared.offset;
    piece.bytes = piece.last = bytes;
    piece.global = global_range(w, inst, lane, global, bytes, !detail.is_load);
    if (shared.host == nullptr || piece.global == nullptr) return;
    if (!detail.is_load) return start_bulk_store(w, inst, lane, {piece}, detail.reduce, detail.type);
    const Location barrier = locate(w, inst, lane, Space::Shared, detail.barrier.at(w, lane), 8, 8, true);
    if (barrier.host == nullptr || find_barrier(w, inst, lane, barrier) == nullptr) return;
    const uint32_t mask = detail.multicast ? w.row<uint16_t>(detail.mask)[lane] : 0;
    start_bulk_load(w, inst, lane, copy_targets(w, shared.block, detail.multicast, mask), {piece}, barrier.offset);
  });
}

// .shared::cluster.global.mbarrier [to], [from], bytes, [mbarrier] {, mask} {, policy};
// .global.shared::cta.bulk_group [to], [from], bytes {, policy}
void decode_bulk(Decoder& d, bool reduces) {
  auto& detail = d.detail<BulkDetail>();
  detail.is_load = d.take("mbarrier::complete_tx::bytes");
  if (!detail.is_load) d.take_one({"bulk_group"});
  d.take_one({"global"});
  d.take_one({"shared::cluster", "shared::cta"});
  detail.multicast = d.take("multicast::cluster");
  const bool hint = d.take("L2::cache_hint");
  d.take("noftz");
  if (reduces) {
    detail.reduce = take_reduction(d);
    detail.type = d.take_type();
    if (detail.is_load || detail.reduce == BulkReduce::None) d.refuse("only reductions to global memory are supported");
  }
  const size_t count = detail.is_load ? 4u + detail.multicast + hint : 3u + hint;
  d.need_args(count, count);
  detail.to = Pointer::decode(d, d.arg(0));
  detail.from = Pointer::decode(d, d.arg(1));
  detail.bytes = d.src(d.arg(2), Type::U32);
  if (detail.is_load) detail.barrier = Pointer::decode(d, d.arg(3));
  if (detail.multicast) detail.mask = d.src(d.arg(4), Type::B16);
  if (!(detail.is_load ? detail.from : detail.to).is_64) d.refuse("a global address of 32 bits");
  d.inst.counted = Class::Bulk;
  d.inst.run = &run_bulk;
}

// ---- groups of stores

void run_commit(Warp& w, const Inst&, Mask lanes) {
  each_lane(lanes, [&](int lane) { ++w.bulk_groups[lane]; });
}

void run_wait(Warp& w, const Inst& inst, Mask lanes) { finish_bulk_stores(w, lanes, static_cast<uint32_t>(inst.imm)); }

void decode_commit(Decoder& d) {
  d.need_args(0, 0);
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_commit;
}

// With .read only the reading has to be done; here both are done at once.
void decode_wait(Decoder& d) {
  d.take("read");
  d.need_args(1, 1);
  d.inst.imm = static_cast<int64_t>(d.integer(d.arg(0)));
  d.inst.counted = Class::Barrier;
  d.inst.run = &run_wait;
}

void do_nothing(Warp&, const Inst&, Mask) {}

void decode_prefetch(Decoder& d) {
  d.take_one({"L2"});
  d.take_one({"global"});
  d.take("L2::cache_hint");
  d.inst.run = &do_nothing;
}

// ---- other blocks of the cluster

template <class T>
T other_address(T address, uint32_t rank) {
  const T window = static_cast<T>(uint64_t{address} / kWindow * kWindow);  // of a generic address
  const T offset = static_cast<T>((address - window) & ((T{1} << kClusterShift) - 1));
  return static_cast<T>(window + (static_cast<T>(rank + 1) << kClusterShift) + offset);
}

void decode_mapa(Decoder& d) {
  d.take("shared::cluster");
  const Type type = d.take_type();
  d.need_args(3, 3);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), Type::U32);
  d.inst.counted = Class::Int;
  d.inst.run = bits_of(type) == 64 ? &Lanewise<&other_address<uint64_t>>::run : &Lanewise<&other_address<uint32_t>>::run;
}

// The rank of the block whose shared memory an address is in; the block's own addresses carry none.
template <class T>
void run_getctarank(Warp& w, const Inst& inst, Mask lanes) {
  const T* address = w.row<T>(inst.o[1]);
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  each_lane(lanes, [&](int lane) {
    const auto rank = static_cast<uint32_t>(uint64_t{address[lane]} % kWindow >> kClusterShift);
    d[lane] = rank == 0 ? w.block->rank : rank - 1;
  });
  w.flow(inst.o[0], lanes, inst, inst.o[1]);
}

void decode_getctarank(Decoder& d) {
  d.take("shared::cluster");
  const Type type = d.take_type();
  d.need_args(2, 2);
  d.inst.o[0] = d.dst(d.arg(0), Type::U32);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.run = bits_of(type) == 64 ? &run_getctarank<uint64_t> : &run_getctarank<uint32_t>;
}

}  // namespace

const std::vector<Opcode> kBulkOpcodes = {
    {"cp.async.bulk", [](Decoder& d) { decode_bulk(d, false); }},
    {"cp.reduce.async.bulk", [](Decoder& d) { decode_bulk(d, true); }},
    {"cp.async.bulk.prefetch", decode_prefetch},
    {"cp.async.bulk.commit_group", decode_commit},
    {"cp.async.bulk.wait_group", decode_wait},
    {"mapa", decode_mapa},
    {"getctarank", decode_getctarank},
};

}  // namespace ptxemu
