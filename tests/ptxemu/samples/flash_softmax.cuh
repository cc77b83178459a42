// The softmax between the two products of FlashAttention, on scores in registers.
//
// A warp holds 16 rows as mma() of primitives.cuh leaves them: with g = lane / 4 and t = lane % 4,
// part n of a lane is (g, 8n + 2t), (g, 8n + 2t + 1), (g + 8, 8n + 2t), (g + 8, 8n + 2t + 1).
// m, l and the like are of rows g and g + 8.
#pragma once

#include "primitives.cuh"

/// How many keys row m sees: the first so many.
DEVICE int visible_keys(int m, int M, int N, bool causal) {
  return causal ? max(0, min(N, m + 1 + N - M)) : N;
}

/// Hide the scores of the keys that a row does not see: of this tile's keys, row g sees the first
/// `visible` and row g + 8 the first `visible_below`.
template <int PARTS>
DEVICE void mask(float (&s)[PARTS][4], int visible, int visible_below) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < PARTS; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n * 8 + i % 2 >= (i < 2 ? visible : visible_below) - column) s[n][i] = -INFINITY;
    }
  }
}

/// The sum or maximum of the four lanes that share a row.
template <class Combine>
DEVICE float over_row(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(~0u, x, 1));
  return combine(x, __shfl_xor_sync(~0u, x, 2));
}

/// Fold scores s into the running maximum m and sum l (each lane's own part of it) and turn s into
/// weights exp(scale * (s - m)). What was summed up before has to be multiplied by `correction`.
/// m is that of the unscaled scores, so that scaling and subtracting is one FFMA.
template <bool MASKED, int PARTS>
DEVICE void softmax_step(float (&s)[PARTS][4], float (&correction)[2], float (&m)[2], float (&l)[2],
                         float scale_log2) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = m[row];
    for (auto& part : s) top = fmaxf(top, fmaxf(part[2 * row], part[2 * row + 1]));
    top = over_row(top, fmaxf);
    // A row that has seen no key yet must not give inf - inf.
    const float pivot = (MASKED && top == -INFINITY ? 0.0f : top) * scale_log2;
    correction[row] = exp2_approx(fmaf(m[row], scale_log2, -pivot));
    m[row] = top;
    l[row] *= correction[row];
    for (auto& part : s) {
      for (int i = 2 * row; i < 2 * row + 2; ++i) {
        part[i] = exp2_approx(fmaf(part[i], scale_log2, -pivot));
        l[row] += part[i];
      }
    }
  }
}

template <int PARTS>
DEVICE void scale_rows(float (&o)[PARTS][4], const float (&factor)[2]) {
  for (auto& part : o) {
    for (int i = 0; i < 4; ++i) part[i] *= factor[i / 2];
  }
}

/// Divide o by the sums and write lse = ln sum exp(scale * s) of the warp's rows, of which `inside`
/// exist. A row without keys gives o = 0 and lse = -inf.
template <int PARTS>
DEVICE void softmax_end(float (&o)[PARTS][4], const float (&m)[2], const float (&l)[2], float scale,
                        float* lse, int inside) {
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = over_row(l[i], [](float x, float y) { return x + y; });
    const int row = threadIdx.x % 32 / 4 + 8 * i;
    if (threadIdx.x % 4 == 0 && row < inside) {
      lse[row] = sum == 0.0f ? -INFINITY : fmaf(m[i], scale, logf(sum));
    }
    inverse[i] = sum == 0.0f ? 0.0f : 1.0f / sum;
  }
  scale_rows(o, inverse);
}
