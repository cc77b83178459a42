// Bulk copies: the copy engine moves bytes between global and shared memory (PTX ISA,
// "cp.async.bulk", "cp.reduce.async.bulk"), and the addresses of other blocks of a cluster (mapa).
#include <algorithm>

#include "../memory.h"
#include "async.h"
#include "pick.h"

namespace ptxemu {
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
      return w.report(Kind::Misaligned, inst, 1u << lane,
                      "bulk copies are of multiples of 16 bytes, at such addresses");
    if (bytes == 0) return;
    const Location shared =
        locate(w, inst, lane, Space::SharedCluster,
               (detail.is_load ? detail.to : detail.from).at(w, lane), bytes, 16, detail.is_load);
    BulkPiece piece;
    piece.shared = shared.offset;
    piece.bytes = piece.last = bytes;
    piece.global = global_range(w, inst, lane, global, bytes, !detail.is_load);
    if (shared.host == nullptr || piece.global == nullptr) return;
    if (!detail.is_load)
      return start_bulk_store(w, inst, lane, shared, {piece}, detail.reduce, detail.type);
    const Location barrier =
        locate(w, inst, lane, Space::SharedCluster, detail.barrier.at(w, lane), 8, 8, true);
    if (barrier.host == nullptr) return;
    const uint16_t* mask = detail.multicast ? w.row<uint16_t>(detail.mask) + lane : nullptr;
    start_bulk_load(w, inst, lane, copy_targets(w, inst, lane, shared, barrier, mask), {piece},
                    barrier.offset);
  });
}

// .shared::cluster.global.mbarrier [to], [from], bytes, [mbarrier] {, mask} {, policy};
// .global.shared::cta.bulk_group [to], [from], bytes {, policy}
void decode_bulk(Decoder& d, bool reduces) {
  auto& detail = d.detail<BulkDetail>();
  detail.is_load = d.take("mbarrier::complete_tx::bytes");
  if (!detail.is_load) d.take_one({"bulk_group"});
  d.take_one({"global"});
  const bool to_cluster = d.take_one({"shared::cta", "shared::cluster"}) == 1;
  if (to_cluster && !detail.is_load) d.refuse("copies from the block's own shared memory only");
  detail.multicast = detail.is_load && d.take("multicast::cluster");
  const bool hint = d.take("L2::cache_hint");
  if (reduces) {
    detail.reduce = take_reduction(d);
    detail.type = d.take_type();
    const bool rounds = detail.type == Type::F16 || detail.type == Type::BF16;
    if (detail.is_load || !can_reduce(detail.reduce, detail.type))
      d.refuse("this reduction is not supported");
    if (detail.reduce == BulkReduce::Add && rounds) d.take_one({"noftz"});
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

void run_wait(Warp& w, const Inst& inst, Mask lanes) {
  finish_bulk_stores(w, lanes, static_cast<uint32_t>(inst.imm));
}

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

template <class T>
void run_mapa(Warp& w, const Inst& inst, Mask lanes) {
  const uint32_t* ranks = w.row<uint32_t>(inst.o[2]);
  w.require_defined(inst.o[2], lanes, inst, "the rank of a block");
  each_lane(lanes, [&](int lane) {
    if (ranks[lane] >= w.block->cluster->blocks.size())
      w.report(Kind::Invalid, inst, 1u << lane,
               "block " + std::to_string(ranks[lane]) + " of a cluster of " +
                   std::to_string(w.block->cluster->blocks.size()));
  });
  Lanewise<&other_address<T>>::run(w, inst, lanes);
}

void decode_mapa(Decoder& d) {
  d.take("shared::cluster");
  const Type type = d.take_type();
  if (type != Type::U32 && type != Type::U64) d.refuse("needs .u32 or .u64");
  d.need_args(3, 3);
  d.inst.o[0] = d.dst(d.arg(0), type);
  d.inst.o[1] = d.src(d.arg(1), type);
  d.inst.o[2] = d.src(d.arg(2), Type::U32);
  d.inst.counted = Class::Int;
  d.inst.run = bits_of(type) == 64 ? &run_mapa<uint64_t> : &run_mapa<uint32_t>;
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
  if (type != Type::U32 && type != Type::U64) d.refuse("needs .u32 or .u64");
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
