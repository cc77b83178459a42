// What the kernels of attention's backward share: from the products s = q·k and dp = do·v of a
// tile's pairs to the weights that dv takes and the gradients of q·k.   (Dao, arXiv:2307.08691, §3)
//
//   p = exp2(s - lse2 - rest);  ds = p (dp - delta);  delta[m] = sum_d o do - dlse
//
// s as in mask.cuh; with dropout, p in dv and dp are those that stayed, times 1 / (1 - p); with
// softcap c tanh(x / c): dx = ds (1 - tanh²). A pair that is not seen has p = ds = 0, whatever its
// key and value hold.
//
// Tiles are [queries, keys] where a kernel owns queries, and BY_KEY [keys, queries] where it owns
// keys: what one product leaves in registers is then the left operand of the next.
#pragma once

#include "sequence.cuh"
#include "tile.cuh"

namespace pyfuse::cuda {

/// lse2: lse in units of log 2; inf of a query that sees no key. rest: what log2 sum 2^(s - lse2)
/// is in this arithmetic, of float32, in which rounding lse alone would cost several bits of p.
struct Terms {
  float lse2, rest, delta;
};

/// The tiles of BLOCK queries that see a block of `keys` keys at n0: in the order of KeyTiles.
template <int BLOCK>
DEVICE KeyTiles query_tiles(const Band& band, int n0, int keys, bool all_edges) {
  const int M = band.M, shift = band.N - M, last = n0 + keys - 1;
  const auto inside = [M](int m) { return max(0, min(m, M)); };
  int low = 0, a = 0, high = M, full = M;
  if (band.right >= 0) {
    low = inside(n0 - band.right - shift) / BLOCK * BLOCK;
    a = (inside(last - band.right - shift) + BLOCK - 1) / BLOCK * BLOCK;
  }
  if (band.left >= 0) {
    high = max(inside(last + band.left - shift + 1), low);
    full = inside(n0 + band.left - shift + 1);
    a = min(a, (high + BLOCK - 1) / BLOCK * BLOCK);
  }
  if (n0 >= band.end) high = low;  // nobody sees these keys
  if (n0 + keys > band.end) a = full = low;
  a = max(a, low);
  const int c = all_edges ? a : max(full / BLOCK * BLOCK, a);
  KeyTiles t;
  t.low = low, t.inside = a, t.after = c;
  t.edges_before = max(min(a, high) - low + BLOCK - 1, 0) / BLOCK;
  t.edges = t.edges_before + max(high - c + BLOCK - 1, 0) / BLOCK;
  t.tiles = t.edges + (c - a) / BLOCK;
  return t;
}

/// Start copying ROWS rows of d elements at `from`, of which `inside` exist, to a tile `offset`
/// bytes into shared memory. RAGGED: not all may exist.
template <typename T, class Tile, int ROWS, int THREADS, bool RAGGED>
DEVICE void load_rows(char* shared, int offset, const char* from, int64_t stride, int d, int inside,
                      bool aligned) {
  using Copy = Copier<Tile, THREADS>;
  const int64_t row = stride * int64_t(sizeof(T));
  from = Copy::part(from, row);
  if (aligned) {
    Copy::template start<ROWS, RAGGED>(shared_address(shared) + offset, from, row, d * sizeof(T),
                                       inside);
  } else {
    Copy::template copy<T, ROWS>(shared + offset, from, row, d, inside);
  }
}

/// Where a lane's elements of a tile are: those of its first row and first column, 16 rows and 8
/// columns on, and so forth.
template <bool BY_KEY>
struct Pairs {
  int row, column;

  DEVICE int row_of(int i, int j) const { return row + 16 * i + j / 2 * 8; }
  DEVICE int column_of(int part, int j) const { return column + 8 * part + j % 2; }
  DEVICE int query(int i, int part, int j) const {
    return BY_KEY ? column_of(part, j) : row_of(i, j);
  }
  DEVICE int key(int i, int part, int j) const {
    return BY_KEY ? row_of(i, j) : column_of(part, j);
  }

  /// f(i, part, j) for each.
  template <int MT, int PARTS, class F>
  static DEVICE void each(F f) {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) f(i, part, j);
      }
    }
  }

  /// Scores of pairs that are not seen become -inf.
  template <int MT, int PARTS>
  DEVICE void hide(float (&s)[MT][PARTS][4], const Band& band) const {
    const int low = band.left < 0 ? INT32_MIN : -band.left;
    const int high = band.right < 0 ? INT32_MAX : band.right;
    each<MT, PARTS>([&](int i, int part, int j) {
      const int m = query(i, part, j), n = key(i, part, j), ahead = n - band.place(m);
      if (n >= band.end || m >= band.M || ahead < low || ahead > high) s[i][part][j] = -INFINITY;
    });
  }

  /// Those of keys that are `spoilt` (bit j for the tile's j-th) become NaN where they are seen.
  template <int MT, int PARTS>
  DEVICE void spoil(float (&s)[MT][PARTS][4], uint64_t spoilt, int n0) const {
    if (spoilt == 0) return;
    each<MT, PARTS>([&](int i, int part, int j) {
      float& x = s[i][part][j];
      if (spoilt >> (key(i, part, j) - n0) & 1 && x != -INFINITY) x = NAN;
    });
  }
};

/// Nothing but a scale between q·k and the softmax.
struct PlainPairs {
  static constexpr bool FOLD = true;
  const Band& band;

  DEVICE PlainPairs(const AttentionCall&, const Band& band, int, int) : band(band) {}

  /// s: from q·k to weights; dp: from do·v to gradients of q·k. EDGE and edge: some pair is not
  /// seen. terms(part)(i, j) are those of an element's query. each(i, part, j, p, ds, m, n) is told
  /// of all.
  template <bool BY_KEY, bool EDGE, bool REST, int MT, int PARTS, class TermsOf, class Each>
  DEVICE void gradients(float (&s)[MT][PARTS][4], float (&dp)[MT][PARTS][4], const AttentionCall& p,
                        const Pairs<BY_KEY>& pairs, const TermsOf& terms, bool, uint64_t spoilt,
                        int n0, const Each& each) const {
    if constexpr (EDGE) {
      pairs.hide(s, band);
      pairs.spoil(s, spoilt, n0);
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const auto of = terms(part);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &x = s[i][part][j], &dx = dp[i][part][j];
          const Terms& t = of(i, j);
          const bool seen = !EDGE || x != -INFINITY;
          const float y = fmaf(x, p.scale, -t.lse2);
          x = exp2_approx(REST ? y - t.rest : y);
          dx = x * (dx - t.delta);
          if (!seen) x = dx = 0.0f;
          each(i, part, j, x, dx, pairs.query(i, part, j), pairs.key(i, part, j));
        }
      }
    }
  }
};

/// Every option, each looked at when the kernel runs: softcap, ALiBi, a mask, dropout.
struct OptionPairs {
  static constexpr bool FOLD = false;
  const Band& band;
  int b, h;

  DEVICE OptionPairs(const AttentionCall&, const Band& band, int b, int h)
      : band(band), b(b), h(h) {}

  /// As above, but whether the tile is at an edge is looked at when running.
  template <bool BY_KEY, bool EDGE, bool REST, int MT, int PARTS, class TermsOf, class Each>
  DEVICE void gradients(float (&s)[MT][PARTS][4], float (&dp)[MT][PARTS][4], const AttentionCall& p,
                        const Pairs<BY_KEY>& pairs, const TermsOf& terms, bool edge,
                        uint64_t spoilt, int n0, const Each& each) const {
    static_assert(EDGE);
    float slopes_of_cap[MT][PARTS][4];
    scores(s, slopes_of_cap, p, pairs);
    if (edge) {
      pairs.hide(s, band);
      pairs.spoil(s, spoilt, n0);
    }
    const uint64_t dropped = p.threshold == 0 ? 0 : drop<MT, PARTS>(p, pairs);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      const auto of = terms(part);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float &x = s[i][part][j], &dx = dp[i][part][j];
          const Terms& t = of(i, j);
          const bool seen = x != -INFINITY;
          const float factor = dropped >> bit<MT>(i, part, j) & 1 ? 0.0f : p.keep_scale;
          float weight = exp2_approx(x - t.lse2 - t.rest);
          if (!seen) weight = 0.0f;
          const float dy = factor == 0.0f ? 0.0f : dx * factor;
          dx = seen ? weight * (dy - t.delta) : 0.0f;
          each(i, part, j, weight, dx, pairs.query(i, part, j), pairs.key(i, part, j));
          x = factor == 0.0f ? 0.0f : weight * factor;
          dx = seen ? dx * slopes_of_cap[i][part][j] : 0.0f;
        }
      }
    }
  }

 private:
  template <int MT>
  static DEVICE int bit(int i, int part, int j) {
    return (part * MT + i) * 4 + j;
  }

  /// Scores of the products q·k, -inf where the mask hides, and the slopes of softcap.
  template <bool BY_KEY, int MT, int PARTS>
  DEVICE void scores(float (&s)[MT][PARTS][4], float (&slopes_of_cap)[MT][PARTS][4],
                     const AttentionCall& p, const Pairs<BY_KEY>& pairs) const {
    const auto each = [&](auto f) {
      pairs.template each<MT, PARTS>([&](int i, int part, int j) {
        f(s[i][part][j], slopes_of_cap[i][part][j], pairs.query(i, part, j), pairs.key(i, part, j));
      });
    };
    each([&](float& x, float& slope, int, int) { x *= p.scale, slope = 1.0f; });
    if (p.softcap != 0.0f) {
      each([&](float& x, float& slope, int, int) {
        const float t = tanh_accurate(x);
        slope = 1.0f - t * t;
        x = t * p.softcap;
      });
    }
    if (p.slopes != nullptr) {
      const float slope = p.slopes[h] * LOG2E;
      each([&](float& x, float&, int m, int n) { x -= slope * fabsf(float(band.place(m) - n)); });
    }
    if (p.mask != nullptr) {
      const char* const mask = static_cast<const char*>(p.mask) +
                               (b * p.mask_stride[0] + h * p.mask_stride[1]) * mask_size(p);
      each([&](float& x, float&, int m, int n) {
        const int64_t row = min(m, band.M - 1), column = min(n, band.N - 1);
        const float bias = bias_at(p, mask, row * p.mask_stride[2] + column * p.mask_stride[3]);
        x = bias == -INFINITY ? bias : x + bias;
      });
    }
  }

  /// What dropout takes, a bit for each element.
  template <int MT, int PARTS, bool BY_KEY>
  DEVICE uint64_t drop(const AttentionCall& p, const Pairs<BY_KEY>& pairs) const {
    static_assert(MT * PARTS <= 16);
    uint64_t dropped = 0;
#pragma unroll 1
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll 1
      for (int i = 0; i < MT; ++i) {
        uint32_t words[4];
        const int row = pairs.row + 16 * i, column = pairs.column - threadIdx.x % 4 * 2 + 8 * part;
        if constexpr (BY_KEY) {
          dropout_words_by_key(words, b, h, column, row, p.key);
        } else {
          dropout_words(words, b, h, row, column, p.key);
        }
        for (int j = 0; j < 4; ++j)
          dropped |= uint64_t(!kept(words[j], p.threshold)) << bit<MT>(i, part, j);
      }
    }
    return dropped;
  }
};

/// For kernels that need to be told of nothing.
struct Nothing {
  DEVICE void operator()(int, int, int, float, float, int, int) const {}
};

}  // namespace pyfuse::cuda
