// The two products of attention on packed tiles: a block of 6 query rows against 64 or 128 keys.
//
// K is packed in panels of NR keys, [D][NR], so that one load serves NR keys and the query element
// is a broadcast (tile_product.h); V keeps its rows, padded to whole vectors.
//
// Wide<C>: everything in the compute type C. Dot: bf16 pairs for the bf16 dot product, K as
// [D/2][NR][2], V as [keys/2][Dv][2], P rounded to bf16; products are exact, sums in float.
#pragma once
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

template <class C>
struct Wide {
  typedef C Compute;
  typedef C Packed;
  typedef vec_of<C> V;
  static constexpr int W = Vec<C>::width;
  static constexpr int NR = NV * W;
  static constexpr int BN =
      128;  // keys of a tile: its K, then its V, stays in the first-level cache

  static int64_t packed_length(int64_t d) { return d; }  // elements of Packed per key
  static constexpr int value_vector = W;  // elements of Packed to the next vector of columns of V

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

  static void multiply_k(const Packed* q, const Packed* panel, int64_t d, C* s) {
    multiply_panel(q, d, panel, NR, d, s, BN);
  }

  static void put_p(Packed* p, int64_t j, V x) { store(p + j, x); }

  template <int nv>
  static void multiply_v(const Packed* p, const Packed* values, int64_t padded, int64_t count,
                         const C* alpha, C* o) {
    V acc[MR][nv];
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] =
          load(o + r * padded + v * W) * alpha[r];
    }
    for (int64_t n = 0; n < count; ++n) {
      V x[nv];
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) x[v] = load(values + n * padded + v * W);
      PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
        const V weight = splat(p[r * BN + n]);
        PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] += weight * x[v];
      }
    }
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) store(o + r * padded + v * W, acc[r][v]);
    }
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
  static constexpr int BN = 128;  // two bytes an element: half the room of floats

  static int64_t packed_length(int64_t d) { return (d + 1) / 2 * 2; }
  static constexpr int value_vector = 2 * W;  // two keys lie side by side

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

  static void multiply_k(const Packed* q, const Packed* panel, int64_t d, float* s) {
    multiply_pairs(q, packed_length(d), panel, NR, (d + 1) / 2, s, BN);
  }

  static void put_p(Packed* p, int64_t j, vfloat x) { store(p + j, x); }

  template <int nv>
  static void multiply_v(const Packed* p, const Packed* values, int64_t padded, int64_t count,
                         const float* alpha, float* o) {
    __m512 acc[MR][nv];
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] =
          (__m512)(load(o + r * padded + v * W) * alpha[r]);
    }
    for (int64_t n = 0; n < count; n += 2) {
      __m512bh x[nv];
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) x[v] = load_pairs(values + n * padded + 2 * v * W);
      PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
        const __m512bh weight = broadcast_pair(p + r * BN + n);
        PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] =
            _mm512_dpbf16_ps(acc[r][v], weight, x[v]);
      }
    }
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) store(o + r * padded + v * W, (vfloat)acc[r][v]);
    }
  }

  static float value(const Packed* values, int64_t padded, int64_t n, int64_t j) {
    return to_compute(values[n / 2 * 2 * padded + 2 * j + n % 2]);
  }
  static float probability(const Packed* p, int64_t n) { return to_compute(p[n]); }
};
#endif

}  // namespace pyfuse::cpu::PYFUSE_ISA
