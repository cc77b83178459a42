// The online softmax of FlashAttention: scores come tile by tile, and what they weigh is summed up
// along the way. (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691)
//
//   m = max s,   l = sum exp2(scale (s - m)),   o = sum exp2(scale (s - m)) v
//
// When a tile holds a larger score than all before, l and o are for the old m and have to shrink by
// exp2(scale (m_old - m)). That is put off until the new maximum is SLACK powers of 2 above: until
// then weights are above 1, with the same relative precision, and o / l is the same. So the usual
// tile costs no multiplication of o at all.
//
// A warp holds rows as product.cuh leaves them: row 0 and 1 of each 16 are g and g + 8.
#pragma once

#include "primitives.cuh"

namespace pyfuse::cuda {

/// The sum or maximum of the four lanes that share a row.
template <class Combine>
DEVICE float over_row(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(~0u, x, 1));
  return combine(x, __shfl_xor_sync(~0u, x, 2));
}

constexpr float LN2 = 0.69314718f;

/// What the sums l and o of a row's weights are multiplied by for the result, and its lse. A sink
/// (in units of log 2; -inf: none) is a key without a value.
struct Finish {
  float factor, lse;

  DEVICE Finish(float m, float l, float sink) {
    const bool none = l == 0.0f;
    const float base = none ? sink : fmaxf(m, sink);
    const float share = none ? 0.0f : exp2_approx(m - base);
    const float sum = fmaf(l, share, sink == -INFINITY ? 0.0f : exp2_approx(sink - base));
    lse = sum == 0.0f ? -INFINITY : fmaf(base, LN2, logf(sum));
    factor = none ? 0.0f : share / sum;
  }
};

/// The running maxima and sums of a warp's 16 MT rows.
template <int MT>
struct Softmax {
  static constexpr float SLACK = 8.0f;  // weights up to 2^8: half precision holds sums of them

  float pivot[MT][2];  // scale m
  float l[MT][2];      // the part of it that this lane's columns have

  DEVICE Softmax() {
    for (int i = 0; i < MT; ++i) {
      pivot[i][0] = pivot[i][1] = -INFINITY;
      l[i][0] = l[i][1] = 0.0f;
    }
  }

  /// Turn scores into weights exp2(scale (s - m)) and add them to l. `o` are sums of what older
  /// weights have weighed. GUARDED: rows may have seen no key yet.
  template <bool GUARDED, int PARTS, int OUT>
  DEVICE void step(float (&s)[MT][PARTS][4], float (&o)[MT][OUT][4], float scale) {
    step<GUARDED>(s, scale, [&](const float (&by)[MT][2]) { shrink(o, by); });
  }

  /// The same; shrink(by) is called by a whole warp where its o have to shrink by these factors.
  template <bool GUARDED, int PARTS, class Shrink>
  DEVICE void step(float (&s)[MT][PARTS][4], float scale, Shrink shrink) {
    float top[MT][2];
    bool higher = false;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float x = fmaxf(s[i][0][2 * row], s[i][0][2 * row + 1]);
#pragma unroll
        for (int n = 1; n < PARTS; ++n) x = fmaxf(x, fmaxf(s[i][n][2 * row], s[i][n][2 * row + 1]));
        top[i][row] = over_row(x, fmaxf);
        higher |= fmaf(top[i][row], scale, -pivot[i][row]) > SLACK;
      }
    }
    if (__any_sync(~0u, higher)) rise(top, scale, shrink);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        // A row that has seen no key yet must not give inf - inf.
        const float base = GUARDED && pivot[i][row] == -INFINITY ? 0.0f : pivot[i][row];
#pragma unroll
        for (int n = 0; n < PARTS; ++n) {
          for (int j = 2 * row; j < 2 * row + 2; ++j) {
            s[i][n][j] = exp2_approx(fmaf(s[i][n][j], scale, -base));
            l[i][row] += s[i][n][j];
          }
        }
      }
    }
  }

  template <int OUT>
  static DEVICE void shrink(float (&o)[MT][OUT][4], const float (&by)[MT][2]) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int n = 0; n < OUT; ++n) {
        for (int j = 0; j < 4; ++j) o[i][n][j] *= by[i][j / 2];
      }
    }
  }

  /// Divide o by the sums, times `factor`, and give lse = ln sum exp of each row, in which the
  /// `sink` counts (in units of log 2; -inf: none). A row without keys gets o = 0.
  template <int OUT>
  DEVICE void end(float (&o)[MT][OUT][4], float (&lse)[MT][2], float sink, float factor) {
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      float inverse[2];
      for (int row = 0; row < 2; ++row) {
        const float keys = over_row(l[i][row], [](float x, float y) { return x + y; });
        const Finish finish(pivot[i][row], keys, sink);
        lse[i][row] = finish.lse;
        inverse[row] = finish.factor * factor;
      }
#pragma unroll
      for (int n = 0; n < OUT; ++n) {
        for (int j = 0; j < 4; ++j) o[i][n][j] *= inverse[j / 2];
      }
    }
  }

 private:
  /// Take new maxima, and shrink what was summed up for the old ones.
  template <class Shrink>
  DEVICE void rise(const float (&top)[MT][2], float scale, Shrink shrink) {
    float by[MT][2];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float x = top[i][row] * scale, before = pivot[i][row];
        // Each row by itself: its bits do not depend on its neighbours.
        if (fmaf(top[i][row], scale, -before) > SLACK) pivot[i][row] = x;
        by[i][row] = before == -INFINITY ? 0.0f : exp2_approx(before - pivot[i][row]);
        l[i][row] *= by[i][row];
      }
    }
    shrink(by);
  }
};

}  // namespace pyfuse::cuda
