// What the kernels of attention over a cache are told, and sizes that they share with who starts
// them.
#pragma once
#include "attention_params.h"

namespace pyfuse::cuda {

/// The cache is k [B, Hk, N, d] and v [B, Hk, N, dv], or with a table in pages: [pages, Hk,
/// page_size, ...], key j of sequence b in page table[b][j / page_size]. `lengths` is given, and
/// the last query stands on the last key of its sequence. q·k needs nothing but the scale where
/// `fold`.
struct AttentionDecode : AttentionCall {
  void* o;     // [B, Hq, M, dv]
  float* lse;  // [B, Hq, M] without gaps; null: not wanted
  int64_t o_stride[3];
  bool fold;

  Integers table;  // null: the cache is in one piece
  int64_t table_stride[2];
  int32_t page_size, page_bits;  // page_bits: of a page size that is a power of 2, else -1

  const void *k_new, *v_new;  // [B, Hk, M, ...]: keys length - M ... length - 1; null: none
  int64_t k_new_stride[3], v_new_stride[3];

  // The sums of each row and split where there are several: o [B Hq M, splits, dv rounded up to
  // 4], the maxima [B Hq M, splits] in units of log 2, the sums of weights likewise.
  float* partial;
  int32_t splits;
};

/// A share of the keys starts at a multiple of SHARE_UNIT and has LEAST_SHARE or more: what it
/// leaves of each row is small beside them.
constexpr int SHARE_UNIT = 64, LEAST_SHARE = 128;

/// How a block of decoding holds keys and values: each warp 16 at a time, in a ring of its own of
/// `slots` tiles, keys and values in turn. 16 KiB of each warp are under way where that is two
/// tiles or more, so that 4 to 12 warps of a multiprocessor have what memory needs to be busy.
struct DecodeRing {
  int slot, slots, warps;

  constexpr DecodeRing(int element, int d)
      : slot(16 * d * element), slots(2), warps(slot > 8192 ? 2 : 4) {
    while (slots < 8 && (slots + 2) * slot <= 16384) slots += 2;
  }
  constexpr int warp_bytes() const { return slots * slot; }
  /// Of shared memory: the rings, a tile of queries, maximum and sum of each row and warp.
  constexpr int bytes(int rows) const {
    return warps * warp_bytes() + rows / 16 * slot + warps * rows * 8;
  }
};

}  // namespace pyfuse::cuda
