// Which rows a block of threads works on: of one head of a batch, or of one packed sequence.
#pragma once

#include "attention_tiles.h"
#include "mask.cuh"

namespace pyfuse::cuda {

/// Sequence b of a batch or of a packed one; `block` counts its blocks of rows.
struct Place {
  int b, block;
  int64_t batch;      // 0 where sequences are packed: their tensors have no batch
  int64_t row;        // the first row of its queries (of its keys, where `rows` are keys) in memory
  int64_t other;      // the first row of the other of the two
  int count, others;  // how many rows each of the two has
  bool nothing = false;  // beyond the last block
};

/// The sequence of a packed batch whose blocks of `rows` program `index` falls into, when each
/// takes as many as its rows need. Rows before the first sequence and after the last count as
/// sequences -1 and B that see nothing. All lanes of a warp work on it together.
template <int BLOCK>
DEVICE Place packed_place(const Integers& rows, const Integers& others, int B, int total,
                          int index) {
  const int lane = threadIdx.x % 32;
  Place place{};
  for (int first = 0; first < B + 2; first += 32) {
    const int i = first + lane;
    const int64_t low = i > 0 && i < B + 2 ? element(rows, i - 1) : 0;
    const int64_t high = i < B + 1 ? element(rows, i) : total;
    const int count = i < B + 2 ? static_cast<int>(high - low) : 0;
    const int blocks = (count + BLOCK - 1) / BLOCK;
    int before = blocks;  // those of all lanes up to this one
    for (int step = 1; step < 32; step *= 2) {
      const int x = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += x;
    }
    const uint32_t later = __ballot_sync(~0u, before > index);
    if (later == 0) {
      index -= __shfl_sync(~0u, before, 31);
      continue;
    }
    const int found = __ffs(later) - 1;
    place.block = index - __shfl_sync(~0u, before - blocks, found);
    place.row = __shfl_sync(~0u, low, found);
    place.count = __shfl_sync(~0u, count, found);
    place.b = first + found - 1;
    if (place.b >= 0 && place.b < B) {
      place.other = element(others, place.b);
      place.others = static_cast<int>(element(others, place.b + 1) - place.other);
    }
    return place;
  }
  place.nothing = true;
  return place;
}

/// What this block of threads works on: `index` counts blocks of BLOCK rows of all sequences.
template <int BLOCK>
DEVICE Place place_of(const AttentionCall& p, bool by_keys, int index, int blocks_per_sequence) {
  const Integers &q = p.cu_q, &k = p.cu_k;
  if (q.data != nullptr)
    return by_keys ? packed_place<BLOCK>(k, q, p.batch, p.N, index)
                   : packed_place<BLOCK>(q, k, p.batch, p.M, index);
  Place place{};
  place.b = index / blocks_per_sequence;
  place.block = index % blocks_per_sequence;
  place.batch = place.b;
  place.count = by_keys ? p.N : p.M;
  place.others = by_keys ? p.M : p.N;
  return place;
}

/// The keys that sequence b's queries see.
DEVICE Band band_of(const AttentionCall& p, int b, int M, int N) {
  int end = N;
  if (p.lengths.data != nullptr)
    end = static_cast<int>(max(int64_t(0), min(int64_t(N), element(p.lengths, b))));
  return {M, N, end, p.left, p.right};
}

/// What all threads of a block know, in shared memory: registers are for sums.
struct Work {
  Place place;
  Band band;
  KeyTiles tiles;  // of keys that its queries see, or of queries that see its keys
  int m0;          // its first row

  template <int BLOCK_M, int BLOCK_N>
  static DEVICE const Work& of(const AttentionCall& p, Work* shared) {
    const int blocks = (p.M + BLOCK_M - 1) / BLOCK_M;
    // Where causal, the blocks that see most keys first.
    const int x = static_cast<int>(blockIdx.x);
    const int index = p.cu_q.data != nullptr ? x : x / blocks * blocks + (blocks - 1 - x % blocks);
    const Place place = place_of<BLOCK_M>(p, false, index, blocks);
    if (threadIdx.x == 0) {
      shared->place = place;
      shared->m0 = place.block * BLOCK_M;
      shared->band = band_of(p, place.b, place.count, place.others);
      shared->tiles = KeyTiles::of<BLOCK_N>(shared->band, shared->m0, BLOCK_M, p.mask != nullptr);
    }
    __syncthreads();
    return *shared;
  }
};
static_assert(sizeof(Work) <= WORK_BYTES);

/// Row `row` of head (batch, h).
template <typename T>
DEVICE const char* row_of(const void* x, const int64_t (&stride)[3], int64_t batch, int h,
                          int64_t row) {
  return static_cast<const char*>(x) +
         (batch * stride[0] + h * stride[1] + row * stride[2]) * int64_t(sizeof(T));
}

}  // namespace pyfuse::cuda
