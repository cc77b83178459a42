// Decoding's second product: probabilities times values, accumulators in registers over many keys.
#pragma once
#include "cpu/decode_rows.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// How a row of V is read: STEP columns at once as PARTS vectors of what is computed in.
template <class T>
struct Columns {
  static constexpr int W = width<T>, STEP = W, PARTS = 1;
  static PYFUSE_INLINE void read(const T* p, vec_t<T>* x) { x[0] = load(p); }
  static PYFUSE_INLINE void read(const T* p, int64_t n, vec_t<T>* x) { x[0] = load(p, n); }
  static void put_in_order(compute_t<T>*, int64_t) {}
};

// The even columns of bf16 become float by a shift, the odd ones by a mask: half of the work of
// widening them in order. put_in_order undoes it at the very end.
template <>
struct Columns<bf16> {
  static constexpr int W = width<bf16>, STEP = 2 * W, PARTS = 2;
  static PYFUSE_INLINE void split(vuint bits, vfloat* x) {
    x[0] = (vfloat)(bits << 16);
    x[1] = (vfloat)(bits & 0xffff0000u);
  }
  static PYFUSE_INLINE void read(const bf16* p, vfloat* x) {
    vuint bits;
    memcpy(&bits, p, sizeof bits);
    split(bits, x);
  }
  static PYFUSE_INLINE void read(const bf16* p, int64_t n, vfloat* x) {
#if defined(__AVX512F__)
    const __mmask32 present = n >= STEP ? ~0u : (1u << n) - 1;
    split((vuint)_mm512_maskz_loadu_epi16(present, p), x);
#else
    bf16 lane[STEP] = {};
    memcpy(lane, p, static_cast<size_t>(n < STEP ? n : STEP) * sizeof *p);
    read(lane, x);
#endif
  }
  static void put_in_order(float* o, int64_t count) {
    for (int64_t j = 0; j < count; j += STEP) {
      float even[W], odd[W];
      store(even, load(o + j)), store(odd, load(o + j + W));
      for (int i = 0; i < W; ++i) o[j + 2 * i] = even[i], o[j + 2 * i + 1] = odd[i];
    }
  }
};

// o[r] = sum_n weights[r·stride + n] · v[n], for R rows.
template <class T>
class Values {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  static constexpr int W = width<T>, STEP = Columns<T>::STEP, PARTS = Columns<T>::PARTS;
  // Registers: 4 rows by 4 vectors of sums (2 where there are 16 registers), a row of V, a weight.
  static constexpr int ROWS = 4, STEPS = (PYFUSE_VECTOR_BYTES == 64 ? 4 : 2) / PARTS;
  static constexpr int64_t BLOCK = 16;  // keys whose rows stay in the first cache for all passes

  struct Block {
    const C* weights;
    int64_t stride;
    const T* const* v;
    const T* const* next;  // rows to ask for meanwhile: those at which n % 2^k = share
    int64_t share_mask, share;
    int64_t count, columns;
    C* o;
    int64_t o_stride;
  };

  // R rows, columns [0, N·STEP) of which `columns` exist, added to o. HIDDEN: a weight of 0 is of a
  // key that is not there, whatever its value (0·NaN).
  template <int R, int N, bool HIDDEN>
  static void add(const Block& x, int64_t column) {
    V acc[R][N * PARTS];
    C* const o = x.o + column;
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      PYFUSE_UNROLL for (int i = 0; i < N * PARTS; ++i) acc[r][i] =
          load(o + r * x.o_stride + i * W);
    }
    const int64_t last = x.columns - column - (N - 1) * STEP;  // in the last step
    for (int64_t n = 0; n < x.count; ++n) {
      if (HIDDEN && x.weights[n] == C(0)) continue;
      const T* const v = x.v[n] + column;
      V value[N * PARTS];
      PYFUSE_UNROLL for (int i = 0; i < N; ++i) {
        if (i < N - 1 || last >= STEP) {
          Columns<T>::read(v + i * STEP, value + i * PARTS);
        } else {
          Columns<T>::read(v + i * STEP, last, value + i * PARTS);
        }
      }
      if ((n & x.share_mask) == x.share) {
        PYFUSE_UNROLL for (int i = 0; i < N; ++i) {
          prefetch_at(x.next[n] + column, i * STEP, STEP);
        }
      }
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
        const V weight = splat(x.weights[r * x.stride + n]);
        PYFUSE_UNROLL for (int i = 0; i < N * PARTS; ++i) acc[r][i] += weight * value[i];
      }
    }
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      PYFUSE_UNROLL for (int i = 0; i < N * PARTS; ++i)
          store(o + r * x.o_stride + i * W, acc[r][i]);
    }
  }

  template <int R, bool HIDDEN>
  static void add_rows(const Block& x) {
    int64_t j = 0;
    if constexpr (R <= 2) {
      for (; j + 2 * STEPS * STEP <= x.columns; j += 2 * STEPS * STEP) {
        add<R, 2 * STEPS, HIDDEN>(x, j);
      }
    }
    for (; j < x.columns; j += STEPS * STEP) {
      const int64_t steps = (x.columns - j + STEP - 1) / STEP;
      switch (steps < STEPS ? steps : STEPS) {
        case 1:
          add<R, 1, HIDDEN>(x, j);
          break;
        case 2:
          add < R, STEPS<2 ? 1 : 2, HIDDEN>(x, j);
          break;
        case 3:
          add < R, STEPS<3 ? 1 : 3, HIDDEN>(x, j);
          break;
        default:
          add<R, STEPS, HIDDEN>(x, j);
          break;
      }
    }
  }

  static bool finite(const C* o, int64_t count) {
    V sum{};
    for (int64_t j = 0; j < count; j += W) sum += load(o + j) - load(o + j);
    return reduce_add(sum) == C(0);
  }

  static void add_block(Block x, int64_t rows) {
    x.share_mask = rows > 3 * ROWS ? 3 : rows > ROWS ? 1 : 0, x.share = 0;
    for (int64_t r = 0; r < rows; r += ROWS) {
      switch (rows - r < ROWS ? rows - r : ROWS) {
        case 1:
          add_rows<1, false>(x);
          break;
        case 2:
          add_rows<2, false>(x);
          break;
        case 3:
          add_rows<3, false>(x);
          break;
        default:
          add_rows<ROWS, false>(x);
          break;
      }
      x.weights += ROWS * x.stride, x.o += ROWS * x.o_stride, ++x.share;
    }
  }

 public:
  static int64_t padded(int64_t dv) { return (dv + STEP - 1) / STEP * STEP; }
  static void put_in_order(C* o, int64_t dv) { Columns<T>::put_in_order(o, padded(dv)); }

  // o [rows][padded(dv)], its columns in the order of Columns.
  static void multiply(const C* weights, int64_t stride, int64_t rows, const T* const* v,
                       int64_t ahead, int64_t count, int64_t dv, C* o) {
    const int64_t o_stride = padded(dv);
    memset(o, 0, static_cast<size_t>(rows * o_stride) * sizeof(C));
    const bool one_pass = dv <= (rows <= 2 ? 2 : rows <= ROWS ? 1 : 0) * STEPS * STEP;
    const int64_t block = one_pass ? count : BLOCK;
    for (int64_t n = 0; n < count; n += block) {
      const int64_t keys = count - n < block ? count - n : block;
      add_block({weights + n, stride, v + n, v + n + ahead, 0, 0, keys, dv, o, o_stride}, rows);
    }
    // NaN or infinity may belong to a hidden key, of which nothing must count.
    for (int64_t r = 0; r < rows; ++r) {
      C* const row = o + r * o_stride;
      if (finite(row, o_stride)) continue;
      memset(row, 0, static_cast<size_t>(o_stride) * sizeof(C));
      add_rows<1, true>({weights + r * stride, stride, v, v, 0, -1, count, dv, row, o_stride});
    }
  }
};

}  // namespace pyfuse::cpu::PYFUSE_ISA
