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
#include "attention_tiles.h"
#include "product.cuh"
#include "sequence.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int WARPS = ForwardTiles::WARPS, THREADS = 32 * WARPS;

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
  // Operands of the queries that stay in registers: all, or of larger heads as many as o leaves
  // room for. The others are read again for every tile.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int ROOM = 0;  // here one more would spill
#else
  static constexpr int ROOM = 1;
#endif
  static constexpr bool ALL = sizeof(T) == 2 && MT * D <= 128;
  static constexpr int KEPT = ALL ? MT * STEPS : MT == 1 ? 0 : D < 128 ? 4 : ROOM;

  const AttentionForward& p;
  // Where they start, and what all threads share.
  static constexpr int KEYS = Queries::BYTES, VALUES = KEYS + Keys::BYTES,
                       END = VALUES + Keys::BYTES;
  char* const shared;
  const uint32_t lane, row_lane, own_lane;  // lane_address, _of_rows, and of this warp's queries
  const Work& work;
  const int64_t k_row, v_row;  // bytes between rows

  float o[MT][OUT][4] = {};
  Softmax<MT> softmax;
  Operand<T> kept[KEPT > 0 ? KEPT : 1];

  DEVICE Forward(const AttentionForward& p, char* shared)
      : p(p),
        shared(shared),
        lane(lane_address<Keys>(shared_address(shared))),
        row_lane(lane_address_of_rows<Keys>(shared_address(shared))),
        own_lane(lane + threadIdx.x / 32 * WARP_M * Queries::ROW),
        work(Work::of<BLOCK_M, BLOCK_N>(p, reinterpret_cast<Work*>(shared + END))),
        k_row(p.k_stride[2] * int64_t(sizeof(T))),
        v_row(p.v_stride[2] * int64_t(sizeof(T))) {}

  /// This thread's part of the keys, or values, from n on.
  DEVICE const char* keys(int n) const {
    const Place& at = work.place;
    return Copy::part(row_of<T>(p.k, p.k_stride, at.batch, h() / p.group, at.other + n), k_row);
  }
  DEVICE const char* values(int n) const {
    const Place& at = work.place;
    return Copy::part(row_of<T>(p.v, p.v_stride, at.batch, h() / p.group, at.other + n), v_row);
  }

  static DEVICE int h() { return blockIdx.y; }
  static DEVICE int warp_row() { return threadIdx.x / 32 * WARP_M; }
  /// This lane's first query.
  DEVICE int m() const { return work.m0 + warp_row() + threadIdx.x % 32 / 4; }

  /// Start copying rows of K or V, at this thread's part of key n's on, into their tile.
  template <bool EDGE>
  DEVICE void load(int tile, const char* from, int64_t row, int d, int n) const {
    if (Policy::ALIGNED || p.aligned) {
      Copy::template start<BLOCK_N, EDGE>(shared_address(shared) + tile, from, row, d * sizeof(T),
                                          work.band.end - n);
    } else {
      Copy::template copy<T, BLOCK_N>(shared + tile, from, row, d, work.band.end - n);
    }
    cp_async_commit();
  }

  DEVICE void load_queries() {
    const char* q = row_of<T>(p.q, p.q_stride, work.place.batch, h(), work.place.row + work.m0);
    const int64_t row = p.q_stride[2] * int64_t(sizeof(T));
    using Copy = Copier<Queries, THREADS>;
    const int inside = work.place.count - work.m0;
    if (Policy::ALIGNED || p.aligned) {
      Copy::template start<BLOCK_M, true>(shared_address(shared), Copy::part(q, row), row,
                                          p.d * sizeof(T), inside);
    } else {
      Copy::template copy<T, BLOCK_M>(shared, Copy::part(q, row), row, p.d, inside);
    }
    if (p.d < D) {
      Copy::template clear_padding<BLOCK_M>(shared, p.d);
      Forward::Copy::template clear_padding<BLOCK_N>(shared + KEYS, p.d);
    }
    if (p.dv < D) Forward::Copy::template clear_padding<BLOCK_N>(shared + VALUES, p.dv);
  }

  /// Fold the tile of keys at n into the sums. v_tile: this thread's part of its values; k_next: of
  /// the keys of the tile after it, at n_next, if there is one `more`. EDGE: some query does not
  /// see some key of this one.
  template <bool EDGE>
  DEVICE void step(int n, const char* v_tile, bool more, const char* k_next, int n_next) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there for all, and nobody reads values any more
    load<EDGE>(VALUES, v_tile, v_row, p.dv, n);
    float s[MT][PARTS][4] = {};
    uint32_t row_lane = this->row_lane, own_lane = this->own_lane;
    forget(row_lane);
    forget(own_lane);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      Operand<T> q[MT];
#pragma unroll
      for (int j = 0; j < MT; ++j)
        q[j] = MT * i + j < KEPT ? kept[MT * i + j] : query(own_lane, i, j);
      multiply_rows<T, Keys>(s, q, row_lane, KEYS, i);
    }
    cp_async_wait<0>();
    __syncthreads();  // the values are there for all, and nobody reads keys any more
    const Policy policy(p, work.band, work.place.b, h());
    policy.score(s, p, m(), n);
    uint64_t spoilt = 0;
    if constexpr (EDGE) {
      spoilt = spoilt_rows<T, Keys, BLOCK_N>(shared_address(shared) + VALUES);
      hide(s, work.band, m(), n, spoilt);
    }
    softmax.template step<EDGE>(s, o, policy.scale(p));
    policy.drop(s, p, m(), n);
    if (more) load<EDGE>(KEYS, k_next, k_row, p.d, n_next);
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

  /// Of this warp's queries 16 j … 16 j + 15, the columns of `step`.
  static DEVICE Operand<T> query(uint32_t own_lane, int step, int j) {
    return left_operand<T, Queries>(own_lane, j * 16 * Queries::ROW, step);
  }

  DEVICE void run() {
    if (work.place.nothing || work.m0 >= work.place.count) return;
    const KeyTiles& tiles = work.tiles;
    load_queries();
    cp_async_commit();
    int n = tiles.start<BLOCK_N>(0);
    if (tiles.tiles > 0) load<true>(KEYS, keys(n), k_row, p.d, n);
    if constexpr (KEPT > 0) {
      cp_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int i = 0; i < KEPT; ++i) kept[i] = query(own_lane, i / MT, i % MT);
    }
    int left = tiles.tiles - tiles.edges;
    for (int i = 0; i < tiles.edges; ++i) {
      const int next = tiles.start<BLOCK_N>(i + 1);
      const bool more = i + 1 < tiles.edges || left > 0;
      step<true>(n, values(n), more, keys(next), next);
      n = next;
    }
    const int64_t k_step = BLOCK_N * k_row, v_step = BLOCK_N * v_row;
    const char *k_next = keys(n) + k_step, *v_tile = values(n);
    for (; left > 0; --left, k_next += k_step, v_tile += v_step, n += BLOCK_N)
      step<false>(n, v_tile, left > 1, k_next, 0);
    cp_async_wait<0>();
    __syncthreads();
    end();
  }

  DEVICE void end() {
    const float sink = p.sinks == nullptr ? -INFINITY : p.sinks[h()] * LOG2E;
    float lse[MT][2];
    softmax.end(o, lse, sink, p.keep_scale);
    if (p.lse != nullptr && threadIdx.x % 4 == 0) {
      float* to =
          p.lse + work.place.batch * p.lse_stride[0] + h() * p.lse_stride[1] + work.place.row;
      for (int i = 0; i < MT; ++i) {
        for (int row = 0; row < 2; ++row) {
          const int at = m() + 16 * i + 8 * row;
          if (at < work.place.count) to[at] = lse[i][row];
        }
      }
    }
    store();
  }

  /// Write o by way of the queries' tile, of which each warp has its own rows: 16 bytes a lane.
  DEVICE void store() {
    const Place& place = work.place;
    const int first = work.m0 + warp_row();
#pragma unroll
    for (int i = 0; i < MT; ++i) store_product<T, Queries>(shared, warp_row() + 16 * i, o[i]);
    __syncwarp();
    T* to = static_cast<T*>(p.o) + place.batch * p.o_stride[0] + h() * p.o_stride[1] +
            (place.row + first) * p.o_stride[2];
    write_rows<T, Queries>(shared, warp_row(), WARP_M, to, p.o_stride[2], p.dv, place.count - first,
                           Policy::ALIGNED || p.aligned);
  }
};

constexpr ForwardTiles ALIGNED(sizeof(ELEMENT), HEAD_SIZE, true, true);
constexpr ForwardTiles ANYWHERE(sizeof(ELEMENT), HEAD_SIZE, true, false);
constexpr ForwardTiles OPTIONS(sizeof(ELEMENT), HEAD_SIZE, false, false);

template <int MT, int BLOCK_N, class Policy>
DEVICE void run(const AttentionForward& p) {
  extern __shared__ __align__(1024) char shared[];
  Forward<ELEMENT, HEAD_SIZE, MT, BLOCK_N, Policy>(p, shared).run();
}

/// Blocks of a multiprocessor in float32, whose products would take every register that there is:
/// left with 168 the assembler begins fewer of them at once, and spills less.
constexpr int FLOAT_BLOCKS = sizeof(ELEMENT) == 2 ? 0 : HEAD_SIZE <= 128 ? 3 : 2;

}  // namespace

/// Aligned rows and nothing between product and softmax but a positive scale. Grid: blocks of
/// queries, heads.
extern "C" __global__ void __launch_bounds__(THREADS, FLOAT_BLOCKS ? FLOAT_BLOCKS : 1)
    forward(const __grid_constant__ AttentionForward p) {
  run<ALIGNED.parts, ALIGNED.block_n, Plain<true>>(p);
}

/// The same of rows that lie anywhere, to the same bits; 16 queries to a warp.
extern "C" __global__ void __launch_bounds__(THREADS, FLOAT_BLOCKS ? FLOAT_BLOCKS : 2)
    forward_unaligned(const __grid_constant__ AttentionForward p) {
  run<ANYWHERE.parts, ANYWHERE.block_n, Plain<false>>(p);
}

/// Everything else; 16 queries to a warp. Two blocks to a multiprocessor are said, so that no
/// register is held back for more.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    forward_options(const __grid_constant__ AttentionForward p) {
  run<OPTIONS.parts, OPTIONS.block_n, Options>(p);
}

}  // namespace pyfuse::cuda
