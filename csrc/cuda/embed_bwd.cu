// The embedding sum's gradient through dropout and norm, for sm_80 and later. With
// n = (e - mean) · rstd, g = dropout(dy), h = g · weight
//
//   d(sum of rows) = rstd · (h - mean(h) - n · mean(h · n))
//   dnorm_weight = Σ_tokens g · n,   dnorm_bias = Σ_tokens g
//
// in float32; the rows of e are looked up again. Each of `slots` rows of threads has every so many
// tokens, and writes its share of the last two. What each row of a table gets of the first, or of
// dy where there is no norm: row_sums.cu.
//
// Compiled once for each ELEMENT (f32, bf16, f16).
#include "embed.cuh"

namespace pyfuse::cuda {
namespace {

template <typename T, int V>
DEVICE void arriving(float (&g)[V], const EmbedBackward& p, int t, int column) {
  Vector<T, V> dy;
  dy.load(static_cast<const T*>(p.dy) + t * p.dy_stride + column);
  dy.unpack(g);
  drop(g, p.dropout, t, column);
}

/// n of V columns of a token; steps() are those of a sinusoid.
template <typename T, int V, class Find>
DEVICE void normalised(float (&n)[V], const EmbedBackward& p, const Sources<T>& sources,
                       float2 statistics, int column, Find steps) {
  sum_rows(n, sources, column);
  if (p.turns != nullptr) steps().add_to(n, sources.place, column);
#pragma unroll
  for (int i = 0; i < V; ++i) n[i] = (n[i] - statistics.x) * statistics.y;
}

/// N times V columns of a row for each of its threads.
template <typename T, int V, int N>
struct ThroughNorm {
  const EmbedBackward& p;
  RowThreads threads;
  const int first, last;  // columns
  const Common<V> common;
  float weight_sum[N][V] = {}, bias_sum[N][V] = {}, g[N][V], n[N][V];

  DEVICE ThroughNorm(const EmbedBackward& p, float* shared)
      : p(p),
        threads(p.threads),
        first(blockIdx.y * p.threads * V * N),
        last(min(first + p.threads * V * N, p.d)),
        common(shared, p.dsum != nullptr, last - first) {
    common.fill(p, p.dsum != nullptr, first, last - first);
  }

  DEVICE int column(int i) const { return first + (threads.index + i * threads.size) * V; }

  DEVICE void run() {
    const int slot0 = blockIdx.x * (blockDim.x / threads.size), slot = slot0 + threads.row;
    for (int64_t t0 = slot0; t0 < p.tokens; t0 += p.slots) {
      const int64_t own = slot < p.slots ? t0 + threads.row : p.tokens;
      const int t = static_cast<int>(min(own, int64_t{p.tokens}));
      look_up(t);
      if (p.dsum != nullptr) write_dsum(t);
    }
    if (p.sums == nullptr || slot >= p.slots) return;
    float* const to = p.sums + static_cast<int64_t>(slot) * 2 * p.d;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= last) continue;
      store_floats(to + column(i), weight_sum[i]);
      store_floats(to + p.d + column(i), bias_sum[i]);
    }
  }

  DEVICE void look_up(int t) {
    const Sources<T> sources(p, t);
    const float2 statistics =
        t < p.tokens ? reinterpret_cast<const float2*>(p.statistics)[t] : float2{0.f, 0.f};
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) g[i][j] = n[i][j] = 0.f;
      if (t >= p.tokens || column(i) >= last) continue;
      arriving<T>(g[i], p, t, column(i));
      normalised(n[i], p, sources, statistics, column(i),
                 [&] { return common.steps(column(i) - first); });
#pragma unroll
      for (int j = 0; j < V; ++j) {
        weight_sum[i][j] = fmaf(g[i][j], n[i][j], weight_sum[i][j]);
        bias_sum[i][j] += g[i][j];
      }
    }
  }

  DEVICE void write_dsum(int t) {
    float along = 0.f, level = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float w[V] = {};
      if (column(i) < last) common.weight.read(w, column(i));
#pragma unroll
      for (int j = 0; j < V; ++j) {
        g[i][j] *= w[j];
        along = fmaf(g[i][j], n[i][j], along);
        level += g[i][j];
      }
    }
    const float share = 1.f / p.d;
    along = threads.sum(along) * share, level = threads.sum(level) * share;
    if (t >= p.tokens) return;
    const float rstd = p.statistics[2 * static_cast<int64_t>(t) + 1];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (column(i) >= last) continue;
#pragma unroll
      for (int j = 0; j < V; ++j) g[i][j] = rstd * (g[i][j] - level - n[i][j] * along);
      store_floats(p.dsum + static_cast<int64_t>(t) * p.d + column(i), g[i]);
    }
  }
};

/// d(sum of rows) of rows of any width; a block has a row, and goes through it twice.
template <typename T, int V>
struct ThroughWideNorm {
  const EmbedBackward& p;
  RowThreads threads;

  DEVICE ThroughWideNorm(const EmbedBackward& p, float*) : p(p), threads(blockDim.x) {}

  DEVICE void run() {
    for (uint32_t t = blockIdx.x; t < p.tokens; t += gridDim.x) {
      const Sources<T> sources(p, t);
      const float2 statistics = reinterpret_cast<const float2*>(p.statistics)[t];
      float along = 0.f, level = 0.f, g[V], n[V];
      for (int column = threads.index * V; column < p.d; column += blockDim.x * V) {
        look_up(g, n, sources, statistics, t, column);
#pragma unroll
        for (int j = 0; j < V; ++j) along = fmaf(g[j], n[j], along), level += g[j];
      }
      along = threads.sum(along) / p.d, level = threads.sum(level) / p.d;
      for (int column = threads.index * V; column < p.d; column += blockDim.x * V) {
        look_up(g, n, sources, statistics, t, column);
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] = statistics.y * (g[j] - level - n[j] * along);
        store_floats(p.dsum + static_cast<int64_t>(t) * p.d + column, g);
      }
    }
  }

  DEVICE void look_up(float (&g)[V], float (&n)[V], const Sources<T>& sources, float2 statistics,
                      int t, int column) const {
    arriving<T>(g, p, t, column);
    normalised(n, p, sources, statistics, column, [&] {
      Steps<V> steps;
      steps.load(p.turns, column);
      return steps;
    });
    float w[V];
    read_vector(w, p.norm_weight, column);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] *= w[j];
  }
};

template <class Kernel>
DEVICE void run(const EmbedBackward& p) {
  extern __shared__ __align__(16) float shared[];
  Kernel(p, shared).run();
}

constexpr int MOST_THREADS = 512;

}  // namespace

/// Grid: blocks for all slots; stretches of the columns, one where dsum is wanted. Those without
/// `elements` need rows that start at multiples of four elements, and are so long: a thread takes
/// four, so that in float32 it writes 16 bytes.
extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    through_norm(const __grid_constant__ EmbedBackward p) {
  run<ThroughNorm<ELEMENT, 4, 4>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    through_norm_elements(const __grid_constant__ EmbedBackward p) {
  run<ThroughNorm<ELEMENT, 1, 8>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    through_norm_wide(const __grid_constant__ EmbedBackward p) {
  run<ThroughWideNorm<ELEMENT, 4>>(p);
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS)
    through_norm_wide_elements(const __grid_constant__ EmbedBackward p) {
  run<ThroughWideNorm<ELEMENT, 1>>(p);
}

}  // namespace pyfuse::cuda
