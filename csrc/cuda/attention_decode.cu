// Attention of few queries over a cache on mma.sync, for sm_80 and later: the keys of a head are
// shared out between blocks, those of a share between the warps of a block.
//
//   o[r] = sum_n softmax_n(s[r, n]) v[n],   s as in mask.cuh;   row r is query r / G of head r % G
//
// (Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023.) All G query heads of a key head and all M
// queries are rows of one tile, so that they use together what is read once. A warp streams 16 keys
// at a time, and their values, through a ring in shared memory that is its own: nobody waits for
// another warp before all are through. Lane i of a warp knows where key i lies, in the cache, in
// one of its pages or among what is new, and lane 16 + i where its value lies.
//
// Which keys a warp takes depends on nothing but the sequence, and every sum of a row has its own
// rows' numbers alone in it: the tile that a query is in, and its neighbours there, change no bit.
//
// Compiled once for each ELEMENT (f32, bf16, f16) and HEAD_SIZE, the largest that D and Dv may
// have: columns beyond them are zeros; with TILES_OF_32 where the sums of so many rows fit the
// registers.
#include "cache_ring.cuh"
#include "decode.cuh"
#include "product.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {
namespace {

constexpr DecodeRing RING(sizeof(ELEMENT), HEAD_SIZE);
constexpr int WARPS = RING.warps, THREADS = 32 * WARPS;

template <typename T, int D, int MT>
struct Decode {
  static constexpr int ROWS = 16 * MT, OUT = D / 8, STEPS = D * sizeof(T) / 32;
  static constexpr bool KEEP_QUERIES = sizeof(T) == 2 && MT * D <= 128;
  using Ring = CacheRing<T, D>;
  using Keys = typename Ring::Keys;
  using Queries = Tile<T, D, ROWS>;
  static_assert(Ring::BYTES >= ROWS * D * 4, "a warp leaves its sums in its ring");

  const AttentionDecode& p;
  char* const shared;
  const int warp, lane;
  const int hk, b, r0, rows;  // rows: of all tiles
  const Part part;
  Ring ring;

  int first[MT][2], last[MT][2], place[MT][2];  // of this lane's rows: see Band
  float slope[MT][2];
  float o[MT][OUT][4] = {};
  Softmax<MT> softmax;
  Operand<T> kept_queries[KEEP_QUERIES ? STEPS : 1][MT];

  DEVICE Decode(const AttentionDecode& p, char* shared, const Shares& shares, const Band& band,
                int hk, int b, int r0)
      : p(p),
        shared(shared),
        warp(__shfl_sync(~0u, threadIdx.x / 32, 0)),  // so that the compiler sees it is one
        lane(threadIdx.x % 32),
        hk(hk),
        b(b),
        r0(r0),
        rows(p.M * p.group),
        part(band, shares, blockIdx.y, r0 / p.group, (min(r0 + ROWS, rows) - 1) / p.group),
        ring(p, shared + warp * Ring::BYTES, warp, b, hk, band.N, part.low, part.high) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int r = min(r0 + 16 * i + 8 * j + lane / 4, rows - 1), m = r / p.group;
        first[i][j] = band.first(m), last[i][j] = band.last(m), place[i][j] = band.place(m);
        slope[i][j] = p.slopes == nullptr ? 0.0f : p.slopes[hk * p.group + r % p.group] * LOG2E;
      }
    }
  }

  DEVICE char* query_tile() const { return shared + WARPS * Ring::BYTES; }
  /// (maximum, sum of weights) of each row, those of one warp after another's.
  DEVICE float2* sums() const { return reinterpret_cast<float2*>(query_tile() + Queries::BYTES); }

  DEVICE void load_queries() {
    using Copy = Copier<Queries, THREADS>;
    for (int r = Copy::row(); r < ROWS; r += Copy::LOADED) {
      const int row = min(r0 + r, rows - 1);
      const bool there = r0 + r < rows;
      const T* const q = static_cast<const T*>(p.q) + b * p.q_stride[0] +
                         (hk * p.group + row % p.group) * p.q_stride[1] +
                         row / p.group * p.q_stride[2];
      for (int c = Copy::chunk(); c < Queries::ROW_CHUNKS; c += Copy::ACROSS) {
        char* const to = query_tile() + Queries::at(r, c);
        const int d = c * Queries::PER_CHUNK;
        if (p.aligned) {
          cp_async_or_zero(shared_address(to), q + d, there && d < p.d);
        } else {
          for (int j = 0; j < Queries::PER_CHUNK; ++j)
            reinterpret_cast<T*>(to)[j] = there && d + j < p.d ? q[d + j] : T(0.0f);
        }
      }
    }
    cp_async_commit();
  }

  DEVICE void multiply_queries(float (&s)[MT][2][4]) const {
    const uint32_t keys = lane_address_of_rows<Keys>(ring.address);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      if constexpr (KEEP_QUERIES) {
        multiply_rows<T, Keys>(s, kept_queries[i], keys, ring.keys, i);
      } else {
        Operand<T> q[MT];
        read_queries(q, i);
        multiply_rows<T, Keys>(s, q, keys, ring.keys, i);
      }
    }
  }

  DEVICE void read_queries(Operand<T> (&q)[MT], int step) const {
    const uint32_t from = lane_address<Queries>(shared_address(query_tile()));
#pragma unroll
    for (int i = 0; i < MT; ++i) q[i] = left_operand<T, Queries>(from, i * 16 * Queries::ROW, step);
  }

  /// f(score, its key's distance from n, i, j) for each score of the rows [i][j].
  template <class F>
  DEVICE void each(float (&s)[MT][2][4], F f) const {
    const int column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        for (int j = 0; j < 4; ++j) f(s[i][part][j], column + 8 * part + j % 2, i, j / 2);
      }
    }
  }

  DEVICE void score(float (&s)[MT][2][4], int n) const {
    if (p.fold) return;
    each(s, [&](float& x, int, int, int) { x *= p.scale; });
    if (p.softcap != 0.0f)
      each(s, [&](float& x, int, int, int) { x = tanh_accurate(x) * p.softcap; });
    if (p.slopes != nullptr) {
      each(s, [&](float& x, int key, int i, int j) {
        x -= slope[i][j] * fabsf(float(place[i][j] - n - key));
      });
    }
  }

  /// Hide what rows do not see. Where values are not finite, scores of those who see them are NaN.
  DEVICE void hide(float (&s)[MT][2][4], int n) const {
    const uint32_t spoilt = ring.clear_spoilt_values();
    each(s, [&](float& x, int key, int i, int j) {
      if (spoilt >> key & 1) x = NAN;
      if (n + key < first[i][j] || n + key >= last[i][j]) x = -INFINITY;
    });
  }

  /// Start copying what is needed SLOTS / 2 steps later, and fold 16 keys from n on, and their
  /// values, into the sums, if they are `there` yet.
  DEVICE void step(int n, bool there) {
    float s[MT][2][4] = {};
    cp_async_wait<Ring::SLOTS - 2>();
    __syncwarp();  // the keys are there for all lanes, and none reads the values before them
    ring.copy_values();
    if (there) {
      multiply_queries(s);
      score(s, n);
    }
    cp_async_wait<Ring::SLOTS - 2>();
    __syncwarp();  // the values are there, and no lane reads the keys any more
    ring.copy_keys();
    if (!there) return;
    if (!part.all_see(n, 16)) hide(s, n);
    softmax.template step<true>(s, o, p.fold ? p.scale : 1.0f);
    if constexpr (sizeof(T) == 4) {
      multiply_columns_f32<Keys>(o, s, ring.address, ring.values(), AllRows());
    } else {
      multiply_columns<T, Keys>(o, s, lane_address<Keys>(ring.address), ring.values(), AllRows());
    }
    ring.advance();
  }

  /// The byte of a row of sums in shared memory where four columns start. Rows that a warp writes
  /// together lie in different banks.
  static DEVICE int at(int row, int column) {
    return row * D * 4 + ((column * 4) ^ (sizeof(T) == 2 ? (row & 3) << 5 : (row & 1) << 6));
  }

  /// Leave this warp's sums in its ring.
  DEVICE void leave() const {
    const int g = lane / 4, t = lane % 4;
    __syncwarp();  // no lane reads values any more
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int row = 16 * i + 8 * j + g;
        char* const to = ring.start;
        const float l = over_row(softmax.l[i][j], [](float x, float y) { return x + y; });
        if (t == 0) sums()[warp * ROWS + row] = {l == 0.0f ? -INFINITY : softmax.pivot[i][j], l};
#pragma unroll
        for (int n = 0; n < OUT; n += sizeof(T) / 2) {
          const float x = o[i][n][2 * j], y = o[i][n][2 * j + 1];
          if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<float2*>(to + at(row, 8 * n + 2 * t)) = {x, y};
          } else {
            *reinterpret_cast<float4*>(to + at(row, 8 * n + 4 * t)) = {x, o[i][n + 1][2 * j], y,
                                                                       o[i][n + 1][2 * j + 1]};
          }
        }
      }
    }
  }

  /// Add up what the warps left, and write o, or the share's part of it.
  DEVICE void merge_warps() const {
    const int columns = (p.dv + 3) / 4 * 4;
    for (int i = threadIdx.x; i < min(ROWS, rows - r0) * (D / 4); i += THREADS) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      if (column >= columns) continue;
      float top = -INFINITY, l = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, sums()[w * ROWS + row].x);
      float4 sum{};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float2 of = sums()[w * ROWS + row];
        const float weight = weight_of(of.x, top);
        l = fmaf(of.y, weight, l);
        add_scaled(sum,
                   *reinterpret_cast<const float4*>(shared + w * Ring::BYTES + at(row, column)),
                   weight);
      }
      write(r0 + row, column, columns, top, l, sum);
    }
  }

  DEVICE void write(int r, int column, int columns, float top, float l, float4 sum) const {
    const int m = r / p.group, h = hk * p.group + r % p.group;
    const int64_t row = (int64_t(b) * p.heads + h) * p.M + m;
    if (p.partial != nullptr) {
      const int64_t share = row * p.splits + blockIdx.y;
      const int64_t all = int64_t(p.batch) * p.heads * p.M * p.splits;
      *reinterpret_cast<float4*>(p.partial + share * columns + column) = sum;
      if (column == 0) {
        p.partial[all * columns + share] = top;
        p.partial[all * (columns + 1) + share] = l;
      }
      return;
    }
    const Finish finish(top, l, sink_of(p, h));
    write_four<T>(p, b, h, m, column, scaled(sum, finish.factor));
    if (p.lse != nullptr && column == 0) p.lse[row] = finish.lse;
  }

  DEVICE void run() {
    load_queries();
    int n = ring.next;
#pragma unroll 1
    for (int i = -Ring::SLOTS / 2;; ++i) {
      if (i == 0) {
        cp_async_wait<Ring::SLOTS>();
        __syncthreads();  // the queries are there
        if constexpr (KEEP_QUERIES) {
#pragma unroll
          for (int j = 0; j < STEPS; ++j) read_queries(kept_queries[j], j);
        }
      }
      if (i >= 0 && n >= part.high) break;
      step(n, i >= 0);
      if (i >= 0) n += Ring::STRIDE;
    }
    leave();
    __syncthreads();
    merge_warps();
  }
};

template <int MT>
DEVICE void run(const AttentionDecode& p) {
  extern __shared__ __align__(1024) char shared[];
  const int tiles = (p.M * p.group + 16 * MT - 1) / (16 * MT), heads = p.heads / p.group;
  const int x = static_cast<int>(blockIdx.x), hk = x / tiles % heads, b = x / tiles / heads;
  const Band band = band_in_cache(p, b);
  if (static_cast<int>(blockIdx.y) == p.splits) {
    if (x % tiles == 0) append<ELEMENT, THREADS>(p, b, hk, band.N);
    return;
  }
  const Shares shares(band, p.splits);
  if (p.splits > 1 && static_cast<int>(blockIdx.y) >= shares.used()) return;
  Decode<ELEMENT, HEAD_SIZE, MT>(p, shared, shares, band, hk, b, x % tiles * 16 * MT).run();
}

}  // namespace

/// Tiles of 16 rows. Grid: tiles of rows of key heads of sequences; splits, and where something is
/// new one more that writes it into the cache, which nobody reads it from.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    decode(const __grid_constant__ AttentionDecode p) {
  run<1>(p);
}

#if defined(TILES_OF_32)
/// The same with tiles of 32 rows.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    decode_32_rows(const __grid_constant__ AttentionDecode p) {
  run<2>(p);
}
#endif

}  // namespace pyfuse::cuda
