// The sum that a transformer starts with, for sm_80 and later: for each token
//
//   e = dropout(norm(scale · weight[token] + position row + segment row))
//
// rounded once; norm is LayerNorm or nothing. Position rows are learned, or sinusoids (Vaswani et
// al., arXiv:1706.03762) of angles exact at any position.
//
// Blocks stay and go from token to token. A thread has N times V columns of a row in registers, V
// of them 16 bytes, and what all tokens share, the norm's parameters and the angles' steps, lies in
// shared memory: tables and parameters are read, and e is written, once. Kernels called wide take
// the norm of rows that have more columns than a block holds: they go through them three times.
//
// Compiled once for each ELEMENT (f32, bf16, f16).
#include "embed.cuh"

namespace pyfuse::cuda {
namespace {

template <typename T, int V, int N, bool NORM>
struct Gather {
  const EmbedForward& p;
  RowThreads threads;
  const int first, last;  // columns
  const Common<V> common;
  float e[N][V];

  DEVICE Gather(const EmbedForward& p, float* shared)
      : p(p),
        threads(p.threads),
        first(blockIdx.y * p.threads * V * N),
        last(min(first + p.threads * V * N, p.d)),
        common(shared, NORM ? 2 : 0, last - first) {
    common.fill(p, NORM ? 2 : 0, first, last - first);
  }

  /// Of the thread's n-th part; `last` or more where it has none.
  DEVICE int column(int n) const { return first + (threads.index + n * threads.size) * V; }

  DEVICE void run() {
    const int rows = blockDim.x / threads.size;
    for (int64_t t0 = blockIdx.x * rows; t0 < p.tokens; t0 += gridDim.x * rows) {
      const int t = static_cast<int>(min(t0 + threads.row, int64_t{p.tokens}));
      look_up(t);
      if constexpr (NORM) normalise(t);
      if (t >= p.tokens) continue;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (column(n) >= last) continue;
        drop(e[n], p.dropout, t, column(n));
        Vector<T, V> y;
        y.pack_from(e[n]);
        y.store(static_cast<T*>(p.y) + static_cast<int64_t>(t) * p.d + column(n));
      }
    }
  }

  DEVICE void look_up(int t) {
    const Sources<T> sources(p, t);
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < V; ++i) e[n][i] = 0.f;
      if (column(n) < last) sum_rows(e[n], sources, column(n));
    }
    if (p.turns == nullptr) return;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (column(n) < last) common.steps(column(n) - first).add_to(e[n], sources.place, column(n));
    }
  }

  DEVICE void normalise(int t) {
    const float share = 1.f / p.d;
    float sum = 0.f, squares = 0.f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum += e[n][i];
    }
    const float mean = threads.sum(sum) * share;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        e[n][i] = column(n) < last ? e[n][i] - mean : 0.f;
        squares = fmaf(e[n][i], e[n][i], squares);
      }
    }
    const float rstd = rsqrtf(threads.sum(squares) * share + p.eps);
    if (p.statistics != nullptr && threads.index == 0 && t < p.tokens)
      reinterpret_cast<float2*>(p.statistics)[t] = {mean, rstd};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (column(n) >= last) continue;
      float w[V], b[V];
      common.weight.read(w, column(n));
      common.bias.read(b, column(n));
#pragma unroll
      for (int i = 0; i < V; ++i) e[n][i] = fmaf(e[n][i] * rstd, w[i], b[i]);
    }
  }
};

/// The norm of rows of any width; a block has a row.
template <typename T, int V>
struct GatherWide {
  const EmbedForward& p;
  RowThreads threads;

  DEVICE GatherWide(const EmbedForward& p, float*) : p(p), threads(blockDim.x) {}

  DEVICE void run() {
    for (uint32_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
      const Sources<T> sources(p, t);
      float sum = 0.f, squares = 0.f, e[V];
      for (int column = threads.index * V; column < p.d; column += blockDim.x * V) {
        look_up(e, sources, column);
#pragma unroll
        for (int i = 0; i < V; ++i) sum += e[i];
      }
      const float mean = threads.sum(sum) / p.d;
      for (int column = threads.index * V; column < p.d; column += blockDim.x * V) {
        look_up(e, sources, column);
#pragma unroll
        for (int i = 0; i < V; ++i) squares = fmaf(e[i] - mean, e[i] - mean, squares);
      }
      const float rstd = rsqrtf(threads.sum(squares) / p.d + p.eps);
      if (p.statistics != nullptr && threads.index == 0)
        reinterpret_cast<float2*>(p.statistics)[t] = {mean, rstd};
      for (int column = threads.index * V; column < p.d; column += blockDim.x * V) {
        look_up(e, sources, column);
        float w[V], b[V] = {};
        read_vector(w, p.norm_weight, column);
        if (p.norm_bias.data != nullptr) read_vector(b, p.norm_bias, column);
#pragma unroll
        for (int i = 0; i < V; ++i) e[i] = fmaf((e[i] - mean) * rstd, w[i], b[i]);
        drop(e, p.dropout, t, column);
        Vector<T, V> y;
        y.pack_from(e);
        y.store(static_cast<T*>(p.y) + static_cast<int64_t>(t) * p.d + column);
      }
    }
  }

  DEVICE void look_up(float (&e)[V], const Sources<T>& sources, int column) const {
    sum_rows(e, sources, column);
    if (p.turns == nullptr) return;
    Steps<V> steps;
    steps.load(p.turns, column);
    steps.add_to(e, sources.place, column);
  }
};

template <class Kernel>
DEVICE void run(const EmbedForward& p) {
  extern __shared__ __align__(16) float shared[];
  Kernel(p, shared).run();
}

constexpr int V = 16 / sizeof(ELEMENT);
constexpr int THREADS = 256, MOST_THREADS = 512;

}  // namespace

/// Grid: blocks that share the tokens; stretches of the columns. Those without `elements` need rows
/// that start at multiples of 16 bytes and are so long.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gather(const __grid_constant__ EmbedForward p) {
  run<Gather<ELEMENT, V, 4, false>>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    gather_elements(const __grid_constant__ EmbedForward p) {
  run<Gather<ELEMENT, 1, 8, false>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    gather_norm(const __grid_constant__ EmbedForward p) {
  run<Gather<ELEMENT, V, 4, true>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    gather_norm_elements(const __grid_constant__ EmbedForward p) {
  run<Gather<ELEMENT, 1, 8, true>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    gather_norm_wide(const __grid_constant__ EmbedForward p) {
  run<GatherWide<ELEMENT, V>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1)
    gather_norm_wide_elements(const __grid_constant__ EmbedForward p) {
  run<GatherWide<ELEMENT, 1>>(p);
}

}  // namespace pyfuse::cuda
