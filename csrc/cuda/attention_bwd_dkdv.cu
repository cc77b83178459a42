// dk and dv of attention's backward on mma.sync, for sm_80 and later.   (Dao, arXiv:2307.08691, §3)
//
//   dv[n] = sum_m p[m, n] do[m];   dk[n] = factor sum_m ds[m, n] q[m];   p, ds:
//   attention_gradient.cuh
//
// A block owns keys of one head: over all query heads of its group and all queries that see them.
// Scores are computed as [keys, queries], which leaves p and ds in registers as the left operands
// of the two sums. K and V stay in shared memory; tiles of queries and of do stream by, the next of
// them on its way while one is worked on. Nothing is added up by two blocks: no atomics, the same
// bits in every run.
//
// Compiled once for each ELEMENT (f32, bf16, f16) and HEAD_SIZE, the largest that D and Dv may
// have: columns beyond them are zeros.
#include "attention_gradient.cuh"
#include "attention_tiles.h"
#include "product.cuh"

namespace pyfuse::cuda {
namespace {

/// KEY_WARPS warps have 16 MT keys each; SPLIT times as many share a head's columns of dk and dv,
/// where registers hold no more.
template <typename T, int D, int MT, int KEY_WARPS, int SPLIT, int BLOCK_M, int STAGES,
          class Policy>
struct KeyGradients {
  static constexpr int WARPS = KEY_WARPS * SPLIT, THREADS = 32 * WARPS;
  static constexpr int WARP_N = 16 * MT, BLOCK_N = WARP_N * KEY_WARPS;
  static constexpr int PARTS = BLOCK_M / 8, OUT = D / 8 / SPLIT;
  using Keys = Tile<T, D, BLOCK_N>;
  using Queries = Tile<T, D, BLOCK_M>;
  using Copy = Copier<Queries, THREADS>;
  static constexpr int STEPS = D * sizeof(T) / 32;
  // Where they start in shared memory. A stage: queries, do, and three terms of each row.
  static constexpr int KEYS = 0, VALUES = Keys::BYTES, QUERIES = 2 * Keys::BYTES;
  static constexpr int GRADS = Queries::BYTES, STAGE = 2 * Queries::BYTES;
  static constexpr int TERMS = QUERIES + STAGES * STAGE, STAGE_TERMS = 3 * BLOCK_M * 4;
  static constexpr int WORK = TERMS + STAGES * STAGE_TERMS;
  static_assert(SPLIT == 1 || Keys::PANELS % SPLIT == 0);

  const AttentionGradient& p;
  char* const shared;
  const Work& work;
  const uint32_t base;
  const uint32_t lane, row_lane, own_lane;  // lane_address, _of_rows, and of this warp's keys
  const int key_warp, columns;              // and where in a row this warp's part of dk starts
  float dk[MT][OUT][4] = {}, dv[MT][OUT][4] = {};

  DEVICE KeyGradients(const AttentionGradient& p, char* shared)
      : p(p),
        shared(shared),
        work(*reinterpret_cast<const Work*>(shared + WORK)),
        base(shared_address(shared)),
        lane(lane_address<Keys>(base)),
        row_lane(lane_address_of_rows<Keys>(base)),
        own_lane(lane + threadIdx.x / 32 % KEY_WARPS * WARP_N * Keys::ROW),
        key_warp(threadIdx.x / 32 % KEY_WARPS),
        columns(threadIdx.x / 32 / KEY_WARPS * (Keys::PANELS / SPLIT)) {}

  /// Find this block's work; false if there is none.
  DEVICE bool begin() const {
    const Place place = place_of<BLOCK_N>(p, true, blockIdx.x, (p.N + BLOCK_N - 1) / BLOCK_N);
    const int n0 = place.block * BLOCK_N;
    if (place.nothing || n0 >= place.count) return false;
    if (threadIdx.x == 0) {
      const Band band = band_of(p, place.b, place.others, place.count);
      *reinterpret_cast<Work*>(shared + WORK) = {
          place, band, query_tiles<BLOCK_M>(band, n0, BLOCK_N, p.mask != nullptr), n0};
    }
    __syncthreads();
    return true;
  }

  /// Start copying `ROWS` rows at `from` into a tile.
  template <class Tile, int ROWS, bool EDGE>
  DEVICE void load(int tile, const char* from, int64_t stride, int d, int inside) const {
    load_rows<T, Tile, ROWS, THREADS, EDGE>(shared, tile, from, stride, d, inside,
                                            Policy::FOLD || p.aligned);
  }

  DEVICE void load_keys() {
    const Place& place = work.place;
    const int n0 = place.block * BLOCK_N, h = blockIdx.y, inside = work.band.end - n0;
    load<Keys, BLOCK_N, true>(KEYS, row_of<T>(p.k, p.k_stride, place.batch, h, place.row + n0),
                              p.k_stride[2], p.d, inside);
    load<Keys, BLOCK_N, true>(VALUES, row_of<T>(p.v, p.v_stride, place.batch, h, place.row + n0),
                              p.v_stride[2], p.dv, inside);
    if (p.d < D) clear_padding(KEYS, QUERIES, p.d);
    if (p.dv < D) clear_padding(VALUES, QUERIES + GRADS, p.dv);
  }

  DEVICE void clear_padding(int keys, int queries, int d) {
    Copier<Keys, THREADS>::template clear_padding<BLOCK_N>(shared + keys, d);
    for (int i = 0; i < STAGES; ++i)
      Copy::template clear_padding<BLOCK_M>(shared + queries + i * STAGE, d);
  }

  /// Start copying the queries from m0 on of one of the group's heads, and what belongs to them.
  template <bool EDGE>
  DEVICE void load_queries(int stage, int head, int m0) const {
    const Place& place = work.place;
    const int q_head = blockIdx.y * p.group + head, inside = work.band.M - m0;
    const int64_t row = place.other + m0;
    const int to = QUERIES + stage * STAGE;
    load<Queries, BLOCK_M, EDGE>(to, row_of<T>(p.q, p.q_stride, place.batch, q_head, row),
                                 p.q_stride[2], p.d, inside);
    load<Queries, BLOCK_M, EDGE>(to + GRADS,
                                 row_of<T>(p.d_o, p.do_stride, place.batch, q_head, row),
                                 p.do_stride[2], p.dv, inside);
    const int64_t first = place.batch * p.terms.stride[0] + q_head * p.terms.stride[1] + row;
    const int i = threadIdx.x % BLOCK_M;
    const bool there = !EDGE || i < inside;
    for (int term = threadIdx.x / BLOCK_M; term < 3; term += THREADS / BLOCK_M) {
      const float* from = term == 0 ? p.terms.lse2 : term == 1 ? p.terms.delta : p.terms.rest;
      const bool any = there && from != nullptr;
      if (sizeof(T) == 2 && Policy::FOLD && term == 2) break;
      cp_async4_or_zero(base + TERMS + stage * STAGE_TERMS + (term * BLOCK_M + i) * 4,
                        (any ? from : p.terms.lse2) + (any ? first + i : 0), any);
    }
    cp_async_commit();
  }

  /// Add what the tile of queries in this stage gives. EDGE and edge: some query does not see some
  /// key.
  template <bool EDGE>
  DEVICE void step(int stage, int head, int m0, bool edge) {
    const int at = stage * STAGE;
    float s[MT][PARTS][4] = {}, dp[MT][PARTS][4] = {};
    multiply(s, KEYS, row_lane + at, QUERIES);
    multiply(dp, VALUES, row_lane + at, QUERIES + GRADS);
    const auto terms = [&](int part) { return terms_of(stage, part); };
    const int n0 = work.place.block * BLOCK_N;
    const int n = n0 + key_warp * WARP_N + threadIdx.x % 32 / 4;
    const Pairs<true> pairs{n, m0 + static_cast<int>(threadIdx.x % 4 * 2)};
    Policy(p, work.band, work.place.b, blockIdx.y * p.group + head)
        .template gradients<true, EDGE, sizeof(T) == 4>(s, dp, p, pairs, terms, edge, 0, n0,
                                                        Nothing());
    weigh(dv, s, at, QUERIES + GRADS);
    weigh(dk, dp, at, QUERIES);
  }

  /// c += a bᵀ with this warp's rows of one of the tiles of keys.
  DEVICE void multiply(float (&c)[MT][PARTS][4], int keys, uint32_t rows, int queries) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      Operand<T> a[MT];
#pragma unroll
      for (int i = 0; i < MT; ++i)
        a[i] = left_operand<T, Keys>(own_lane, keys + i * 16 * Keys::ROW, step);
      multiply_rows<T, Queries>(c, a, rows, queries, step);
    }
  }

  DEVICE void weigh(float (&c)[MT][OUT][4], const float (&a)[MT][PARTS][4], int at,
                    int tile) const {
    const uint32_t first = at + columns * Queries::PANEL;
    if constexpr (sizeof(T) == 4) {
      multiply_columns_f32<Queries>(c, a, base + first, tile, AllRows());
    } else {
      multiply_columns<T, Queries>(c, a, lane + first, tile, AllRows());
    }
  }

  struct OfColumns {
    Terms terms[2];
    DEVICE const Terms& operator()(int, int j) const { return terms[j % 2]; }
  };

  DEVICE OfColumns terms_of(int stage, int part) const {
    const auto* from = reinterpret_cast<const float2*>(shared + TERMS + stage * STAGE_TERMS) +
                       part * 4 + threadIdx.x % 4;
    const float2 lse2 = from[0], delta = from[BLOCK_M / 2];
    float2 rest = {};
    if (sizeof(T) == 4 || !Policy::FOLD) rest = from[BLOCK_M];
    return {{{lse2.x, rest.x, delta.x}, {lse2.y, rest.y, delta.y}}};
  }

  /// One tile of one head, counted through all heads.
  struct At {
    int head, tile;
    DEVICE void next(int tiles) {
      if (++tile < tiles) return;
      tile = 0, ++head;
    }
  };

  /// All tiles of one kind, the first of which is on its way; `then` loads what comes after them.
  template <bool EDGE, class Then>
  DEVICE void fold(int first, int count, int& stage, const Then& then) {
    const KeyTiles& tiles = work.tiles;
    const auto start = [&](const At& at) { return tiles.start<BLOCK_M>(first + at.tile); };
    At at{0, 0};
    for (int left = count * p.group; left > 0; --left) {
      At next = at;
      next.next(count);
      const auto load_next = [&](int to) {
        if (left > 1) {
          load_queries<EDGE>(to, next.head, start(next));
        } else {
          then(to);
        }
      };
      cp_async_wait<0>();
      __syncthreads();  // the tile is there for all, and nobody reads the one before
      if constexpr (STAGES > 1) load_next(stage ^ 1);
      step<EDGE>(stage, at.head, start(at), first + at.tile < tiles.edges);
      if constexpr (STAGES == 1) {
        __syncthreads();
        load_next(0);
      } else {
        stage ^= 1;
      }
      at = next;
    }
  }

  DEVICE void run() {
    if (!begin()) return;
    const KeyTiles& tiles = work.tiles;
    if (tiles.tiles > 0) {
      load_keys();
      const int edges = tiles.edges, inside = tiles.tiles - edges;
      load_queries<true>(0, 0, tiles.start<BLOCK_M>(0));
      int stage = 0;
      if constexpr (Policy::FOLD) {
        fold<true>(0, edges, stage, [&](int to) {
          if (inside > 0) load_queries<false>(to, 0, tiles.start<BLOCK_M>(edges));
        });
        fold<false>(edges, inside, stage, [](int) {});
      } else {
        fold<true>(0, tiles.tiles, stage, [](int) {});
      }
      __syncthreads();
    }
    store(KEYS, dk, p.factor, p.d_k, p.dk_stride, p.d);
    store(VALUES, dv, 1.0f, p.d_v, p.dv_stride, p.dv);
  }

  /// Write one of the two by way of the tile of its keys.
  DEVICE void store(int tile, float (&c)[MT][OUT][4], float factor, void* to,
                    const int64_t (&stride)[3], int d) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int part = 0; part < OUT; ++part) {
        for (int j = 0; j < 4; ++j) c[i][part][j] *= factor;
      }
      store_product<T, Keys>(shared + tile + columns * Keys::PANEL, key_warp * WARP_N + 16 * i,
                             c[i]);
    }
    __syncthreads();
    const Place& place = work.place;
    const int n0 = place.block * BLOCK_N, h = blockIdx.y;
    constexpr int ROWS = BLOCK_N / WARPS;
    const int row0 = threadIdx.x / 32 * ROWS;
    T* rows = static_cast<T*>(to) + place.batch * stride[0] + h * stride[1] +
              (place.row + n0 + row0) * stride[2];
    write_rows<T, Keys>(shared + tile, row0, ROWS, rows, stride[2], d,
                        min(ROWS, place.count - n0 - row0), Policy::FOLD || p.aligned);
  }
};

constexpr KeyGradientTiles TILES(sizeof(ELEMENT), HEAD_SIZE, true);
constexpr KeyGradientTiles FEWER(sizeof(ELEMENT), HEAD_SIZE, false);
constexpr int THREADS = TILES.threads();

template <int MT, class Policy>
DEVICE void run(const AttentionGradient& p) {
  extern __shared__ __align__(1024) char shared[];
  KeyGradients<ELEMENT, HEAD_SIZE, MT, TILES.key_warps, TILES.split, TILES.block_m, TILES.stages,
               Policy>(p, shared)
      .run();
}

}  // namespace

/// Aligned rows and nothing between product and softmax but a scale. Grid: blocks of keys, heads of
/// keys.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dkdv(const __grid_constant__ AttentionGradient p) {
  run<TILES.parts, PlainPairs>(p);
}

/// Everything else; 16 keys to a warp.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dkdv_options(const __grid_constant__ AttentionGradient p) {
  run<FEWER.parts, OptionPairs>(p);
}

}  // namespace pyfuse::cuda
