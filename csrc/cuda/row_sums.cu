// The gradient of a table of which rows were looked up, for sm_80 and later:
//
//   out[v] = scale · Σ_{j: id(j) = v} rows[token(j)],   id ascending in j
//
// A warp adds up CHUNK neighbours j. Runs of one id that lie inside of its chunk are whole, and go
// to the table; the first and the last may go on in other chunks: their sums are the rows of the
// next launch, which does the same with them. So no id, however often it occurs, is summed up by
// one warp alone, every sum has one order, and nothing is atomic.
//
// Compiled once for each ELEMENT (f32, bf16, f16) of the table.
#include "embed.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int CHUNK = 64;
constexpr int SUM_WARPS = 4;
constexpr int AHEAD = 8;  // rows that a lane has under way

DEVICE int64_t number_at(const void* x, int bytes, int i) {
  switch (bytes) {
    case 1:
      return static_cast<const int8_t*>(x)[i];
    case 2:
      return static_cast<const int16_t*>(x)[i];
    case 4:
      return static_cast<const int32_t*>(x)[i];
    default:
      return static_cast<const int64_t*>(x)[i];
  }
}

/// V columns of a chunk's rows, of type From, whose sums are of type T.
template <typename From, typename T, int V>
struct SumRows {
  const RowSums& p;
  int lane, chunk, column, start, end;
  int64_t first, current;  // ids of the chunk's first run, and of the one that is summed up
  float run[V] = {};

  DEVICE explicit SumRows(const RowSums& p) : p(p) {
    const int warp = blockIdx.x * SUM_WARPS + threadIdx.x / 32;
    lane = threadIdx.x % 32;
    chunk = warp / p.stretches;
    column = (warp - chunk * p.stretches) * 32 * V + lane * V;
    start = chunk * CHUNK, end = min(start + CHUNK, p.count);
  }

  DEVICE int64_t id_of(int j) const {
    const int i = j / p.repeat;
    return p.ids == nullptr ? i : number_at(p.ids, p.id_bytes, i);
  }

  DEVICE int token_of(int j) const {
    const int i = j / p.repeat;
    return (p.order == nullptr ? i : static_cast<int>(p.order[i])) + (j - i * p.repeat) * p.length;
  }

  DEVICE void sum() {
    if (start >= p.count) return;
    first = current = id_of(start);
    for (int j0 = start; j0 < end; j0 += 32) {
      const int own = min(j0 + lane, end - 1);  // a lane finds out about one row, for all
      const int64_t id = id_of(own);
      const int token = token_of(own);
      int64_t before = __shfl_up_sync(~0u, id, 1);
      if (lane == 0) before = current;
      const uint32_t begins = __ballot_sync(~0u, id != before);
      const int rows = min(end - j0, 32);
      for (int k0 = 0; k0 < rows; k0 += AHEAD) add(k0, rows, begins, id, token);
    }
    finish();
  }

  /// Rows [k0, k0 + AHEAD) of 32.
  DEVICE void add(int k0, int rows, uint32_t begins, int64_t id, int token) {
    Vector<From, V> x[AHEAD];
    int tokens[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      tokens[a] = __shfl_sync(~0u, token, k0 + a);
      if (k0 + a < rows && column < p.d)
        x[a].load(static_cast<const From*>(p.rows) + tokens[a] * p.stride + column);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) {
      if (k0 + a >= rows) break;
      if (begins >> (k0 + a) & 1) {
        end_run();
        current = __shfl_sync(~0u, id, k0 + a);
      }
      float y[V];
      x[a].unpack(y);
      drop(y, p.dropout, tokens[a], column);
#pragma unroll
      for (int i = 0; i < V; ++i) run[i] += y[i];
    }
  }

  /// What is summed up goes to the table, or to the edges if it may go on in the chunk before.
  DEVICE void end_run() {
    if (p.edges != nullptr && current == first) {
      store_edge(0);
    } else {
      store_row();
    }
#pragma unroll
    for (int i = 0; i < V; ++i) run[i] = 0.f;
  }

  DEVICE void finish() {
    if (p.edges == nullptr) return store_row();
    if (current == first) end_run();
    store_edge(1);
    if (lane != 0 || column != 0) return;
    if (p.id_bytes == 8) {
      static_cast<int64_t*>(p.edge_ids)[2 * chunk] = first;
      static_cast<int64_t*>(p.edge_ids)[2 * chunk + 1] = current;
    } else {
      static_cast<int32_t*>(p.edge_ids)[2 * chunk] = static_cast<int>(first);
      static_cast<int32_t*>(p.edge_ids)[2 * chunk + 1] = static_cast<int>(current);
    }
  }

  DEVICE void store_edge(int which) const {
    if (column >= p.d) return;
    store_floats(p.edges + (2 * static_cast<int64_t>(chunk) + which) * p.d + column, run);
  }

  DEVICE void store_row() const {
    if (column >= p.d || current < 0 || current >= p.height) return;
    float y[V];
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = run[i] * p.scale;
    Vector<T, V> v;
    v.pack_from(y);
    v.store(static_cast<T*>(p.out) + current * p.d + column);
  }
};

}  // namespace

/// Grid: a warp for each chunk and each stretch of 32 lanes' columns. Rows are of ELEMENT, or of
/// float32.
extern "C" __global__ void __launch_bounds__(32 * SUM_WARPS, 5)
    sum_own(const __grid_constant__ RowSums p) {
  SumRows<ELEMENT, ELEMENT, 4>(p).sum();
}

extern "C" __global__ void __launch_bounds__(32 * SUM_WARPS, 5)
    sum_own_elements(const __grid_constant__ RowSums p) {
  SumRows<ELEMENT, ELEMENT, 1>(p).sum();
}

extern "C" __global__ void __launch_bounds__(32 * SUM_WARPS, 5)
    sum_f32(const __grid_constant__ RowSums p) {
  SumRows<float, ELEMENT, 4>(p).sum();
}

extern "C" __global__ void __launch_bounds__(32 * SUM_WARPS, 5)
    sum_f32_elements(const __grid_constant__ RowSums p) {
  SumRows<float, ELEMENT, 1>(p).sum();
}

}  // namespace pyfuse::cuda
