// The two products of attention on packed tiles: a block of 6 query rows against a tile of keys.
//
// K is packed in panels of NR keys, [D][NR], so that one load serves NR keys and the query element
// is a broadcast (tile_product.h); V keeps its rows, padded to whole vectors.
//
// Wide<C>: everything in the compute type C. Dot: bf16 pairs for the bf16 dot product, K as
// [D/2][NR][2], V as [keys/2][Dv][2], P rounded to bf16; products are exact, sums in float.
#pragma once
#include "cpu/isa.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"
#include "cpu/vec_math.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Packs `count` rows of K (row stride in elements) into one panel [length][NR] of E, where a row is
// read as `length` elements of type E through load_row(row, at, n) -> vector; missing rows are
// zero.
template <class V, class E, int W, class LoadRow>
inline void pack_panel(E* panel, int64_t count, int64_t length, const LoadRow& load_row) {
  constexpr int NR = NV * W;
  for (int v = 0; v < NV; ++v) {
    for (int64_t d = 0; d < length; d += W) {
      const int64_t n = length - d < W ? length - d : W;
      V square[W];
      PYFUSE_UNROLL for (int i = 0; i < W; ++i) {
        square[i] = v * W + i < count ? load_row(v * W + i, d, n) : V{};
      }
      transpose(square);
      for (int64_t i = 0; i < n; ++i) memcpy(panel + (d + i) * NR + v * W, &square[i], sizeof(V));
    }
  }
}

template <class C>
using vec_of = typename Vec<C>::type;

// out = out·alpha + acc, alpha being one number a row (null: 1). The tile's own sum is added at the
// end, not begun with out: the rounding errors of short sums grow less than those of one long sum.
template <int R, int nv, class V, class C>
PYFUSE_INLINE void add_tile(const V (&acc)[R][nv], const C* alpha, C* out, int64_t stride) {
  constexpr int W = Vec<C>::width;
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    PYFUSE_UNROLL for (int v = 0; v < nv; ++v) {
      C* to = out + r * stride + v * W;
      store(to, alpha == nullptr ? load(to) + acc[r][v] : load(to) * alpha[r] + acc[r][v]);
    }
  }
}

template <class C>
struct Wide {
  typedef C Compute;
  typedef C Packed;
  typedef vec_of<C> V;
  static constexpr int W = Vec<C>::width;
  static constexpr int NR = NV * W;

  static int64_t packed_length(int64_t d) { return d; }  // elements of Packed per key
  static constexpr int value_vector = W;  // elements of Packed to the next vector of columns of V
  static constexpr int panel_vector = W;  // the same in a panel of K
  static constexpr int depth = 1;         // summed elements that one step takes

  template <class T>
  static void pack_k(Packed* panel, const T* k, int64_t stride, int64_t count, int64_t d) {
    pack_panel<V, C, W>(panel, count, d, [=](int64_t row, int64_t at, int64_t n) {
      return n == W ? load(k + row * stride + at) : load(k + row * stride + at, n);
    });
  }

  // Packs `count` rows of V into rows of `padded` elements; returns 0, or NaN if any is not finite.
  template <class T>
  static C pack_v(Packed* packed, const T* v, int64_t stride, int64_t count, int64_t rows,
                  int64_t dv, int64_t padded) {
    V finite{};
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t j = 0; j < padded; j += W) {
        V x{};
        if (n < count && j < dv)
          x = dv - j >= W ? load(v + n * stride + j) : load(v + n * stride + j, dv - j);
        finite += x - x;
        store(packed + n * padded + j, x);
      }
    }
    return reduce_add(finite);
  }

  // One row of Q.
  template <class T>
  static void pack_q(Packed* packed, const T* q, int64_t d) {
    int64_t j = 0;
    for (; j + W <= d; j += W) store(packed + j, load(q + j));
    if (j < d) store(packed + j, load(q + j, d - j), d - j);
  }

  // s[6][nv·W] = rows of Q (or dO) times nv vectors of one panel of K (or V).
  template <int nv, int s_stride>
  static void multiply_k(const Packed* q, int64_t q_stride, const Packed* panel, int64_t d, C* s) {
    multiply_panel<nv>(q, q_stride, panel, NR, d, s, s_stride);
  }

  template <int n>
  static PYFUSE_INLINE void put_p(Packed* p, const V (&x)[n]) {
    PYFUSE_UNROLL for (int v = 0; v < n; ++v) store(p + v * W, x[v]);
  }

  // out[r] = out[r]·alpha[r] + Σ_n weights(r, n)·values[n], for R rows and nv vectors of columns;
  // weights(r, n) lies at r·row_stride + n·step_stride. alpha null: 1.
  template <int R, int nv>
  PYFUSE_APART static void accumulate(const Packed* weights, int64_t row_stride,
                                      int64_t step_stride, const Packed* values, int64_t padded,
                                      int64_t count, const C* alpha, C* out) {
    V acc[R][nv] = {};
    for (int64_t n = 0; n < count; ++n) {
      V x[nv];
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) x[v] = load(values + n * padded + v * W);
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
        const V weight = splat(weights[r * row_stride + n * step_stride]);
        PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] += weight * x[v];
      }
    }
    add_tile(acc, alpha, out, padded);
  }

  static C value(const Packed* values, int64_t padded, int64_t n, int64_t j) {
    return values[n * padded + j];
  }
  static C probability(const Packed* p, int64_t n) { return p[n]; }
};

#if defined(__AVX512BF16__)
struct Dot {
  typedef float Compute;
  typedef bf16 Packed;
  typedef vfloat V;
  static constexpr int W = 16;
  static constexpr int NR = NV * W;

  static int64_t packed_length(int64_t d) { return (d + 1) / 2 * 2; }
  static constexpr int value_vector = 2 * W;  // two keys lie side by side
  static constexpr int panel_vector = 2 * W;
  static constexpr int depth = 2;  // a pair

  static vuint read_pairs(const bf16* p, int64_t n) {
    return (vuint)_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p);
  }

  static void pack_k(Packed* panel, const bf16* k, int64_t stride, int64_t count, int64_t d) {
    pack_panel<vuint, uint32_t, W>(reinterpret_cast<uint32_t*>(panel), count, (d + 1) / 2,
                                   [=](int64_t row, int64_t at, int64_t) {
                                     return read_pairs(k + row * stride + 2 * at, d - 2 * at);
                                   });
  }

  static float pack_v(Packed* packed, const bf16* v, int64_t stride, int64_t count, int64_t rows,
                      int64_t dv, int64_t padded) {
    vfloat finite{};
    for (int64_t n = 0; n < rows; n += 2) {
      for (int64_t j = 0; j < padded; j += W) {
        vfloat even{}, odd{};
        const int64_t left = dv - j < W ? dv - j : W;
        if (n < count && left > 0)
          even = left == W ? load(v + n * stride + j) : load(v + n * stride + j, left);
        if (n + 1 < count && left > 0)
          odd = left == W ? load(v + (n + 1) * stride + j) : load(v + (n + 1) * stride + j, left);
        finite += (even - even) + (odd - odd);
        const vuint pairs =
            ((vuint)even >> 16) | (vuint)odd;  // a bf16 is the upper half of a float
        memcpy(packed + n * padded + 2 * j, &pairs, sizeof pairs);
      }
    }
    return reduce_add(finite);
  }

  static void pack_q(Packed* packed, const bf16* q, int64_t d) {
    memcpy(packed, q, static_cast<size_t>(d) * sizeof *q);
    if (d % 2 != 0) packed[d] = bf16{0};
  }

  template <int nv, int s_stride>
  static void multiply_k(const Packed* q, int64_t q_stride, const Packed* panel, int64_t d,
                         float* s) {
    multiply_pairs<nv>(q, q_stride, panel, NR, (d + 1) / 2, s, s_stride);
  }

  static PYFUSE_INLINE void put_p(Packed* p, const vfloat (&x)[2]) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    memcpy(p, &both, sizeof both);
  }

  // As in Wide; the pair n/2 of row r lies at r·row_stride + n/2·step_stride.
  template <int R, int nv>
  PYFUSE_APART static void accumulate(const Packed* weights, int64_t row_stride,
                                      int64_t step_stride, const Packed* values, int64_t padded,
                                      int64_t count, const float* alpha, float* out) {
    vfloat acc[R][nv] = {};
    for (int64_t n = 0; n < count; n += 2, weights += step_stride) {
      __m512bh x[nv];
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) x[v] = load_pairs(values + n * padded + 2 * v * W);
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
        const __m512bh weight = broadcast_pair(weights + r * row_stride);
        PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] =
            (vfloat)_mm512_dpbf16_ps((__m512)acc[r][v], weight, x[v]);
      }
    }
    add_tile(acc, alpha, out, padded);
  }

  static float value(const Packed* values, int64_t padded, int64_t n, int64_t j) {
    return to_compute(values[n / 2 * 2 * padded + 2 * j + n % 2]);
  }
  static float probability(const Packed* p, int64_t n) { return to_compute(p[n]); }
};
#endif

// What is skipped at the edge of the visible keys: half a panel, the least that keeps the
// multipliers busy, but whole groups of four, as dropout counts.
template <class Path>
constexpr int64_t half_panel = Path::NR >= 8 ? Path::NR / 2 : Path::NR;

// s[6][width] = rows of Q times keys [from, from + width) of those packed in panels; both are
// multiples of half a panel.
template <class Path, int s_stride>
inline void multiply_keys(const typename Path::Packed* q, int64_t q_stride,
                          const typename Path::Packed* panels, int64_t from, int64_t width,
                          int64_t d, typename Path::Compute* s) {
  constexpr int64_t NR = Path::NR, half = half_panel<Path>;
  for (int64_t j = from; j < from + width;) {
    const typename Path::Packed* panel = panels + j / NR * NR * Path::packed_length(d);
    if (j % NR == 0 && from + width - j >= NR) {
      Path::template multiply_k<NV, s_stride>(q, q_stride, panel, d, s + j - from);
      j += NR;
    } else {
      panel += j % NR / Path::W * Path::panel_vector;
      Path::template multiply_k<half / Path::W, s_stride>(q, q_stride, panel, d, s + j - from);
      j += half;
    }
  }
}

// Path::accumulate for R rows and all columns (`padded` of them), NV vectors at a time.
template <class Path, int R>
inline void accumulate_columns(const typename Path::Packed* weights, int64_t row_stride,
                               int64_t step_stride, const typename Path::Packed* values,
                               int64_t padded, int64_t count, const typename Path::Compute* alpha,
                               typename Path::Compute* out) {
  constexpr int W = Path::W;
  for (int64_t column = 0; column < padded / W; column += NV) {
    const int64_t left = padded / W - column;
    const typename Path::Packed* x = values + column * Path::value_vector;
    typename Path::Compute* to = out + column * W;
    switch (left < NV ? left : NV) {
      case 1:
        Path::template accumulate<R, 1>(weights, row_stride, step_stride, x, padded, count, alpha,
                                        to);
        break;
      case 2:
        Path::template accumulate<R, 2>(weights, row_stride, step_stride, x, padded, count, alpha,
                                        to);
        break;
      case 3:
        Path::template accumulate < R,
            NV<3 ? 1 : 3>(weights, row_stride, step_stride, x, padded, count, alpha, to);
        break;
      default:
        Path::template accumulate<R, NV>(weights, row_stride, step_stride, x, padded, count, alpha,
                                         to);
        break;
    }
  }
}

// What a dtype is stored as, and the products it goes through.
template <class T, class P>
struct Types {
  typedef T Stored;
  typedef P Path;
};

// run(Types<...>) for a dtype; `op` names the caller if there is none.
template <class Run>
inline void with_types(DType dtype, const char* op, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(Types<float, Wide<float>>{});
#if defined(__AVX512BF16__)
    case DType::bf16:
      return run(Types<bf16, Dot>{});
#else
    case DType::bf16:
      return run(Types<bf16, Wide<float>>{});
#endif
    case DType::f16:
      return run(Types<f16, Wide<float>>{});
    case DType::f64:
      return run(Types<double, Wide<double>>{});
  }
  bad_switch_value(op, static_cast<int>(dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
