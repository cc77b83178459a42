// Decoding's first product: a few queries times keys whose rows lie anywhere (a page, a cache).
//
// One vector per key runs along D, and a vector of them is summed up at once by a tree, so that a
// score does not depend on where its key stands among the others.
#pragma once
#include "cpu/decode_rows.h"
#include "cpu/transpose.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// How a query and STEP elements of a key are multiplied and added to a vector of sums.
template <class T>
struct Products {
  typedef compute_t<T> Q;  // what queries are stored as
  typedef vec_t<T> X;
  static constexpr int W = width<T>, STEP = W;
  static constexpr bool CONVERTS = sizeof(T) < sizeof(Q);  // each time that a key is read
  static PYFUSE_INLINE X query(const Q* q) { return load(q); }
  static PYFUSE_INLINE vec_t<T> add(vec_t<T> sum, X x, const T* k) { return sum + x * load(k); }
  static PYFUSE_INLINE vec_t<T> add(vec_t<T> sum, X x, const T* k, int64_t n) {
    return sum + x * load(k, n);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Products<bf16> {  // pairs of exact products, added in float
  typedef bf16 Q;
  typedef __m512bh X;
  static constexpr int W = 16, STEP = 32;
  static constexpr bool CONVERTS = false;
  static PYFUSE_INLINE X query(const bf16* q) { return (X)_mm512_loadu_si512(q); }
  static PYFUSE_INLINE vfloat add(vfloat sum, X x, const bf16* k) {
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, x, (X)_mm512_loadu_si512(k));
  }
  static PYFUSE_INLINE vfloat add(vfloat sum, X x, const bf16* k, int64_t n) {
    const __m512i y = _mm512_maskz_loadu_epi16((1u << n) - 1, k);
    return (vfloat)_mm512_dpbf16_ps((__m512)sum, x, (X)y);
  }
};
#endif

template <class T>
class Dots {
  typedef Products<T> P;
  typedef typename P::Q Q;
  static constexpr int W = P::W, STEP = P::STEP;

  // N steps of every key from element j on, and those of every SHARE-th row of `next` asked for.
  template <int N, int SHARE>
  static PYFUSE_INLINE void steps(const Q* q, const T* const* k, const T* const* next, int64_t j,
                                  vec_t<T> (&sum)[W]) {
    typename P::X x[N];
    PYFUSE_UNROLL for (int s = 0; s < N; ++s) x[s] = P::query(q + j + s * STEP);
    PYFUSE_UNROLL for (int i = 0; i < W; ++i) {
      const T* const row = k[i] + j;
      PYFUSE_UNROLL for (int s = 0; s < N; ++s) sum[i] = P::add(sum[i], x[s], row + s * STEP);
      if (SHARE > 0 && i % (SHARE > 0 ? SHARE : 1) == 0) {
        PYFUSE_UNROLL for (int s = 0; s < N; ++s) prefetch_at(next[i] + j, s * STEP, STEP);
      }
    }
  }

 public:
  // Of W keys with one query. A function of its own: inlined into a loop over queries, the compiler
  // would keep the addresses of all keys at hand, in registers that it does not have.
  template <int SHARE>
  __attribute__((noinline)) static void run(const Q* q, const T* const* k, const T* const* next,
                                            int64_t d, compute_t<T>* out) {
    vec_t<T> sum[W] = {};
    int64_t j = 0;
    for (; j + 4 * STEP <= d; j += 4 * STEP) steps<4, SHARE>(q, k, next, j, sum);
    if (j + 2 * STEP <= d) steps<2, SHARE>(q, k, next, j, sum), j += 2 * STEP;
    if (j + STEP <= d) steps<1, SHARE>(q, k, next, j, sum), j += STEP;
    if (j < d) {
      const typename P::X x = P::query(q + j);
      PYFUSE_UNROLL for (int i = 0; i < W; ++i) sum[i] = P::add(sum[i], x, k[i] + j, d - j);
    }
    store(out, row_sums(sum));
  }
};

// The rows of `count` queries, converted and filled up with zeros to d_padded.
template <class T>
void read_query(const T* from, int64_t d, int64_t d_padded, compute_t<T>* to) {
  constexpr int W = Products<T>::W;
  int64_t j = 0;
  for (; j + W <= d; j += W) store(to + j, load(from + j));
  for (; j < d_padded; j += W) store(to + j, load(from + j, d > j ? d - j : 0));
}
#if defined(__AVX512BF16__)
inline void read_query(const bf16* from, int64_t d, int64_t d_padded, bf16* to) {
  memcpy(to, from, static_cast<size_t>(d) * sizeof *to);
  memset(to + d, 0, static_cast<size_t>(d_padded - d) * sizeof *to);
}
#endif

// The same W keys with every query in turn. Each of the first ones asks for its share of the rows
// `next`, so that memory is kept busy all the time, not only while the first query reads.
template <class T>
void score_rows(const typename Products<T>::Q* q, int64_t rows, int64_t d, int64_t d_padded,
                const T* const* k, const T* const* next, compute_t<T>* scores, int64_t stride) {
  const int64_t shares = next == nullptr ? 0 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  for (int64_t r = 0; r < rows; ++r, q += d_padded, scores += stride) {
    switch (r < shares ? shares : 0) {
      case 0:
        Dots<T>::template run<0>(q, k, nullptr, d, scores);
        break;
      case 1:
        Dots<T>::template run<1>(q, k, next, d, scores);
        break;
      case 2:
        Dots<T>::template run<2>(q, k, next + r, d, scores);
        break;
      default:
        Dots<T>::template run<4>(q, k, next + r, d, scores);
        break;
    }
  }
}

// scores[r·stride + n] = q[r·d_padded ...] · key n, for n < width, a multiple of W. With several
// queries each key is converted once, into `wide` [W][d_padded].
template <class T>
void score_keys(const typename Products<T>::Q* q, int64_t rows, int64_t d, int64_t d_padded,
                const T* const* k, int64_t ahead, int64_t width, compute_t<T>* wide,
                compute_t<T>* scores, int64_t stride) {
  typedef compute_t<T> C;
  constexpr int W = Products<T>::W;
  for (int64_t n = 0; n < width; n += W) {
    if constexpr (Products<T>::CONVERTS) {
      if (rows > 1) {
        const C* key[W];
        for (int i = 0; i < W; ++i) {
          prefetch_row(k[n + i + ahead], d);
          read_query(k[n + i], d, d_padded, wide + i * d_padded);
          key[i] = wide + i * d_padded;
        }
        score_rows<C>(q, rows, d_padded, d_padded, key, nullptr, scores + n, stride);
        continue;
      }
    }
    score_rows<T>(q, rows, d, d_padded, k + n, k + n + ahead, scores + n, stride);
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
