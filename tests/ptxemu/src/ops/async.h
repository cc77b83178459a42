// What the asynchronous instructions share: copies of threads, of the copy engine, and barriers in
// shared memory.
#pragma once

#include <functional>
#include <vector>

#include "../access.h"
#include "../decoder.h"

namespace ptxemu {

/// Writes the bytes of a cp.async and gives them to the thread that issued it, as of this time of
/// its warp.
void finish_copy(Warp& w, const AsyncCopy& copy, uint32_t clock);
/// Those of the lanes' groups but the last `groups_left` that they committed.
void finish_copies(Warp& w, Mask lanes, uint32_t groups_left);
/// All of the lanes, committed or not.
void finish_all_copies(Warp& w, Mask lanes);

/// What the asynchronous proxy (wgmma, bulk copies) may not yet see: bytes that ordinary stores
/// wrote with no fence.proxy.async after, by the writer or by the warp that reads.
HazardInfo proxy_hazard(const Warp& w, const SharedMemory& shared, uint64_t at);

/// An address among several of one instruction.
struct Pointer {
  Operand base;
  uint64_t offset = 0;
  bool is_64 = true;

  /// From [register + offset].
  static Pointer decode(Decoder& d, const Arg& a) {
    Pointer p;
    p.base = d.address(a);
    p.offset = static_cast<uint64_t>(d.inst.imm);
    p.is_64 = d.inst.address_is_64;
    return p;
  }
  uint64_t at(Warp& w, int lane) const {
    return is_64 ? w.row<uint64_t>(base)[lane] + offset
                 : uint32_t(w.row<uint32_t>(base)[lane] + static_cast<uint32_t>(offset));
  }
};

/// No warp of the block runs any more: its shared memory is gone.
bool has_exited(const Block& block);

// ---- mbarrier

/// The barrier at a shared address; null, reported, if there is none or the warp can't know of it
/// yet.
MemoryBarrier* find_barrier(Warp& w, const Inst& inst, int lane, const Location& location);
/// Counts bytes that arrived, and completes the phase if nothing is left to wait for.
void complete_bytes(Block& block, const Inst& inst, uint64_t barrier, uint64_t bytes);

// ---- copies by the copy engine

/// Bytes that are contiguous in both memories. Of a tensor's box only [first, last) may be inside
/// of the tensor.
struct BulkPiece {
  uint64_t shared = 0, bytes = 0;
  uint64_t first = 0, last = 0;
  uint8_t* global = nullptr;  // of byte `first`
  uint32_t fill = 0;          // every 32 bits of what is outside
};

enum class BulkReduce : uint8_t { Add, Min, Max, Inc, Dec, And, Or, Xor, None };
BulkReduce take_reduction(Decoder& d);  // refuses if there is none
/// Whether the copy engine has this reduction of this type in global memory.
bool can_reduce(BulkReduce op, Type type);

/// What the targets of a copy into shared memory are: a barrier beside the data, or with a mask of
/// blocks (multicast) the same place in each of these. Reports, and gives none, where a block has
/// no such barrier.
std::vector<Block*> copy_targets(Warp& w, const Inst& inst, int lane, const Location& data,
                                 const Location& barrier, const uint16_t* mask);
/// The host's bytes of a global range, checked; undefined ones are reported, or defined where it is
/// written.
uint8_t* global_range(Warp& w, const Inst& inst, int lane, uint64_t address, uint64_t bytes,
                      bool is_write);

/// Starts a copy into the shared memory of each of `blocks`, whose mbarrier at the same place is
/// told the bytes.
void start_bulk_load(Warp& w, const Inst& inst, int lane, const std::vector<Block*>& blocks,
                     const std::vector<BulkPiece>& pieces, uint64_t barrier);
/// Starts a copy, or a reduction, from the block's own memory to global memory. It belongs to the
/// bulk group that the thread commits next.
void start_bulk_store(Warp& w, const Inst& inst, int lane, const Location& from,
                      const std::vector<BulkPiece>& pieces, BulkReduce reduce, Type type);
/// Finishes the stores of the lanes' groups but the last `groups_left` that they committed.
void finish_bulk_stores(Warp& w, Mask lanes, uint32_t groups_left);
/// Old value and operand to new value, as the atomic instructions do it.
uint64_t reduce_element(BulkReduce op, Type type, uint64_t old, uint64_t value);

}  // namespace ptxemu
