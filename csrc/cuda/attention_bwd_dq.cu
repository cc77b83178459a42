// dq of attention's backward on mma.sync, for sm_80 and later.   (Dao, arXiv:2307.08691, §3)
//
//   dq[m] = factor sum_n ds[m, n] k[n];   ds: attention_gradient.cuh
//
// A block owns BLOCK_M queries of one head and folds the keys into their sums, tile by tile, in the
// order of attention_fwd.cu. K and V have one buffer each: while do is multiplied with V, K is on
// its way, and while ds weighs K, the next V.
//
// The same loop without the last product gives the terms of each row from lse: more exactly than
// attention_bwd_terms.cu does from o, whose rounding they do not have.
//
// Compiled once for each ELEMENT (f32, bf16, f16) and HEAD_SIZE, the largest that D and Dv may
// have: columns beyond them are zeros.
#include "attention_query_gradient.cuh"
#include "attention_tiles.h"

namespace pyfuse::cuda {
namespace {

constexpr QueryGradientTiles TILES(sizeof(ELEMENT), HEAD_SIZE, true);
constexpr QueryGradientTiles FEWER(sizeof(ELEMENT), HEAD_SIZE, false);
constexpr int THREADS = TILES.threads();

template <int MT, class Policy, Gives GIVES>
DEVICE void run(const AttentionGradient& p) {
  extern __shared__ __align__(1024) char shared[];
  QueryGradients<ELEMENT, HEAD_SIZE, MT, TILES.warps, TILES.block_n, Policy, GIVES>(p, shared)
      .run();
}

}  // namespace

/// Aligned rows and nothing between product and softmax but a scale. Grid: blocks of queries,
/// heads.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dq(const __grid_constant__ AttentionGradient p) {
  run<TILES.parts, PlainPairs, Gives::dq>(p);
}

/// Everything else; 16 queries to a warp.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dq_options(const __grid_constant__ AttentionGradient p) {
  run<FEWER.parts, OptionPairs, Gives::dq>(p);
}

/// lse2, rest and delta, with any options; 16 queries to a warp.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    terms(const __grid_constant__ AttentionGradient p) {
  run<FEWER.parts, OptionPairs, Gives::terms>(p);
}

}  // namespace pyfuse::cuda
