// Where the backward of attention keeps p and ds of a block, per path: floats in the place of the
// scores, bf16 in the pairs that the dot products take.
#pragma once
#include "cpu/attention_tile.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {

constexpr int TILE_KEYS = 128;

// How p and ds of a block lie in memory, as weights of the products Pᵀ·dO, dSᵀ·Q (rows are keys)
// and dS·K (rows are queries).
template <class Path>
struct Weights;

template <class C>
struct Weights<Wide<C>> {  // [queries][BN], in place of the scores, read by rows or by columns
  typedef vec_of<C> V;
  static constexpr int BN = TILE_KEYS;
  static constexpr int64_t key_row = 1, key_step = BN, query_row = BN, query_step = 1;
  C *p, *ds;

  static Weights take(Carver&, C* scores, C* dp, int64_t) { return {scores, dp}; }
  // Two rows i and i + 1, keys j to j + W.
  PYFUSE_INLINE void put_p(int64_t i, int64_t j, V x, V y) const {
    store(p + i * BN + j, x), store(p + (i + 1) * BN + j, y);
  }
  PYFUSE_INLINE void put_ds(int64_t i, int64_t j, V x, V y) const {
    store(ds + i * BN + j, x), store(ds + (i + 1) * BN + j, y);
  }
  const C* p_of_keys() const { return p; }
  const C* ds_of_keys() const { return ds; }
  const C* ds_of_queries() const { return ds; }
  C p_at(int64_t i, int64_t n) const { return p[i * BN + n]; }
  C ds_at(int64_t i, int64_t n) const { return ds[i * BN + n]; }
};

#if defined(__AVX512BF16__)
template <>
struct Weights<Dot> {  // p and ds as pairs of queries [queries/2][BN][2], ds by rows as well
  static constexpr int BN = TILE_KEYS;
  static constexpr int64_t key_row = 2, key_step = 2 * BN, query_row = BN, query_step = 2;
  bf16 *p, *ds_pairs, *ds;

  static Weights take(Carver& carver, float*, float*, int64_t size) {
    return {carver.take<bf16>(size), carver.take<bf16>(size), carver.take<bf16>(size)};
  }
  static PYFUSE_INLINE __m512i round_two(vfloat x, vfloat y) {  // x's 16 numbers, then y's
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x);
  }
  static PYFUSE_INLINE __m512i interleaved(__m512i two) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, two);
  }
  PYFUSE_INLINE void put_p(int64_t i, int64_t j, vfloat x, vfloat y) const {
    _mm512_storeu_si512(p + i * BN + 2 * j, interleaved(round_two(x, y)));
  }
  PYFUSE_INLINE void put_ds(int64_t i, int64_t j, vfloat x, vfloat y) const {
    const __m512i two = round_two(x, y);
    _mm512_storeu_si512(ds_pairs + i * BN + 2 * j, interleaved(two));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + i * BN + j), _mm512_castsi512_si256(two));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ds + (i + 1) * BN + j),
                        _mm512_extracti64x4_epi64(two, 1));
  }
  const bf16* p_of_keys() const { return p; }
  const bf16* ds_of_keys() const { return ds_pairs; }
  const bf16* ds_of_queries() const { return ds; }
  float p_at(int64_t i, int64_t n) const { return to_compute(p[i / 2 * 2 * BN + 2 * n + i % 2]); }
  float ds_at(int64_t i, int64_t n) const { return to_compute(ds[i * BN + n]); }
};
#endif

}  // namespace pyfuse::cpu::PYFUSE_ISA
