// FlashAttention forward on mma.sync, for sm_80 and later.   (Dao, arXiv:2307.08691)
//
//   o[m] = sum_n softmax_n(s[m, n]) v[n],   lse[m] = ln sum_n exp(s[m, n]),   s as in mask.cuh
//
// A block of four warps owns BLOCK_M queries of one head and folds the keys into them, tile by
// tile. K and V have one buffer each: while scores are made of K, V is on its way, and while V is
// weighed, the next K. Tiles at the edges of what the queries see come first and carry masks; the
// loop over all others has none.
//
// Compiled once for each ELEMENT (f32, bf16, f16) and HEAD_SIZE, the largest that D and Dv may
// have: columns beyond them are zeros.
#include "product.cuh"
#include "sequence.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;

/// MT times 16 rows a warp: two of them share each operand that is read of K and V, as long as o
/// (32 MT D / 64 registers) leaves room.
template <typename T, int D, int MT, int BLOCK_N, class Policy>
struct Forward {
  static constexpr int WARP_M = 16 * MT;
  static constexpr int BLOCK_M = WARP_M * WARPS;
  static constexpr int PARTS = BLOCK_N / 8, OUT = D / 8;
  using Queries = Tile<T, D, BLOCK_M>;
  using Keys = Tile<T, D, BLOCK_N>;
  using Copy = Copier<Keys, THREADS>;
  static constexpr int STEPS = D * sizeof(T) / 32;
  // Of larger heads the queries are read again for every tile: registers are too few to keep them.
  static constexpr bool KEEP_QUERIES = sizeof(T) == 2 && MT * D <= 128;

  const AttentionForward& p;
  static constexpr int KEYS = Queries::BYTES, VALUES = KEYS + Keys::BYTES;  // where they start
  char* const shared;
  const uint32_t lane, row_lane, own_lane;  // lane_address, _of_rows, and of this warp's queries
  int h, m0, m;                             // m: this lane's first row
  Place place;
  Band band;
  const char *k, *v;     // this thread's part of the first key and value
  int64_t k_row, v_row;  // bytes between rows

  float o[MT][OUT][4] = {};
  Softmax<MT> softmax;
  Operand<T> kept_queries[KEEP_QUERIES ? STEPS : 1][MT];

  DEVICE Forward(const AttentionForward& p, char* shared)
      : p(p),
        shared(shared),
        lane(lane_address<Keys>(shared_address(shared))),
        row_lane(lane_address_of_rows<Keys>(shared_address(shared))),
        own_lane(lane + threadIdx.x / 32 * WARP_M * Queries::ROW) {
    const int blocks = (p.M + BLOCK_M - 1) / BLOCK_M;
    // Where causal, the blocks that see most keys first.
    const int x = static_cast<int>(blockIdx.x);
    const int index = p.cu_q.data != nullptr ? x : x / blocks * blocks + (blocks - 1 - x % blocks);
    place = place_of<BLOCK_M>(p, false, index, blocks);
    h = blockIdx.y;
    m0 = place.block * BLOCK_M;
    m = m0 + threadIdx.x / 32 * WARP_M + threadIdx.x % 32 / 4;
    band = band_of(p, place.b, place.count, place.others);
    k_row = p.k_stride[2] * int64_t(sizeof(T)), v_row = p.v_stride[2] * int64_t(sizeof(T));
    k = Copy::part(row_of<T>(p.k, p.k_stride, place.batch, h / p.group, place.other), k_row);
    v = Copy::part(row_of<T>(p.v, p.v_stride, place.batch, h / p.group, place.other), v_row);
  }

  /// Start copying rows of K or V, at this thread's part of key n's on, into their tile.
  template <bool EDGE>
  DEVICE void load(int tile, const char* from, int64_t row, int d, int n) const {
    if (Policy::FOLD || p.aligned) {
      Copy::template start<BLOCK_N, EDGE>(shared_address(shared) + tile, from, row, d * sizeof(T),
                                          band.end - n);
    } else {
      Copy::template copy<T, BLOCK_N>(shared + tile, from, row, d, band.end - n);
    }
    cp_async_commit();
  }

  DEVICE void load_queries() {
    const char* q = row_of<T>(p.q, p.q_stride, place.batch, h, place.row + m0);
    const int64_t row = p.q_stride[2] * int64_t(sizeof(T));
    using Copy = Copier<Queries, THREADS>;
    const int inside = place.count - m0;
    if (Policy::FOLD || p.aligned) {
      Copy::template start<BLOCK_M, true>(shared_address(shared), Copy::part(q, row), row,
                                          p.d * sizeof(T), inside);
    } else {
      Copy::template copy<T, BLOCK_M>(shared, Copy::part(q, row), row, p.d, inside);
    }
    if (p.d < D) {
      Copy::template clear_padding<T, BLOCK_M>(shared, p.d);
      Forward::Copy::template clear_padding<T, BLOCK_N>(shared + KEYS, p.d);
    }
    if (p.dv < D) Forward::Copy::template clear_padding<T, BLOCK_N>(shared + VALUES, p.dv);
  }

  /// Fold the tile of keys at n into the sums. v_tile: this thread's part of its values; k_next: of
  /// the keys of the tile after it, at n_next, or null after the last. EDGE: some query does not
  /// see some key of this one.
  template <bool EDGE>
  DEVICE void step(int n, const char* v_tile, const char* k_next, int n_next) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there for all, and nobody reads values any more
    load<EDGE>(VALUES, v_tile, v_row, p.dv, n);
    float s[MT][PARTS][4] = {};
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      if constexpr (KEEP_QUERIES) {
        multiply_rows<T, Keys>(s, kept_queries[i], row_lane, KEYS, i);
      } else {
        Operand<T> q[MT];
        read_queries(q, i);
        multiply_rows<T, Keys>(s, q, row_lane, KEYS, i);
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are there for all, and nobody reads keys any more
    if (k_next != nullptr) load<EDGE>(KEYS, k_next, k_row, p.d, n_next);
    const Policy policy(p, band, place.b, h);
    policy.score(s, p, m, n);
    uint64_t spoilt = 0;
    if constexpr (EDGE) {
      spoilt = spoilt_rows<T, Keys, BLOCK_N>(shared_address(shared) + VALUES);
      hide(s, band, m, n, spoilt);
    }
    softmax.step(s, o, policy.scale(p));
    policy.drop(s, p, m, n);
    if constexpr (EDGE) {
      weigh(s, KeptRows{~spoilt});
    } else {
      weigh(s, AllRows());
    }
  }

  template <class Kept>
  DEVICE void weigh(const float (&s)[MT][PARTS][4], const Kept& kept) {
    if constexpr (sizeof(T) == 4) {
      multiply_columns_f32<Keys>(o, s, shared_address(shared), VALUES, kept);
    } else {
      multiply_columns<T, Keys>(o, s, lane, VALUES, kept);
    }
  }

  DEVICE void read_queries(Operand<T> (&q)[MT], int step) const {
#pragma unroll
    for (int i = 0; i < MT; ++i)
      q[i] = left_operand<T, Queries>(own_lane, i * 16 * Queries::ROW, step);
  }

  DEVICE void run() {
    if (place.nothing || m0 >= place.count) return;
    const auto tiles = KeyTiles::of<BLOCK_N>(band, m0, BLOCK_M, p.mask != nullptr);
    load_queries();
    cp_async_commit();
    int n = tiles.start<BLOCK_N>(0);
    if (tiles.tiles > 0) load<true>(KEYS, k + n * k_row, k_row, p.d, n);
    if constexpr (KEEP_QUERIES) {
      cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < STEPS; ++i) read_queries(kept_queries[i], i);
    }
    int left = tiles.tiles - tiles.edges;
    for (int i = 0; i < tiles.edges; ++i) {
      const int next = tiles.start<BLOCK_N>(i + 1);
      const bool any = i + 1 < tiles.edges || left > 0;
      step<true>(n, v + n * v_row, any ? k + next * k_row : nullptr, next);
      n = next;
    }
    const int64_t k_step = BLOCK_N * k_row, v_step = BLOCK_N * v_row;
    const char *k_next = k + n * k_row + k_step, *v_tile = v + n * v_row;
    for (; left > 0; --left, k_next += k_step, v_tile += v_step, n += BLOCK_N)
      step<false>(n, v_tile, left > 1 ? k_next : nullptr, 0);
    cp_async_wait<0>();
    __syncthreads();
    end();
  }

  DEVICE void end() {
    const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[h] * LOG2E;
    float lse[MT][2];
    softmax.end(o, lse, sink, p.keep_scale);
    if (p.lse != nullptr && threadIdx.x % 4 == 0) {
      float* to = p.lse + place.batch * p.lse_stride[0] + h * p.lse_stride[1] + place.row;
      for (int i = 0; i < MT; ++i) {
        for (int row = 0; row < 2; ++row) {
          const int at = m + 16 * i + 8 * row;
          if (at < place.count) to[at] = lse[i][row];
        }
      }
    }
    store();
  }

  /// Write o by way of the queries' tile, of which each warp has its own rows: 16 bytes a lane.
  DEVICE void store() {
    const int row0 = threadIdx.x / 32 * WARP_M;
#pragma unroll
    for (int i = 0; i < MT; ++i) store_product<T, Queries>(shared, row0 + 16 * i, o[i]);
    __syncwarp();
    T* to = static_cast<T*>(p.o) + place.batch * p.o_stride[0] + h * p.o_stride[1] +
            (place.row + m0 + row0) * p.o_stride[2];
    write_rows<T, Queries>(shared, row0, WARP_M, to, p.o_stride[2], p.dv,
                           min(WARP_M, place.count - m0 - row0), Policy::FOLD || p.aligned);
  }
};

template <class Kernel>
DEVICE void run(const AttentionForward& p) {
  extern __shared__ __align__(1024) char shared[];
  Kernel(p, shared).run();
}

constexpr int MT = sizeof(ELEMENT) == 2 && HEAD_SIZE <= 128 ? 2 : 1;
constexpr int BLOCK_N = sizeof(ELEMENT) == 2 ? 64
                        : HEAD_SIZE <= 64    ? 64
                        : HEAD_SIZE == 256   ? 16
                                             : 32;

}  // namespace

/// Aligned rows and nothing between product and softmax but a positive scale. Grid: blocks of
/// queries, heads.
extern "C" __global__ void __launch_bounds__(THREADS)
    forward(const __grid_constant__ AttentionForward p) {
  run<Forward<ELEMENT, HEAD_SIZE, MT, BLOCK_N, Plain>>(p);
}

/// Everything else; 64 queries to a block.
extern "C" __global__ void __launch_bounds__(THREADS)
    forward_options(const __grid_constant__ AttentionForward p) {
  run < Forward<ELEMENT, HEAD_SIZE, 1, BLOCK_N<64 ? BLOCK_N : 32, Options>>(p);
}

}  // namespace pyfuse::cuda
