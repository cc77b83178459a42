// Which keys a query sees, and what becomes of a score before the softmax:
//
//   s = scale q·k;  s = c tanh(s / c);  s = s + bias - slope |i + N - M - j|;  s = -inf where
//   hidden
//
// all in units of log 2, so that one exp2 makes weights of them. Query i stands on key i + N - M.
#pragma once

#include "attention_params.h"
#include "dropout.cuh"
#include "integers.cuh"

namespace pyfuse::cuda {

constexpr float LOG2E = 1.4426950408889634f;

/// The keys that queries see: those before `end` within a band around the query's own place.
struct Band {
  int M, N, end, left, right;  // left, right: -1 for no limit

  DEVICE int place(int m) const { return m + N - M; }
  /// Query m sees the keys from first(m) up to last(m), exclusive.
  DEVICE int first(int m) const { return left < 0 ? 0 : max(place(m) - left, 0); }
  DEVICE int last(int m) const { return right < 0 ? end : min(end, max(place(m) + right + 1, 0)); }
};

/// The tiles of BLOCK keys that a block of queries needs: those at `edge`s, where some query does
/// not see some key, first, then those that every query sees all of, from `inside` on.
struct KeyTiles {
  int low, after;  // where the edge tiles before, and those after what is inside start
  int edges_before, edges, inside, tiles;  // tiles: of both kinds together

  template <int BLOCK>
  DEVICE static KeyTiles of(const Band& band, int m0, int rows, bool all_edges) {
    const int m1 = min(m0 + rows, band.M) - 1;
    const int high = band.last(m1);
    const int low = min(band.first(m0), high) / BLOCK * BLOCK;
    int a = (band.first(m1) + BLOCK - 1) / BLOCK * BLOCK;
    a = max(min(a, (high + BLOCK - 1) / BLOCK * BLOCK), low);
    const int c = all_edges ? a : max(band.last(m0) / BLOCK * BLOCK, a);
    KeyTiles t;
    t.low = low, t.inside = a, t.after = c;
    t.edges_before = (min(a, high) - low + BLOCK - 1) / BLOCK;
    t.edges = t.edges_before + max(high - c + BLOCK - 1, 0) / BLOCK;
    t.tiles = t.edges + (c - a) / BLOCK;
    return t;
  }
  /// The first key of the i-th of them.
  template <int BLOCK>
  DEVICE int start(int i) const {
    if (i >= edges) return inside + (i - edges) * BLOCK;
    return i < edges_before ? low + i * BLOCK : after + (i - edges_before) * BLOCK;
  }
};

/// One element of a mask as what is added to a score in units of log 2; -inf hides, and so does a
/// bias that overflows here, as finfo(float32).min.
DEVICE float bias_at(const AttentionCall& p, const void* start, int64_t place) {
  switch (p.mask_kind) {
    case -1:
      return static_cast<const uint8_t*>(start)[place] ? 0.0f : -INFINITY;
    case 0:
      return static_cast<const float*>(start)[place] * LOG2E;
    case 1:
      return __bfloat162float(static_cast<const bf16*>(start)[place]) * LOG2E;
    default:
      return __half2float(static_cast<const fp16*>(start)[place]) * LOG2E;
  }
}

DEVICE int mask_size(const AttentionCall& p) {
  return p.mask_kind == -1 ? 1 : p.mask_kind == 0 ? 4 : 2;
}

/// To 2 ulp, small x included: a polynomial (Cephes, tanhf) below 0.625, 1 - 2 / (1 + e^2x) above.
DEVICE float tanh_accurate(float x) {
  const float y = x * x;
  float series = fmaf(-5.70498872745e-3f, y, 2.06390887954e-2f);
  series = fmaf(series, y, -5.37397155531e-2f);
  series = fmaf(series, y, 1.33314422036e-1f);
  series = fmaf(series, y, -3.33332819422e-1f);
  const float large = 1.0f - 2.0f / (1.0f + exp2_approx(fabsf(x) * (2.0f * LOG2E)));
  return fabsf(x) < 0.625f ? fmaf(series * y, x, x) : copysignf(large, x);
}

/// Nothing between the product and the softmax but the scale, which the softmax applies itself.
template <bool ROWS_ARE_ALIGNED>
struct Plain {
  static constexpr bool ALIGNED = ROWS_ARE_ALIGNED;  // or else looked at when the kernel runs

  DEVICE Plain(const AttentionCall&, const Band&, int, int) {}
  DEVICE float scale(const AttentionCall& p) const { return p.scale; }
  template <int MT, int PARTS>
  DEVICE void score(float (&)[MT][PARTS][4], const AttentionCall&, int, int) const {}
  template <int MT, int PARTS>
  DEVICE void drop(float (&)[MT][PARTS][4], const AttentionCall&, int, int) const {}
};

/// Every option, each looked at when the kernel runs: softcap, ALiBi, a mask, dropout; and any
/// scale.
struct Options {
  static constexpr bool ALIGNED = false;

  Band band;
  int b, h;
  float slope;
  const char* mask;

  DEVICE Options(const AttentionCall& p, const Band& band, int b, int h)
      : band(band), b(b), h(h), slope(p.slopes == nullptr ? 0.0f : p.slopes[h] * LOG2E) {
    mask = static_cast<const char*>(p.mask);
    if (mask != nullptr) mask += (b * p.mask_stride[0] + h * p.mask_stride[1]) * mask_size(p);
  }
  DEVICE float scale(const AttentionCall&) const { return 1.0f; }

  /// Scores of the rows from `m` on (this lane's first) and the keys from `n` on.
  template <int MT, int PARTS>
  DEVICE void score(float (&s)[MT][PARTS][4], const AttentionCall& p, int m, int n) const {
    each(s, m, n, [&](float& x, int, int) { x *= p.scale; });
    if (p.softcap != 0.0f)
      each(s, m, n, [&](float& x, int, int) { x = tanh_accurate(x) * p.softcap; });
    if (p.slopes != nullptr)
      each(s, m, n, [&](float& x, int i, int j) { x -= slope * fabsf(float(band.place(i) - j)); });
    if (mask != nullptr) {
      each(s, m, n, [&](float& x, int i, int j) {
        const int64_t row = min(i, band.M - 1), column = min(j, band.N - 1);
        const float bias = bias_at(p, mask, row * p.mask_stride[2] + column * p.mask_stride[3]);
        x = bias == -INFINITY ? bias : x + bias;
      });
    }
  }

  /// Weights that dropout takes become 0.
  template <int MT, int PARTS>
  DEVICE void drop(float (&s)[MT][PARTS][4], const AttentionCall& p, int m, int n) const {
    if (p.threshold == 0) return;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        uint32_t words[4];
        dropout_words(words, b, h, m + 16 * i, n + 8 * part, p.key);
        for (int j = 0; j < 4; ++j) {
          if (!kept(words[j], p.threshold)) s[i][part][j] = 0.0f;
        }
      }
    }
  }

  /// f(score, query, key) for each of a lane's.
  template <int MT, int PARTS, class F>
  static DEVICE void each(float (&s)[MT][PARTS][4], int m, int n, F f) {
    const int column = n + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        for (int j = 0; j < 4; ++j)
          f(s[i][part][j], m + 16 * i + j / 2 * 8, column + 8 * part + j % 2);
      }
    }
  }
};

/// Hide the scores of keys that a query does not see; those of keys whose values are not finite
/// (`spoilt`, bit j for key n + j) become NaN for the queries that see them.
template <int MT, int PARTS>
DEVICE void hide(float (&s)[MT][PARTS][4], const Band& band, int m, int n, uint64_t spoilt) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int first = band.first(m + 16 * i + 8 * row) - n - column;
      const int last = band.last(m + 16 * i + 8 * row) - n - column;
#pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        for (int j = 0; j < 2; ++j) {
          float& x = s[i][part][2 * row + j];
          const int at = 8 * part + j;
          if (at < first || at >= last) x = -INFINITY;
        }
      }
    }
  }
  if (spoilt == 0) return;
#pragma unroll
  for (int i = 0; i < MT; ++i) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      for (int j = 0; j < 4; ++j) {
        float& x = s[i][part][j];
        if (spoilt >> (8 * part + column + j % 2) & 1 && x != -INFINITY) x = NAN;
      }
    }
  }
}

}  // namespace pyfuse::cuda
