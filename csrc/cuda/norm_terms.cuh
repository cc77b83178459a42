// Of the norms' gradients: what a thread has of a row, and what rows add to those of the
// parameters.
#pragma once

#include "norm_row.cuh"
#include "norm_statistics.cuh"

namespace pyfuse::cuda {

/// A thread's chunks of a row: n, and dy (times the weight, when asked).
template <int UNIT, int N>
struct Terms {
  float n[N][UNIT], g[N][UNIT];

  DEVICE void make(const NormBackward& p, const Raw<UNIT> (&x)[N], const Raw<UNIT> (&residual)[N],
                   const Raw<UNIT> (&dy)[N], float mean, float rstd, int64_t row,
                   const Part<UNIT>& part, int first = 0) {
    make_z<UNIT, N>(n, p, x, residual, p.drop, row, part, first);
    for_each<UNIT, N>(n, [&](float z, int, int) { return (z - mean) * rstd; });
    unpack<UNIT, N>(g, dy, p.dy.dtype);
  }

  /// Σ g · n and Σ g. Beyond column d g is 0.
  DEVICE void add_to(float (&s)[2]) const {
#pragma unroll
    for (int i = 0; i < N * UNIT; ++i) {
      const float x = g[i / UNIT][i % UNIT];
      s[0] = fmaf(x, n[i / UNIT][i % UNIT], s[0]), s[1] += x;
    }
  }

  /// dz' in g's place, and to memory. dz: what fetch() found.
  DEVICE void finish(const NormBackward& p, const Raw<UNIT> (&dz)[N], float slope, float offset,
                     float rstd, int64_t row, bool mine, const Part<UNIT>& part, int first = 0) {
    for_each<UNIT, N>(g,
                      [&](float x, int c, int i) { return rstd * (x - offset - n[c][i] * slope); });
    if (p.dz.data != nullptr) {
      unpack<UNIT, N>(n, dz, p.dz.dtype);
      for_each<UNIT, N>(g, [&](float x, int c, int i) { return x + n[c][i]; });
    }
    if (mine && p.dresidual.data != nullptr) write<UNIT, N>(p.dresidual, row, g, part, first);
    if (p.dx.data == nullptr) return;
    if (p.threshold != 0) drop<UNIT, N>(g, p, row, part, first);
    if (mine) write<UNIT, N>(p.dx, row, g, part, first);
  }
};

/// To shared memory, in one access.
template <int WORDS>
DEVICE void keep_words(float* to, const float (&v)[WORDS]) {
  if constexpr (WORDS == 4) {
    *reinterpret_cast<float4*>(to) = {v[0], v[1], v[2], v[3]};
  } else {
    static_assert(WORDS == 1);
    *to = v[0];
  }
}

/// What rows add to the parameters' gradients.
template <int UNIT, int N>
struct ParameterSums {
  float weight[N][UNIT] = {}, bias[N][UNIT] = {};

  DEVICE void add(const Terms<UNIT, N>& t) {
    for_each<UNIT, N>(weight, [&](float s, int c, int i) { return fmaf(t.g[c][i], t.n[c][i], s); });
    for_each<UNIT, N>(bias, [&](float s, int c, int i) { return s + t.g[c][i]; });
  }

  /// This block's row of sums, those of its groups of threads one after another.
  DEVICE void store(const NormBackward& p, const Part<UNIT>& part, int first = 0) {
    const int groups = blockDim.x / part.lanes;
    if (groups > 1) {
      __syncthreads();  // nobody reads other sums any more
      if (p.dweight != nullptr) leave(weight, 0);
      if (p.dbias != nullptr) leave(bias, N * UNIT / WORDS);
      __syncthreads();
      if (threadIdx.x >= part.lanes) return;
      for (int g = 1; g < groups; ++g) {
        if (p.dweight != nullptr) collect(weight, 0, g * part.lanes);
        if (p.dbias != nullptr) collect(bias, N * UNIT / WORDS, g * part.lanes);
      }
    }
    if (p.dweight != nullptr) write_sums(p.dweight, weight, part, first);
    if (p.dbias != nullptr) write_sums(p.dbias, bias, part, first);
  }

 private:
  static constexpr int WORDS = UNIT == 1 ? 1 : 4;  // of an access
  using Words = float[WORDS];

  /// Where a thread has access i to shared memory, side by side with the other threads.
  static DEVICE float* place(int i, int thread) {
    extern __shared__ float4 shared[];
    return reinterpret_cast<float*>(shared) + (i * blockDim.x + thread) * WORDS;
  }

  static DEVICE Words& words(float (&v)[N][UNIT], int i) {
    return reinterpret_cast<Words&>(v[i * WORDS / UNIT][i * WORDS % UNIT]);
  }

  static DEVICE void leave(float (&v)[N][UNIT], int first) {
#pragma unroll
    for (int i = 0; i < N * UNIT / WORDS; ++i)
      keep_words(place(first + i, threadIdx.x), words(v, i));
  }

  static DEVICE void collect(float (&v)[N][UNIT], int first, int other) {
#pragma unroll
    for (int i = 0; i < N * UNIT / WORDS; ++i) {
      const float* from = place(first + i, other + threadIdx.x);
#pragma unroll
      for (int j = 0; j < WORDS; ++j) words(v, i)[j] += from[j];
    }
  }

  static DEVICE void write_sums(float* to, float (&v)[N][UNIT], const Part<UNIT>& part, int first) {
    to += int64_t(blockIdx.x) * part.d;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      if (UNIT == 8 && part.lanes >= 32) {
        write_pair(to, words(v, 2 * c), words(v, 2 * c + 1), part.column(first + c), part.d);
        continue;
      }
      if (!part.has(first + c)) continue;
#pragma unroll
      for (int i = 0; i < UNIT; i += WORDS)
        store_unit<WORDS>(to + part.column(first + c) + i, words(v, (c * UNIT + i) / WORDS));
    }
  }

  /// Both halves of 32 bytes, and so whole sectors by one instruction: neighbours exchange one
  /// half.
  static DEVICE void write_pair(float* to, Words& low, Words& high, int column, int d) {
    const bool odd = threadIdx.x & 1;
#pragma unroll
    for (int j = 0; j < WORDS; ++j) {
      const float got = __shfl_xor_sync(~0u, odd ? low[j] : high[j], 1);
      if (odd) {
        low[j] = got;
      } else {
        high[j] = got;
      }
    }
    const int even = odd ? column - UNIT : column;
    if (even < d) store_unit<WORDS>(to + even + odd * WORDS, low);
    if (even + UNIT < d) store_unit<WORDS>(to + even + UNIT + odd * WORDS, high);
  }
};

}  // namespace pyfuse::cuda
