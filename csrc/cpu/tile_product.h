// The innermost product, shared by attention's q·kᵀ and by linear layers: 6 rows against one packed
// panel, everything in registers.
//
// 6 x 4 accumulators of a vector each fill an AVX-512 register file (24 + 4 + 1 of 32), 6 x 2 an
// AVX2 one (12 + 2 + 1 of 16). Each step loads NV vectors of the panel and one element of each row,
// the latter as a broadcast: 10 loads for 24 multiply-adds, which two load ports keep up with.
#pragma once
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

constexpr int MR = 6;                                  // rows of a block
constexpr int NV = PYFUSE_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of a panel

// A function of its own: inlined into one that needs registers too, the compiler spills some of the
// accumulators in the innermost loop.
#define PYFUSE_APART __attribute__((noinline)) inline

// Writes the 6 x nv·W accumulators to out, or adds them to what is there.
template <int nv, class V, class C>
PYFUSE_INLINE void put_tile(const V (&acc)[MR][nv], C* out, int64_t out_stride, bool add) {
  constexpr int W = Vec<C>::width;
  PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
    PYFUSE_UNROLL for (int v = 0; v < nv; ++v) {
      C* to = out + r * out_stride + v * W;
      store(to, add ? load(to) + acc[r][v] : acc[r][v]);
    }
  }
}

// out[r][0..nv·W) = Σ_j rows[r][j] · panel[j][0..nv·W), r < 6. The strides are in elements. nv < NV
// serves the edge of what is wanted of a panel.
template <int nv = NV, class C, class P>
PYFUSE_APART void multiply_panel(const C* rows, int64_t row_stride, const P* panel,
                                 int64_t panel_stride, int64_t length, C* out, int64_t out_stride,
                                 bool add = false) {
  typedef typename Vec<C>::type V;
  constexpr int W = Vec<C>::width;
  V acc[MR][nv] = {};
  for (int64_t j = 0; j < length; ++j) {
    V b[nv];
    PYFUSE_UNROLL for (int v = 0; v < nv; ++v) b[v] = load(panel + j * panel_stride + v * W);
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      const V a = splat(rows[r * row_stride + j]);
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] += a * b[v];
    }
  }
  put_tile(acc, out, out_stride, add);
}

// The same for a panel of bf16 in pairs along the summed dimension, panel[j/2][column][j%2], with
// `pairs` pairs: each pair is one bf16 dot product where the machine has it (rows then hold bf16,
// products are exact and added in float), else its two halves become floats (as the rows are).
#if defined(__AVX512BF16__)
PYFUSE_INLINE __m512bh broadcast_pair(const bf16* pair) {
  int32_t bits;
  memcpy(&bits, pair, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}
PYFUSE_INLINE __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }

typedef bf16 pair_row;
template <int nv = NV>
PYFUSE_APART void multiply_pairs(const bf16* rows, int64_t row_stride, const bf16* panel,
                                 int64_t panel_stride, int64_t pairs, float* out,
                                 int64_t out_stride, bool add = false) {
  constexpr int W = 16;
  vfloat acc[MR][nv] = {};
  for (int64_t j = 0; j < pairs; ++j) {
    __m512bh b[nv];
    PYFUSE_UNROLL for (int v = 0; v < nv; ++v) b[v] =
        load_pairs(panel + 2 * (j * panel_stride + v * W));
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      const __m512bh a = broadcast_pair(rows + r * row_stride + 2 * j);
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) acc[r][v] =
          (vfloat)_mm512_dpbf16_ps((__m512)acc[r][v], a, b[v]);
    }
  }
  put_tile(acc, out, out_stride, add);
}
#else
typedef float pair_row;
template <int nv = NV>
PYFUSE_APART void multiply_pairs(const float* rows, int64_t row_stride, const bf16* panel,
                                 int64_t panel_stride, int64_t pairs, float* out,
                                 int64_t out_stride, bool add = false) {
  constexpr int W = Vec<float>::width;
  vfloat acc[MR][nv] = {};
  for (int64_t j = 0; j < pairs; ++j) {
    vfloat even[nv], odd[nv];
    PYFUSE_UNROLL for (int v = 0; v < nv; ++v) {
      vuint both;
      memcpy(&both, panel + 2 * (j * panel_stride + v * W), sizeof both);
      even[v] = (vfloat)(both << 16);
      odd[v] = (vfloat)(both & 0xffff0000u);
    }
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      const vfloat a = splat(rows[r * row_stride + 2 * j]),
                   b = splat(rows[r * row_stride + 2 * j + 1]);
      PYFUSE_UNROLL for (int v = 0; v < nv; ++v) {
        acc[r][v] += a * even[v];
        acc[r][v] += b * odd[v];
      }
    }
  }
  put_tile(acc, out, out_stride, add);
}
#endif

}  // namespace pyfuse::cpu::PYFUSE_ISA
