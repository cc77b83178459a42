// What happens to scores between q·kᵀ and the softmax: which keys a query sees, softcap, bias,
// ALiBi, masks. Shared by the tiled and the few-queries kernel; the formulas and their order are
// DESIGN's.
#pragma once

#include <cfloat>

#include "cpu/isa.h"
#include "cpu/vec_math.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Keys [lo, hi) are visible to one query by causality, window and key length.
struct KeyRange {
  int64_t lo, hi;
};

// The key that query m stands on; the last query's is the last key.
inline int64_t diagonal_key(const AttentionParams& p, int64_t b, int64_t m) {
  return m + (p.align_to_seqlens ? p.seqlens_k[b] : p.keys) - p.queries;
}

inline KeyRange visible_keys(const AttentionParams& p, int64_t b, int64_t m) {
  const int64_t diagonal = diagonal_key(p, b, m);
  int64_t lo = 0, hi = p.keys;
  if (p.seqlens_k != nullptr && p.seqlens_k[b] < hi) hi = p.seqlens_k[b];
  if (p.window_right >= 0 && diagonal + p.window_right + 1 < hi) hi = diagonal + p.window_right + 1;
  if (p.window_left >= 0 && diagonal - p.window_left > lo) lo = diagonal - p.window_left;
  if (hi < 0) hi = 0;
  return {lo, hi < lo ? lo : hi};
}

// True where scores need more than a scale > 0, which the exponential takes along for free.
inline bool has_score_terms(const AttentionParams& p) {
  return p.softcap > 0 || p.alibi_slopes != nullptr || (p.mask != nullptr && !p.mask_is_bool) ||
         !(p.scale > 0);
}

template <class C, class M>
void read_mask_row(const M* mask, int64_t stride, int64_t count, C* row) {
  for (int64_t i = 0; i < count; ++i) row[i] = static_cast<C>(to_compute(mask[i * stride]));
}

// `count` mask values of query m of head h from key n on, as additive terms.
template <class C>
void mask_row(const AttentionParams& p, int64_t b, int64_t h, int64_t m, int64_t n, int64_t count,
              C* row) {
  const int64_t at =
      b * p.mask_stride[0] + h * p.mask_stride[1] + m * p.mask_stride[2] + n * p.mask_stride[3];
  const int64_t stride = p.mask_stride[3];
  if (p.mask_is_bool) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask) + at;
    for (int64_t i = 0; i < count; ++i)
      row[i] = mask[i * stride] ? C(0) : -static_cast<C>(INFINITY);
    return;
  }
  switch (p.mask_dtype) {
    case DType::f32:
      return read_mask_row(static_cast<const float*>(p.mask) + at, stride, count, row);
    case DType::bf16:
      return read_mask_row(static_cast<const bf16*>(p.mask) + at, stride, count, row);
    case DType::f16:
      return read_mask_row(static_cast<const f16*>(p.mask) + at, stride, count, row);
    case DType::f64:
      return read_mask_row(static_cast<const double*>(p.mask) + at, stride, count, row);
  }
}

// s[j] = -inf for all j outside of [lo, hi), j < width.
template <class C>
inline void hide_outside(int64_t lo, int64_t hi, int64_t width, C* s) {
  typedef typename Vec<C>::type V;
  const V hidden = splat(-static_cast<C>(INFINITY));
  const V first = splat(static_cast<C>(lo)), end = splat(static_cast<C>(hi));
  V key = iota<C>();
  for (int64_t j = 0; j < width; j += Vec<C>::width, key += static_cast<C>(Vec<C>::width))
    store(s + j, (key < first) | (key >= end) ? hidden : load(s + j));
}

// Turns the raw products s[0..width) of query m with keys n, n+1, ... into scores: scale, softcap,
// bias, ALiBi (only if has_score_terms), then -inf for every key that the query does not see. A
// bias that no float holds in units of log 2 hides, as finfo(float32).min does: the exponentials
// would take the difference of two infinities. `row` is scratch of the same width; width is a
// multiple of the vector width. cap_slope, where wanted, takes the derivative of the capped by the
// uncapped score, 0 for a hidden key.
template <class C>
void finish_scores(const AttentionParams& p, int64_t b, int64_t h, int64_t m, KeyRange range,
                   int64_t n, int64_t width, C* s, C* row, C* cap_slope = nullptr) {
  typedef typename Vec<C>::type V;
  constexpr int W = Vec<C>::width;
  const V hidden = splat(-static_cast<C>(INFINITY));
  const V lowest = splat(static_cast<C>(-FLT_MAX / log2_e));
  const bool terms = has_score_terms(p);
  if (!terms && p.mask == nullptr) return hide_outside(range.lo - n, range.hi - n, width, s);
  const C scale = static_cast<C>(p.scale), cap = static_cast<C>(p.softcap);
  const C slope = p.alibi_slopes != nullptr ? static_cast<C>(p.alibi_slopes[h]) : C(0);
  const C diagonal = static_cast<C>(diagonal_key(p, b, m) - n);
  if (p.mask != nullptr) {
    const int64_t count = range.hi - n < width ? range.hi - n : width;
    mask_row(p, b, h, m, n, count > 0 ? count : 0, row);
  }
  for (int64_t j = 0; j < width; j += W) {
    V x = load(s + j), slope_of_cap{};
    const V key = iota<C>() + static_cast<C>(j);
    if (terms) {
      x *= scale;
      if (cap > 0) {
        const V t = tanh(x / cap);
        slope_of_cap = C(1) - t * t;
        x = cap * t;
      }
      const V distance = diagonal - key;
      x -= slope * (distance < C(0) ? -distance : distance);
    }
    const auto outside =
        (key < static_cast<C>(range.lo - n)) | (key >= static_cast<C>(range.hi - n));
    if (p.mask != nullptr) {
      // Selected, not only added: a NaN score of a hidden key must not survive.
      const V bias = outside ? hidden : load(row + j);
      x = bias <= lowest ? hidden : x + bias;
    }
    x = outside ? hidden : x;
    store(s + j, x);
    if (cap_slope != nullptr) store(cap_slope + j, x == hidden ? V{} : slope_of_cap);
  }
}

// exp(scale·s) = 2^(c·s); with score terms the scale has been applied already.
template <class C>
C exponent_scale(const AttentionParams& p) {
  return static_cast<C>(log2_e * (has_score_terms(p) ? 1.0 : p.scale));
}

// Ends the softmax of query m: o = acc / sum and lse = max + log(sum), the sink having its share of
// the denominator. `max` is in units of the scores before the exponent's scale. A query that sees
// no key has sum 0 and gets o = 0.
template <class T>
void write_row(const AttentionParams& p, int64_t b, int64_t h, int64_t m, compute_t<T> max,
               compute_t<T> sum, const compute_t<T>* acc) {
  typedef compute_t<T> C;
  double top = has_score_terms(p) ? max : max * p.scale, denominator = sum, factor = 1;
  if (denominator == 0) top = -INFINITY;
  if (p.sinks != nullptr && p.sinks[h] > -INFINITY) {
    const double sink = p.sinks[h], both = top > sink ? top : sink;
    factor = ::exp(top - both);
    denominator = denominator * factor + ::exp(sink - both);
    top = both;
  }
  const C inverse = denominator != 0 ? static_cast<C>(factor / denominator) : C(0);
  T* o = static_cast<T*>(p.o) + b * p.o_stride[0] + h * p.o_stride[1] + m * p.o_stride[2];
  constexpr int W = width<T>;
  int64_t j = 0;
  for (; j + W <= p.dv; j += W) store(o + j, load(acc + j) * inverse);
  if (j < p.dv) store(o + j, load(acc + j) * inverse, p.dv - j);
  if (p.lse != nullptr) {
    const int64_t at = b * p.lse_stride[0] + h * p.lse_stride[1] + m;
    const double lse = top + ::log(denominator);
    if (p.lse_dtype == DType::f64) {
      static_cast<double*>(p.lse)[at] = lse;
    } else {
      static_cast<float*>(p.lse)[at] = static_cast<float>(lse);
    }
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
