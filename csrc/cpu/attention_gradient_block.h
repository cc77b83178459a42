// The part that all gradients of attention share: for a block of queries and a tile of keys, the
// probabilities again, from q, k and the lse of the forward (nothing of size M x N was kept), and
// the gradient of the scores:
//
//     p  = exp(s - lse)                       s: scaled, capped, biased, masked
//     dp = dO·Vᵀ · keep / (1 - p_dropout)
//     ds = p · (dp - delta),  delta = rowsum(dO · O) - dlse
//
// (Dao, arXiv:2307.08691, section 3; delta absorbs the gradient of the softmax's denominator, that
// of lse and dropout alike.) Where all keys that a block sees lie in one tile, p is normalised once
// more and delta = rowsum(p · dp) - dlse, as in the formula: with few keys dp - delta all but
// cancels, and the rounding of O would be what is left.
#pragma once
#include <math.h>

#include "cpu/attention_gradient_weights.h"
#include "cpu/attention_scores.h"
#include "cpu/attention_sequence.h"
#include "cpu/philox.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Sequence b of g as a call of its own (of the gradients of the score terms: the whole).
inline AttentionGradientParams sequence_of(const AttentionGradientParams& g, int64_t b) {
  const AttentionParams& p = g.call;
  const int64_t query = first_row(p.cu_seqlens_q, b), key = first_row(p.cu_seqlens_k, b);
  AttentionGradientParams s = g;
  s.call = sequence_of(p, b);
  s.d_o = advance(g.d_o, b * g.do_stride[0] + query * g.do_stride[2], p.dtype);
  s.d_lse = advance(g.d_lse, b * g.dlse_stride[0] + query, wide(p.dtype));
  s.dq = advance(g.dq, b * g.dq_stride[0] + query * g.dq_stride[2], p.dtype);
  s.dk = advance(g.dk, b * g.dk_stride[0] + key * g.dk_stride[2], p.dtype);
  s.dv = advance(g.dv, b * g.dv_stride[0] + key * g.dv_stride[2], p.dtype);
  return s;
}

// One sequence (attention_sequence.h), with what its gradients are computed from.
template <class T, class Path>
class GradientBlock {
 protected:
  typedef typename Path::Compute C;
  typedef typename Path::Packed Packed;
  typedef typename Path::V V;
  static constexpr int W = Path::W, NR = Path::NR, BN = Weights<Path>::BN;
  static constexpr int64_t half = half_panel<Path>;

 public:
  static constexpr int BM = 8 * MR;  // queries of a block: 12 KiB of Q at D = 64 in float

  struct Queries {                 // of one query head, all its rows: packed, 0 beyond the last
    Packed *q, *d_o;               // rows, for the products with K and V
    Packed *q_values, *do_values;  // as values, for the products with dS and P
    C *shift, *factor;             // exp(-lse) = factor·2^shift; 0 where no key is seen
    C* delta;                      // see above
    C* not_finite;                 // per block: 0, or NaN if q or dO holds anything not finite
  };
  struct Keys {     // of one tile
    Packed *k, *v;  // panels
    Packed* k_values;
    C* not_finite;  // one number
  };
  struct Tile {  // scratch of one block against one tile
    C *scores, *dp, *slope, *mask, *factor;
    Weights<Path> weights;
  };

  const AttentionGradientParams g;
  const AttentionParams& p = g.call;
  const int64_t group = p.heads_q / p.heads_k;
  const int64_t tiles = (p.keys + BN - 1) / BN;
  const int64_t blocks = (p.queries + BM - 1) / BM;
  const int64_t rows = blocks * BM;
  const int64_t d_padded = (p.d + W - 1) / W * W, dv_padded = (p.dv + W - 1) / W * W;

  explicit GradientBlock(const AttentionGradientParams& sequence) : g(sequence) {}
  GradientBlock(const GradientBlock&) = delete;

  Queries take_queries(Carver& carver, int64_t row_count) const {
    Queries x{};
    x.q_values = carver.take<Packed>(row_count * d_padded);
    x.do_values = carver.take<Packed>(row_count * dv_padded);
    x.q = same_layout ? x.q_values : carver.take<Packed>(row_count * d_padded);
    x.d_o = same_layout ? x.do_values : carver.take<Packed>(row_count * dv_padded);
    x.shift = carver.take<C>(row_count);
    x.factor = carver.take<C>(row_count);
    x.delta = carver.take<C>(row_count);
    x.not_finite = carver.take<C>(row_count / BM);
    return x;
  }
  Keys take_keys(Carver& carver) const {
    return {carver.take<Packed>(BN * Path::packed_length(p.d)),
            carver.take<Packed>(BN * Path::packed_length(p.dv)), carver.take<Packed>(BN * d_padded),
            carver.take<C>(1)};
  }
  Tile take_tile(Carver& carver) const {
    C *scores = carver.take<C>(BM * BN), *dp = carver.take<C>(BM * BN);
    return {scores,
            dp,
            carver.take<C>(p.softcap > 0 ? BM * BN : 0),
            carver.take<C>(BN),
            carver.take<C>(2 * BN),
            Weights<Path>::take(carver, scores, dp, BM * BN)};
  }

  static const T* at(const void* base, const int64_t (&stride)[3], int64_t h, int64_t row) {
    return static_cast<const T*>(base) + h * stride[1] + row * stride[2];
  }

  // Block `block` of query head h goes to block `to` of x.
  void pack_queries(const Queries& x, int64_t h, int64_t block, int64_t to) const {
    const int64_t first = block * BM;
    const int64_t count = p.queries - first < BM ? p.queries - first : BM;
    const T *q = at(p.q, p.q_stride, h, first), *d_o = at(g.d_o, g.do_stride, h, first);
    const int64_t row = to * BM;
    C bad = Path::pack_v(x.q_values + row * d_padded, q, p.q_stride[2], count, BM, p.d, d_padded);
    bad += Path::pack_v(x.do_values + row * dv_padded, d_o, g.do_stride[2], count, BM, p.dv,
                        dv_padded);
    x.not_finite[to] = bad;
    for (int64_t i = 0; i < BM; ++i) {
      if (!same_layout && i < count) {
        Path::pack_q(x.q + (row + i) * d_padded, q + i * p.q_stride[2], p.d);
        Path::pack_q(x.d_o + (row + i) * dv_padded, d_o + i * g.do_stride[2], p.dv);
      } else if (!same_layout) {
        memset(x.q + (row + i) * d_padded, 0, static_cast<size_t>(d_padded) * sizeof(Packed));
        memset(x.d_o + (row + i) * dv_padded, 0, static_cast<size_t>(dv_padded) * sizeof(Packed));
      }
      const bool inside = i < count;
      const double lse = inside ? lse_of(h, first + i) : -INFINITY;
      // Rounding lse·log2(e) would show in every probability of the row: the rest is a factor.
      const double exact = lse == -INFINITY ? lse : -lse * log2_e;
      const C shift = static_cast<C>(exact);
      x.shift[row + i] = shift;
      x.factor[row + i] = static_cast<C>(exact - shift < 1 ? ::exp2(exact - shift) : 1);
      x.delta[row + i] = inside ? delta_of(h, first + i) : C(0);
    }
  }

  double lse_of(int64_t h, int64_t m) const {
    return static_cast<const double*>(p.lse)[h * p.lse_stride[1] + m];
  }
  C delta_of(int64_t h, int64_t m) const {
    const T *o = at(p.o, p.o_stride, h, m), *d_o = at(g.d_o, g.do_stride, h, m);
    V sum{};
    int64_t j = 0;
    for (; j + W <= p.dv; j += W) sum += load(o + j) * load(d_o + j);
    if (j < p.dv) sum += load(o + j, p.dv - j) * load(d_o + j, p.dv - j);
    const C delta = reduce_add(sum);
    return delta - dlse_of(h, m);
  }
  C dlse_of(int64_t h, int64_t m) const {
    return g.d_lse == nullptr ? C(0) : static_cast<const C*>(g.d_lse)[h * g.dlse_stride[1] + m];
  }

  // Keys past the last that any query sees are not read: they count as zero.
  void pack_keys(const Keys& x, int64_t hk, int64_t tile) const {
    const int64_t first = tile * BN;
    int64_t count = visible_keys(p, 0, p.queries - 1).hi - first;
    count = count < 0 ? 0 : count < BN ? count : BN;
    const T *k = at(p.k, p.k_stride, hk, count > 0 ? first : 0),
            *v = at(p.v, p.v_stride, hk, count > 0 ? first : 0);
    for (int64_t n = 0; n < count; n += NR) {
      const int64_t present = count - n < NR ? count - n : NR;
      Path::pack_k(x.k + n * Path::packed_length(p.d), k + n * p.k_stride[2], p.k_stride[2],
                   present, p.d);
      Path::pack_k(x.v + n * Path::packed_length(p.dv), v + n * p.v_stride[2], p.v_stride[2],
                   present, p.dv);
    }
    const int64_t steps = (count + Path::depth - 1) / Path::depth;  // of dS·K
    *x.not_finite =
        Path::pack_v(x.k_values, k, p.k_stride[2], count, steps * Path::depth, p.d, d_padded);
  }

  // What block against tile has to do. No work: count = 0.
  struct Span {
    int64_t from;   // the first half panel of the tile that some query of the block sees
    int64_t count;  // keys from there to the last that some query sees
    bool general;   // some pair is hidden, or scores have terms, or dropout, or the span is whole
    bool whole;     // no query of the block sees a key outside of the tile
  };
  Span span_of(int64_t block, int64_t tile) const {
    const int64_t n = tile * BN, end = n + BN, first = block * BM;
    const int64_t last = first + BM < p.queries ? first + BM - 1 : p.queries - 1;
    const KeyRange top = visible_keys(p, 0, first), bottom = visible_keys(p, 0, last);
    if (n >= bottom.hi || end <= top.lo || bottom.hi <= top.lo) return {0, 0, false, false};
    const bool edge = n < bottom.lo || end > top.hi;
    const bool whole = top.lo >= n && bottom.hi <= end;
    const int64_t from = top.lo > n ? (top.lo - n) / half * half : 0;
    return {from, (bottom.hi < end ? bottom.hi - n : BN) - from,
            edge || whole || p.mask != nullptr || p.dropout_p > 0 || has_score_terms(p), whole};
  }

  // p and ds of block `block` of head h (at block `from` of x) against a tile, into t.weights. With
  // Keep instead p (before dropout) in t.scores and ds (before softcap's factor) in t.dp.
  template <bool Keep = false>
  void weights(const Tile& t, const Queries& x, const Keys& keys, int64_t h, int64_t block,
               int64_t from, int64_t tile, Span span) const {
    const int64_t n = tile * BN + span.from, width = (span.count + half - 1) / half * half;
    const int64_t row = from * BM;
    const int64_t block_rows = rows_of(block);
    multiply_all(x.q + row * d_padded, d_padded, keys.k, span.from, width, p.d, block_rows,
                 t.scores);
    multiply_all(x.d_o + row * dv_padded, dv_padded, keys.v, span.from, width, p.dv, block_rows,
                 t.dp);
    if (span.general || Keep) {
      general_weights<Keep>(t, x, h, block, row, n, width, block_rows, span.whole);
    } else {
      for (int64_t i = 0; i < block_rows; i += 2) {
        const V shift0 = splat(x.shift[row + i]), shift1 = splat(x.shift[row + i + 1]);
        const V factor0 = splat(x.factor[row + i]), factor1 = splat(x.factor[row + i + 1]);
        const V delta0 = splat(x.delta[row + i]), delta1 = splat(x.delta[row + i + 1]);
        const C *s = t.scores + i * BN, *dp = t.dp + i * BN;
        for (int64_t j = 0; j < width; j += W) {
          const V p0 = exp2_bounded(exponent(load(s + j), shift0)) * factor0,
                  p1 = exp2_bounded(exponent(load(s + BN + j), shift1)) * factor1;
          t.weights.put_p(i, j, p0, p1);
          t.weights.put_ds(i, j, p0 * (load(dp + j) - delta0), p1 * (load(dp + BN + j) - delta1));
        }
      }
    }
  }

  // The rows of a block times keys [from, from + width): each panel stays in the first-level cache
  // for all of them.
  static void multiply_all(const Packed* q, int64_t q_stride, const Packed* panels, int64_t from,
                           int64_t width, int64_t d, int64_t block_rows, C* s) {
    for (int64_t j = from; j < from + width;) {
      const int64_t end = j / NR * NR + NR < from + width ? j / NR * NR + NR : from + width;
      for (int64_t i = 0; i < block_rows; i += MR)
        multiply_keys<Path, BN>(q + i * q_stride, q_stride, panels, j, end - j, d,
                                s + i * BN + j - from);
      j = end;
    }
  }

  // Rows of a block that are computed: a multiple of MR, which is even.
  int64_t rows_of(int64_t block) const {
    const int64_t count = p.queries - block * BM;
    return count < BM ? (count + MR - 1) / MR * MR : BM;
  }

 private:
  // exp(scale·s) = 2^(c·s): c in two parts, since lse holds the exact c.
  const double exact_c = log2_e * (has_score_terms(p) ? 1.0 : p.scale);
  const C c = static_cast<C>(exact_c), c_rest = static_cast<C>(exact_c - c);

  const DropoutRule dropout =
      p.dropout_p > 0 ? dropout_rule(p.dropout_seed, p.dropout_p) : DropoutRule{};

  // Not below the range of finite numbers, so that -inf does not become inf - inf.
  PYFUSE_INLINE V exponent(V s, V shift) const {
    const V finite = max(splat(lowest), s);
    return finite * c_rest + (finite * c + shift);
  }
  static constexpr C lowest = sizeof(C) == 4 ? C(-3.4028234e38) : C(-1.7976931348623157e308);

  static constexpr bool same_layout = Path::depth == 1;  // values have the rows' layout

  template <bool Keep>
  void general_weights(const Tile& t, const Queries& x, int64_t h, int64_t block, int64_t row,
                       int64_t n, int64_t width, int64_t block_rows, bool whole) const {
    const bool capped = p.softcap > 0, dropping = p.dropout_p > 0;
    for (int64_t i = 0; i < block_rows; i += 2) {
      V delta[2], upstream[2];
      PYFUSE_UNROLL for (int r = 0; r < 2; ++r) {
        int64_t m = block * BM + i + r;
        m = m < p.queries ? m : p.queries - 1;
        finish_scores(p, 0, h, m, visible_keys(p, 0, m), n, width, t.scores + (i + r) * BN, t.mask,
                      capped ? t.slope + (i + r) * BN : nullptr);
        if (dropping)
          dropout_row(dropout, static_cast<uint32_t>(p.sequence), static_cast<uint32_t>(h),
                      static_cast<uint32_t>(m), n, width, t.factor + r * BN);
        const C sum = row_probabilities(t, x, i + r, row, width, t.factor + r * BN);
        delta[r] = splat(whole ? normalise(t, i + r, width, sum + sink_probability(h, m))
                               : x.delta[row + i + r]);
        upstream[r] = splat(whole ? dlse_of(h, m) : C(0));
      }
      for (int64_t j = 0; j < width; j += W) {
        V weight[2], ds[2];
        PYFUSE_UNROLL for (int r = 0; r < 2; ++r) {
          const int64_t at = (i + r) * BN + j;
          const V e = load(t.scores + at);
          // Selected: a hidden key has no part in a row whose delta is NaN.
          ds[r] = e == V{} ? V{} : e * ((load(t.dp + at) - delta[r]) + upstream[r]);
          if (Keep) store(t.scores + at, e), store(t.dp + at, ds[r]);
          if (capped) ds[r] *= load(t.slope + at);
          weight[r] = dropping ? e * load(t.factor + r * BN + j) : e;
        }
        if (!Keep) {
          t.weights.put_p(i, j, weight[0], weight[1]);
          t.weights.put_ds(i, j, ds[0], ds[1]);
        }
      }
    }
  }

  // scores -> p and dp -> dp · keep / (1 - p_dropout) in place, both 0 where a key is hidden (dO·V
  // of a hidden key may be NaN). Returns the sum of p.
  C row_probabilities(const Tile& t, const Queries& x, int64_t i, int64_t row, int64_t width,
                      const C* factor) const {
    const V shift = splat(x.shift[row + i]), rest = splat(x.factor[row + i]);
    const V hidden = splat(-static_cast<C>(INFINITY));
    C *const scores = t.scores + i * BN, *const dp = t.dp + i * BN;
    V sum{};
    for (int64_t j = 0; j < width; j += W) {
      const V s = load(scores + j);
      V e = exp2_bounded(exponent(s, shift)) * rest, gradient = load(dp + j);
      if (p.dropout_p > 0) gradient *= load(factor + j);
      e = s == hidden ? V{} : e;
      gradient = s == hidden ? V{} : gradient;
      store(scores + j, e), store(dp + j, gradient);
      sum += e;
    }
    return reduce_add(sum);
  }

  // p /= total in place; returns rowsum(p · dp).
  C normalise(const Tile& t, int64_t i, int64_t width, C total) const {
    C *const scores = t.scores + i * BN, *const dp = t.dp + i * BN;
    if (!(total > C(0))) total = 1;  // no key is seen
    const C inverse = C(1) / total;
    const bool few = width <= half;  // divided: p of a key that is seen alone is exactly 1
    V sum{};
    for (int64_t j = 0; j < width; j += W) {
      const V e = few ? load(scores + j) / total : load(scores + j) * inverse;
      store(scores + j, e);
      sum += e * load(dp + j);
    }
    return reduce_add(sum);
  }

  C sink_probability(int64_t h, int64_t m) const {
    const bool sink = p.sinks != nullptr && p.sinks[h] > -INFINITY;
    return sink ? static_cast<C>(::exp(p.sinks[h] - lse_of(h, m))) : C(0);
  }
};

}  // namespace pyfuse::cpu::PYFUSE_ISA
