// The loop of the kernels that own queries in attention's backward: over all keys that these see,
// with both products of attention_gradient.cuh. What it is for is in attention_bwd_dq.cu.
#pragma once

#include "attention_gradient.cuh"
#include "product.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {

/// What a kernel gives: dq (and the share of each query in the slopes' gradient), or the terms.
enum class Gives { dq, terms };

template <typename T, int D, int MT, int WARPS, int BLOCK_N, class Policy, Gives GIVES>
struct QueryGradients {
  static constexpr int THREADS = 32 * WARPS, WARP_M = 16 * MT, BLOCK_M = WARP_M * WARPS;
  static constexpr int PARTS = BLOCK_N / 8, OUT = GIVES == Gives::dq ? D / 8 : 2;
  using Queries = Tile<T, D, BLOCK_M>;
  using Keys = Tile<T, D, BLOCK_N>;
  using Copy = Copier<Keys, THREADS>;
  static constexpr int STEPS = D * sizeof(T) / 32;
  static constexpr int QUERIES = 0, GRADS = Queries::BYTES, KEYS = 2 * Queries::BYTES;
  static constexpr int VALUES = KEYS + Keys::BYTES;  // where they start in shared memory
  static constexpr int WORK = VALUES + Keys::BYTES, TERMS = WORK + WORK_BYTES;
  // Of larger heads q and do are read again for every tile: registers are too few to keep them.
  static constexpr bool KEEP = sizeof(T) == 2 && MT * D <= 128 && Policy::FOLD;

  const AttentionGradient& p;
  char* const shared;
  const Work& work;
  const uint32_t base;
  const uint32_t lane, row_lane, own_lane;  // lane_address, _of_rows, and of this warp's queries
  int h, m0, m;                             // m: this lane's first row
  const char *k, *v;                        // this thread's part of the first key and value
  int64_t k_row, v_row;                     // bytes between rows
  int64_t rows;                             // where the block's queries are among the terms
  Operand<T> kept_queries[KEEP ? STEPS : 1][MT], kept_grads[KEEP ? STEPS : 1][MT];

  float dq[MT][OUT][4] = {};
  float sum[MT][2] = {}, weights[MT][2] = {};

  DEVICE QueryGradients(const AttentionGradient& p, char* shared)
      : p(p),
        shared(shared),
        work(Work::of<BLOCK_M, BLOCK_N>(p, reinterpret_cast<Work*>(shared + WORK))),
        base(shared_address(shared)),
        lane(lane_address<Keys>(base)),
        row_lane(lane_address_of_rows<Keys>(base)),
        own_lane(lane + threadIdx.x / 32 * WARP_M * Queries::ROW) {}

  /// Find this block's work and start loading what is its own; false if there is none.
  DEVICE bool begin() {
    const Place place = work.place;
    h = blockIdx.y;
    m0 = work.m0;
    if (place.nothing || m0 >= place.count) return false;
    m = m0 + threadIdx.x / 32 * WARP_M + threadIdx.x % 32 / 4;
    k_row = p.k_stride[2] * int64_t(sizeof(T)), v_row = p.v_stride[2] * int64_t(sizeof(T));
    k = Copy::part(row_of<T>(p.k, p.k_stride, place.batch, h / p.group, place.other), k_row);
    v = Copy::part(row_of<T>(p.v, p.v_stride, place.batch, h / p.group, place.other), v_row);
    rows = place.batch * p.terms.stride[0] + h * p.terms.stride[1] + place.row;
    load_own(place, QUERIES, p.q, p.q_stride, p.d);
    load_own(place, GRADS, p.d_o, p.do_stride, p.dv);
    cp_async_commit();
    load_terms(place.count);
    __syncthreads();
    return true;
  }

  /// Start copying rows of K or V, at this thread's part of key n's on, into their tile.
  template <bool EDGE>
  DEVICE void load(int tile, const char* from, int64_t row, int d, int n) const {
    if (Policy::FOLD || p.aligned) {
      Copy::template start<BLOCK_N, EDGE>(base + tile, from, row, d * sizeof(T), work.band.end - n);
    } else {
      Copy::template copy<T, BLOCK_N>(shared + tile, from, row, d, work.band.end - n);
    }
    cp_async_commit();
  }

  /// Start copying the block's rows of q or do.
  DEVICE void load_own(const Place& place, int tile, const void* x, const int64_t (&stride)[3],
                       int d) {
    load_rows<T, Queries, BLOCK_M, THREADS, true>(
        shared, tile, row_of<T>(x, stride, place.batch, h, place.row + m0), stride[2], d,
        place.count - m0, Policy::FOLD || p.aligned);
    if (d == D) return;
    Copier<Queries, THREADS>::template clear_padding<BLOCK_M>(shared + tile, d);
    Copy::template clear_padding<BLOCK_N>(shared + (tile == QUERIES ? KEYS : VALUES), d);
  }

  /// The terms of the block's rows, one after the other of all; of rows beyond the last those of a
  /// query that sees nothing.
  DEVICE void load_terms(int count) const {
    auto* const to = reinterpret_cast<float*>(shared + TERMS);
    for (int i = threadIdx.x; i < BLOCK_M; i += THREADS) {
      Terms t{INFINITY, 0.0f, 0.0f};
      const int64_t at = rows + m0 + i;
      if (m0 + i < count) {
        if constexpr (GIVES == Gives::terms) {
          const float lse = p.terms.lse[at];
          if (lse != -INFINITY) t.lse2 = lse * LOG2E;
        } else {
          t = {p.terms.lse2[at], p.terms.rest == nullptr ? 0.0f : p.terms.rest[at],
               p.terms.delta[at]};
        }
      }
      to[i] = t.lse2, to[BLOCK_M + i] = t.delta, to[2 * BLOCK_M + i] = t.rest;
    }
  }

  /// Those of one of this lane's rows.
  DEVICE Terms terms_of(int i, int row) const {
    const auto* from = reinterpret_cast<const float*>(shared + TERMS) + m - m0 + 16 * i + 8 * row;
    return {from[0], sizeof(T) == 4 || !Policy::FOLD ? from[2 * BLOCK_M] : 0.0f, from[BLOCK_M]};
  }

  /// f(i, row, m) for each of a lane's rows.
  template <class F>
  DEVICE void each_row(F f) const {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) f(i, row, m + 16 * i + 8 * row);
    }
  }

  /// c += a bᵀ with this warp's rows of q or do.
  DEVICE void multiply(float (&c)[MT][PARTS][4], const Operand<T> (&kept)[KEEP ? STEPS : 1][MT],
                       int own, int tile) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if constexpr (KEEP) {
        multiply_rows<T, Keys>(c, kept[step], row_lane, tile, step);
      } else {
        Operand<T> a[MT];
#pragma unroll
        for (int i = 0; i < MT; ++i)
          a[i] = left_operand<T, Queries>(own_lane, own + i * 16 * Queries::ROW, step);
        multiply_rows<T, Keys>(c, a, row_lane, tile, step);
      }
    }
  }

  /// Add what the tile of keys at n gives; its values are there. k_next, v_next: this thread's part
  /// of the next tile's, at n_next, or null after the last. EDGE and edge: some query does not see
  /// some key.
  template <bool EDGE>
  DEVICE void step(int n, const char* k_next, const char* v_next, int n_next, bool edge) {
    float s[MT][PARTS][4] = {}, dp[MT][PARTS][4] = {};
    multiply(dp, kept_grads, GRADS, VALUES);
    cp_async_wait<0>();
    __syncthreads();  // the keys are there for all, and nobody reads values any more
    if (v_next != nullptr) load<EDGE>(VALUES, v_next, v_row, p.dv, n_next);
    multiply(s, kept_queries, QUERIES, KEYS);
    uint64_t spoilt = 0;
    if constexpr (EDGE && GIVES == Gives::dq) {
      if (edge) spoilt = spoilt_rows<T, Keys, BLOCK_N>(base + KEYS);
    }
    gradients<EDGE>(s, dp, n, edge, spoilt);
    if constexpr (GIVES == Gives::dq) {
      if constexpr (EDGE) {
        weigh(dp, KeptRows{~spoilt});
      } else {
        weigh(dp, AllRows());
      }
    }
    cp_async_wait<0>();
    __syncthreads();  // the next values are there for all, and nobody reads keys any more
    if (k_next != nullptr) load<EDGE>(KEYS, k_next, k_row, p.d, n_next);
  }

  template <bool EDGE>
  DEVICE void gradients(float (&s)[MT][PARTS][4], float (&dp)[MT][PARTS][4], int n, bool edge,
                        uint64_t spoilt) {
    Terms terms[MT][2];
    each_row([&](int i, int row, int) { terms[i][row] = terms_of(i, row); });
    const auto of_rows = [&](int) {
      return [&](int i, int j) -> const Terms& { return terms[i][j / 2]; };
    };
    const auto add = [&](int i, int, int j, float weight, float ds, int query, int key) {
      if constexpr (GIVES == Gives::terms) {
        sum[i][j / 2] += ds, weights[i][j / 2] += weight;
      } else if constexpr (!Policy::FOLD) {
        sum[i][j / 2] -= ds * fabsf(float(work.band.place(query) - key));
      }
    };
    const Pairs<false> pairs{m, n + static_cast<int>(threadIdx.x % 4 * 2)};
    Policy(p, work.band, work.place.b, h)
        .template gradients<false, EDGE, sizeof(T) == 4>(s, dp, p, pairs, of_rows, edge, spoilt, n,
                                                         add);
  }

  template <class Kept>
  DEVICE void weigh(const float (&ds)[MT][PARTS][4], const Kept& kept) {
    if constexpr (sizeof(T) == 4) {
      multiply_columns_f32<Keys>(dq, ds, base, KEYS, kept);
    } else {
      multiply_columns<T, Keys>(dq, ds, lane, KEYS, kept);
    }
  }

  DEVICE void run() {
    if (!begin()) return;
    const KeyTiles& tiles = work.tiles;
    int n = tiles.start<BLOCK_N>(0);
    if (tiles.tiles > 0) load<true>(VALUES, v + n * v_row, v_row, p.dv, n);
    cp_async_wait<0>();
    __syncthreads();
    if (tiles.tiles > 0) load<true>(KEYS, k + n * k_row, k_row, p.d, n);
    if constexpr (KEEP) {
#pragma unroll
      for (int i = 0; i < STEPS * MT; ++i) {
        const int offset = i % MT * 16 * Queries::ROW;
        kept_queries[i / MT][i % MT] = left_operand<T, Queries>(own_lane, QUERIES + offset, i / MT);
        kept_grads[i / MT][i % MT] = left_operand<T, Queries>(own_lane, GRADS + offset, i / MT);
      }
    }
    // With options, tiles that are not edges go by the same code.
    const int checked = Policy::FOLD ? tiles.edges : tiles.tiles;
    for (int i = 0; i < checked; ++i) {
      const int next = tiles.start<BLOCK_N>(i + 1);
      const bool any = i + 1 < tiles.tiles;
      step<true>(n, any ? k + next * k_row : nullptr, any ? v + next * v_row : nullptr, next,
                 i < tiles.edges);
      n = next;
    }
    if constexpr (Policy::FOLD) {
      const int64_t k_step = BLOCK_N * k_row, v_step = BLOCK_N * v_row;
      const char *k_next = k + n * k_row + k_step, *v_next = v + n * v_row + v_step;
      int left = tiles.tiles - tiles.edges;
      for (; left > 0; --left, k_next += k_step, v_next += v_step, n += BLOCK_N)
        step<false>(n, left > 1 ? k_next : nullptr, left > 1 ? v_next : nullptr, 0, false);
    }
    if constexpr (GIVES == Gives::terms) {
      store_terms();
    } else {
      store();
    }
  }

  DEVICE void store_terms() {
    const Place& place = work.place;
    each_row([&](int i, int row, int at) {
      const float ds = over_row(sum[i][row], plus), lse2 = terms_of(i, row).lse2;
      float all = over_row(weights[i][row], plus);
      if (p.sinks != nullptr) all += exp2_approx(fmaf(p.sinks[h], LOG2E, -lse2));
      if (at >= place.count || threadIdx.x % 4 != 0) return;
      const bool blind = lse2 == INFINITY;
      float delta = blind ? 0.0f : ds / all;
      if (p.d_lse != nullptr && !blind)
        delta -= p.d_lse[place.batch * p.dlse_stride[0] + h * p.dlse_stride[1] +
                         (place.row + at) * p.dlse_stride[2]];
      p.terms.lse2[rows + at] = lse2;
      p.terms.rest[rows + at] = blind ? 0.0f : log2f(all);
      p.terms.delta[rows + at] = delta;
    });
  }

  static DEVICE float plus(float x, float y) { return x + y; }

  /// Write dq by way of the queries' tile, of which each warp has its own rows: 16 bytes a lane.
  DEVICE void store() {
    const Place& place = work.place;
    const int m0 = place.block * BLOCK_M, h = blockIdx.y;
    if (!Policy::FOLD && p.d_slopes != nullptr) {
      each_row([&](int i, int row, int at) {
        const float all = over_row(sum[i][row], plus);
        if (at < place.count && threadIdx.x % 4 == 0) p.d_slopes[rows + at] = all;
      });
    }
    __syncwarp();  // all lanes have read the queries
    const int row0 = threadIdx.x / 32 * WARP_M;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int part = 0; part < OUT; ++part) {
        for (int j = 0; j < 4; ++j) dq[i][part][j] *= p.factor;
      }
      store_product<T, Queries>(shared, row0 + 16 * i, dq[i]);
    }
    __syncwarp();
    T* to = static_cast<T*>(p.d_q) + place.batch * p.dq_stride[0] + h * p.dq_stride[1] +
            (place.row + m0 + row0) * p.dq_stride[2];
    write_rows<T, Queries>(shared, row0, WARP_M, to, p.dq_stride[2], p.d,
                           min(WARP_M, place.count - m0 - row0), Policy::FOLD || p.aligned);
  }
};

}  // namespace pyfuse::cuda
