// The gradient of an additive mask: ds of attention_gradient.cuh, summed over what the mask was
// broadcast along.
//
// A block owns one tile of the mask, and all that shares it: sequences, heads, and, where rows or
// columns are not apart, these. It takes both products of each once more rather than memory for ds
// [B, Hq, M, N], and sums in one order. As in attention_bwd_dq.cu, q and k are on their way while
// do is multiplied with v, and the next do and v thereafter.
//
// Compiled once for each ELEMENT (f32, bf16, f16) and HEAD_SIZE, the largest that D and Dv may
// have: columns beyond them are zeros.
#include "attention_gradient.cuh"
#include "attention_tiles.h"
#include "product.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {
namespace {

constexpr MaskGradientTiles TILES(sizeof(ELEMENT), HEAD_SIZE);
constexpr int THREADS = TILES.threads(), BLOCK_M = TILES.rows(), BLOCK_N = TILES.block_n;

template <typename T, int D>
struct MaskGradient {
  static constexpr int PARTS = BLOCK_N / 8, STEPS = D * sizeof(T) / 32;
  using Queries = Tile<T, D, BLOCK_M>;
  using Keys = Tile<T, D, BLOCK_N>;
  static constexpr int QUERIES = 0, GRADS = Queries::BYTES, KEYS = 2 * Queries::BYTES;
  static constexpr int VALUES = KEYS + Keys::BYTES;  // where they start in shared memory
  static constexpr int TOTAL_ROW = BLOCK_N + 8;  // of the sums there in the end, without conflicts

  const AttentionGradient& p;
  char* const shared;
  const uint32_t base, row_lane, own_lane;
  const int row0;      // this lane's first row of a tile
  int b0, h0;          // the first of the sequences and heads that share the tile
  int m0, m1, n0, n1;  // the rows and columns that it owns
  float total[PARTS][4] = {};

  /// A tile of one of these heads.
  struct At {
    int b, h, m, n;
  };

  DEVICE MaskGradient(const AttentionGradient& p, char* shared)
      : p(p),
        shared(shared),
        base(shared_address(shared)),
        row_lane(lane_address_of_rows<Keys>(base)),
        own_lane(lane_address<Keys>(base) + threadIdx.x / 32 * 16 * Queries::ROW),
        row0(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4) {
    int index = blockIdx.x;
    const auto split = [&](bool apart, int size, int block, int& first, int& last) {
      first = 0, last = size;
      if (!apart) return;
      const int blocks = (size + block - 1) / block;
      first = index % blocks * block, last = min(first + block, size);
      index /= blocks;
    };
    split(p.columns_apart, p.N, BLOCK_N, n0, n1);
    split(p.rows_apart, p.M, BLOCK_M, m0, m1);
    b0 = index * p.sharing_batches;
    h0 = blockIdx.y * p.sharing_heads;
  }

  /// Go to the next tile, false after the last.
  DEVICE bool next(At& at) const {
    if ((at.n += BLOCK_N) < n1) return true;
    at.n = n0;
    if ((at.m += BLOCK_M) < m1) return true;
    at.m = m0;
    if (++at.h < h0 + p.sharing_heads) return true;
    at.h = h0;
    return ++at.b < b0 + p.sharing_batches;
  }

  DEVICE bool seen(const At& at) const {
    const Band band = band_of(p, at.b, p.M, p.N);
    const int last = min(at.m + BLOCK_M, p.M) - 1;
    return band.last(last) > at.n && band.first(at.m) < min(at.n + BLOCK_N, band.end);
  }

  /// The next one from `at` on of which any pair is seen; false if there is none.
  DEVICE bool find(At& at, bool any) const {
    while (any && !seen(at)) any = next(at);
    return any;
  }

  /// Start copying rows of a tile.
  template <class Tile, int ROWS>
  DEVICE void load(int tile, const void* x, const int64_t (&stride)[3], int b, int h, int row,
                   int end, int d) const {
    load_rows<T, Tile, ROWS, THREADS, true>(shared, tile, row_of<T>(x, stride, b, h, row),
                                            stride[2], d, end - row, p.aligned);
  }

  DEVICE void load_grads_and_values(const At& at) const {
    const int end = band_of(p, at.b, p.M, p.N).end;
    load<Queries, BLOCK_M>(GRADS, p.d_o, p.do_stride, at.b, at.h, at.m, p.M, p.dv);
    load<Keys, BLOCK_N>(VALUES, p.v, p.v_stride, at.b, at.h / p.group, at.n, end, p.dv);
    cp_async_commit();
  }

  DEVICE void load_queries_and_keys(const At& at) const {
    const int end = band_of(p, at.b, p.M, p.N).end;
    load<Queries, BLOCK_M>(QUERIES, p.q, p.q_stride, at.b, at.h, at.m, p.M, p.d);
    load<Keys, BLOCK_N>(KEYS, p.k, p.k_stride, at.b, at.h / p.group, at.n, end, p.d);
    cp_async_commit();
  }

  DEVICE void clear_padding(int queries, int keys, int d) const {
    if (d == D) return;
    Copier<Queries, THREADS>::template clear_padding<BLOCK_M>(shared + queries, d);
    Copier<Keys, THREADS>::template clear_padding<BLOCK_N>(shared + keys, d);
  }

  DEVICE void multiply(float (&c)[1][PARTS][4], int own, int tile) const {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Operand<T> a[1] = {left_operand<T, Queries>(own_lane, own, step)};
      multiply_rows<T, Keys>(c, a, row_lane, tile, step);
    }
  }

  DEVICE Terms terms_of(const At& at, int m) const {
    if (m >= p.M) return {INFINITY, 0.0f, 0.0f};
    const int64_t i = at.b * p.terms.stride[0] + at.h * p.terms.stride[1] + m;
    return {p.terms.lse2[i], p.terms.rest[i], p.terms.delta[i]};
  }

  DEVICE void run() {
    clear_padding(QUERIES, KEYS, p.d);
    clear_padding(GRADS, VALUES, p.dv);
    At at{b0, h0, m0, n0};
    bool any = find(at, true);
    if (any) load_grads_and_values(at);
    if (any) load_queries_and_keys(at);
    cp_async_wait<1>();
    __syncthreads();
    while (any) {
      At then = at;
      const bool more = find(then, next(then));
      float s[1][PARTS][4] = {}, dp[1][PARTS][4] = {};
      multiply(dp, GRADS, VALUES);
      cp_async_wait<0>();
      __syncthreads();  // q and k are there for all, and nobody reads do and v any more
      if (more) load_grads_and_values(then);
      multiply(s, QUERIES, KEYS);
      fold(at, s, dp);
      cp_async_wait<0>();
      __syncthreads();  // the next do and v are there for all, and nobody reads q and k any more
      if (more) load_queries_and_keys(then);
      at = then, any = more;
    }
    cp_async_wait<0>();
    __syncthreads();
    store();
  }

  DEVICE void fold(const At& at, float (&s)[1][PARTS][4], float (&dp)[1][PARTS][4]) {
    const Terms own[2] = {terms_of(at, at.m + row0), terms_of(at, at.m + row0 + 8)};
    const auto of_rows = [&](int) {
      return [&](int, int j) -> const Terms& { return own[j / 2]; };
    };
    const auto add = [&](int, int part, int j, float, float ds, int, int) { total[part][j] += ds; };
    const Band band = band_of(p, at.b, p.M, p.N);
    const Pairs<false> pairs{at.m + row0, at.n + static_cast<int>(threadIdx.x % 4 * 2)};
    OptionPairs(p, band, at.b, at.h)
        .gradients<false, true, true>(s, dp, p, pairs, of_rows, true, 0, at.n, add);
  }

  /// Write the sums by way of shared memory, where those of rows and columns that are not apart are
  /// summed in one order.
  DEVICE void store() const {
    auto* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      for (int row = 0; row < 2; ++row) {
        *reinterpret_cast<float2*>(sums + (row0 + 8 * row) * TOTAL_ROW + 8 * part +
                                   threadIdx.x % 4 * 2) = {total[part][2 * row],
                                                           total[part][2 * row + 1]};
      }
    }
    __syncthreads();
    const int rows = p.rows_apart ? m1 - m0 : 1, columns = p.columns_apart ? n1 - n0 : 1;
    const int sum_rows = p.rows_apart ? 1 : BLOCK_M, sum_columns = p.columns_apart ? 1 : BLOCK_N;
    const int64_t start = b0 / p.sharing_batches * p.dmask_stride[0] +
                          blockIdx.y * p.dmask_stride[1] +
                          (p.rows_apart ? m0 : 0) * p.dmask_stride[2] + (p.columns_apart ? n0 : 0);
    for (int i = threadIdx.x; i < rows * columns; i += THREADS) {
      const int m = i / columns, n = i % columns;
      float sum = 0.0f;
      for (int r = 0; r < sum_rows; ++r) {
        for (int c = 0; c < sum_columns; ++c) sum += sums[(m + r) * TOTAL_ROW + n + c];
      }
      write(start + m * p.dmask_stride[2] + n, sum);
    }
  }

  DEVICE void write(int64_t at, float x) const {
    switch (p.dmask_kind) {
      case 0:
        static_cast<float*>(p.d_mask)[at] = x;
        break;
      case 1:
        static_cast<bf16*>(p.d_mask)[at] = __float2bfloat16(x);
        break;
      default:
        static_cast<fp16*>(p.d_mask)[at] = __float2half(x);
    }
  }
};

}  // namespace

/// Grid: tiles of the mask and sequences that do not share it, heads that do not.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    dmask(const __grid_constant__ AttentionGradient p) {
  extern __shared__ __align__(1024) char shared[];
  MaskGradient<ELEMENT, HEAD_SIZE>(p, shared).run();
}

}  // namespace pyfuse::cuda
