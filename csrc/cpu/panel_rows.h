// A few rows times one panel of a packed weight: what decoding consists of.
//
// A panel holds 64 outputs, [K/2][64][2] for bf16 and int8 (pairs along the summed dimension) and
// [K][64] for float: one stream through memory, outputs along the lanes, so that no sum has to be
// taken across a vector. Each output is a sum of chains of at most MOST_TERMS additions, the same
// for any number of rows: a row's result does not depend on the rows beside it.
#pragma once
#include "cpu/isa.h"
#include "cpu/tile_product.h"

namespace pyfuse::cpu::PYFUSE_ISA {

constexpr int PANEL = packed_linear_panel;
constexpr int MOST_PANEL_ROWS = 6;  // of one pass over a panel (see most_rows)
constexpr int MOST_TERMS = 256;     // of a sum; then these sums are added (see linear_packed.cpp)
constexpr int SLICE = 16;           // outputs: the least part of a panel that is a task

// Vectors of outputs of a pass: as many as the registers hold for that many rows.
template <int rows>
constexpr int panel_vectors = PYFUSE_VECTOR_BYTES == 64 ? 4
                              : rows == 1               ? 8
                              : rows == 2               ? 4
                                                        : 2;

// How a weight stored as S is multiplied. Row: what x is converted to; unit: elements of the summed
// dimension that lie together; most_rows: of a pass, so that all sums stay in registers.
template <class S>
struct Panels;

template <>
struct Panels<float> {
  typedef float Row;
  typedef vfloat V;
  static constexpr int unit = 1, most_rows = MOST_PANEL_ROWS;
  template <int R, int N>
  static PYFUSE_INLINE void add(V (&acc)[R][N], const Row* rows, int64_t stride, const float* w) {
    PYFUSE_UNROLL for (int v = 0; v < N; ++v) {
      const vfloat column = load(w + v * Vec<float>::width);
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) acc[r][v] += splat(rows[r * stride]) * column;
    }
  }
};

template <>
struct Panels<bf16> {
  typedef pair_row Row;
  typedef vfloat V;
  static constexpr int unit = 2;
#if defined(__AVX512BF16__)
  static constexpr int most_rows = MOST_PANEL_ROWS;
  template <int R, int N>
  static PYFUSE_INLINE void add(V (&acc)[R][N], const Row* rows, int64_t stride, const bf16* w) {
    PYFUSE_UNROLL for (int v = 0; v < N; ++v) {
      const __m512bh pairs = load_pairs(w + 2 * v * Vec<float>::width);
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) acc[r][v] =
          (vfloat)_mm512_dpbf16_ps((__m512)acc[r][v], broadcast_pair(rows + r * stride), pairs);
    }
  }
#else
  static constexpr int most_rows = 4;  // the halves of the weights need registers too
  static PYFUSE_INLINE void split(const bf16* w, vfloat& even, vfloat& odd) {
    vuint both;
    memcpy(&both, w, sizeof both);
    even = (vfloat)(both << 16), odd = (vfloat)(both & 0xffff0000u);
  }
  // What there is less of is held in registers: elements of one or two rows, else of the weights.
  template <int R, int N>
  static PYFUSE_INLINE void add(V (&acc)[R][N], const Row* rows, int64_t stride, const bf16* w) {
    constexpr int W = Vec<float>::width;
    if constexpr (R <= 2) {
      PYFUSE_UNROLL for (int v = 0; v < N; ++v) {
        vfloat even, odd;
        split(w + 2 * v * W, even, odd);
        PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
          acc[r][v] += splat(rows[r * stride]) * even;
          acc[r][v] += splat(rows[r * stride + 1]) * odd;
        }
      }
    } else {
      vfloat even[N], odd[N];
      PYFUSE_UNROLL for (int v = 0; v < N; ++v) split(w + 2 * v * W, even[v], odd[v]);
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
        const vfloat a = splat(rows[r * stride]);
        PYFUSE_UNROLL for (int v = 0; v < N; ++v) acc[r][v] += a * even[v];
        const vfloat b = splat(rows[r * stride + 1]);
        PYFUSE_UNROLL for (int v = 0; v < N; ++v) acc[r][v] += b * odd[v];
      }
    }
  }
#endif
};

// Products of int8 and int16, pairs of them added in int32, exactly: 256 terms are below 2^31.
template <>
struct Panels<int8_t> {
  typedef int16_t Row;
  typedef vint V;
  static constexpr int unit = 2, most_rows = MOST_PANEL_ROWS;

#if defined(__AVX512BW__)
  typedef __m512i Pairs;
  static PYFUSE_INLINE Pairs wide(const int8_t* w) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
  static PYFUSE_INLINE V add(V sum, int32_t pair, Pairs w) {
    return sum + (vint)_mm512_madd_epi16(_mm512_set1_epi32(pair), w);
  }
#elif defined(__AVX2__)
  typedef __m256i Pairs;
  static PYFUSE_INLINE Pairs wide(const int8_t* w) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  }
  static PYFUSE_INLINE V add(V sum, int32_t pair, Pairs w) {
    return sum + (vint)_mm256_madd_epi16(_mm256_set1_epi32(pair), w);
  }
#else
  struct Pairs {
    vint even, odd;
  };
  static PYFUSE_INLINE Pairs wide(const int8_t* w) {
    Pairs p;
    PYFUSE_UNROLL for (int i = 0; i < Vec<float>::width; ++i) p.even[i] = w[2 * i],
                                                              p.odd[i] = w[2 * i + 1];
    return p;
  }
  static PYFUSE_INLINE V add(V sum, int32_t pair, const Pairs& w) {
    int16_t x[2];
    memcpy(x, &pair, sizeof x);
    return sum + (x[0] * w.even + x[1] * w.odd);
  }
#endif

  template <int R, int N>
  static PYFUSE_INLINE void add(V (&acc)[R][N], const Row* rows, int64_t stride, const int8_t* w) {
    PYFUSE_UNROLL for (int v = 0; v < N; ++v) {
      const Pairs pairs = wide(w + 2 * v * Vec<float>::width);
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, rows + r * stride, sizeof pair);
        acc[r][v] = add(acc[r][v], pair, pairs);
      }
    }
  }
};

PYFUSE_INLINE vfloat as_float(vfloat v) { return v; }
PYFUSE_INLINE vfloat as_float(vint v) { return __builtin_convertvector(v, vfloat); }

// What comes next in memory, asked for a little with each step of the sums.
struct Ahead {
  const char* next;
  int64_t bytes;  // of a step
};

// sums[r·PANEL + j] += rows[r] · column j of a panel, j < N vectors, `length` terms (add: else =).
// A function of its own, for its registers' sake (see tile_product.h).
template <class S, int R, int N>
PYFUSE_APART void multiply_columns(const typename Panels<S>::Row* rows, int64_t stride,
                                   const S* panel, int64_t length, Ahead ahead, bool add,
                                   float* sums) {
  constexpr int W = Vec<float>::width, unit = Panels<S>::unit;
  // With one row memory is what counts: every line of the pass is asked for, and close at hand.
  constexpr int LINES = R == 1 ? N * W * unit * static_cast<int>(sizeof(S)) / 64 : 1;
  typename Panels<S>::V acc[R][N] = {};
  for (int64_t j = 0; j < length; j += unit) {
    PYFUSE_UNROLL for (int line = 0; line < LINES; ++line)
        __builtin_prefetch(ahead.next + 64 * line, 0, R == 1 ? 3 : 2);
    ahead.next += ahead.bytes;
    Panels<S>::template add<R, N>(acc, rows + j, stride, panel + j * PANEL);
  }
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    PYFUSE_UNROLL for (int v = 0; v < N; ++v) {
      float* const to = sums + r * PANEL + v * W;
      const vfloat part = as_float(acc[r][v]);
      store(to, add ? load(to) + part : part);
    }
  }
}

// The same for outputs [first, last) of the panel, in passes of as many as the registers hold.
template <class S, int R>
void multiply_slice(const typename Panels<S>::Row* rows, int64_t stride, const S* panel,
                    int64_t length, int first, int last, Ahead ahead, bool add, float* sums) {
  constexpr int W = Vec<float>::width, N = panel_vectors<R>, unit = Panels<S>::unit;
  constexpr int LEAST = R == 1 ? 2 * SLICE : SLICE, SMALL = N * W <= LEAST ? N : LEAST / W;
  int j = first;
  for (; j + N * W <= last; j += N * W, ahead.next += length / unit * ahead.bytes) {
    multiply_columns<S, R, N>(rows, stride, panel + j * unit, length, ahead, add, sums + j);
  }
  for (; j < last; j += SMALL * W, ahead.next += length / unit * ahead.bytes) {
    multiply_columns<S, R, SMALL>(rows, stride, panel + j * unit, length, ahead, add, sums + j);
  }
}

template <class S>
void multiply_group(int64_t count, const typename Panels<S>::Row* rows, int64_t stride,
                    const S* panel, int64_t length, int first, int last, Ahead ahead, bool add,
                    float* sums) {
  switch (count) {
    case 1:
      return multiply_slice<S, 1>(rows, stride, panel, length, first, last, ahead, add, sums);
    case 2:
      return multiply_slice<S, 2>(rows, stride, panel, length, first, last, ahead, add, sums);
    case 3:
      return multiply_slice<S, 3>(rows, stride, panel, length, first, last, ahead, add, sums);
    case 4:
      return multiply_slice<S, 4>(rows, stride, panel, length, first, last, ahead, add, sums);
    default:
      if constexpr (Panels<S>::most_rows > 4) {
        if (count == 5)
          multiply_slice<S, 5>(rows, stride, panel, length, first, last, ahead, add, sums);
        if (count == 6)
          multiply_slice<S, 6>(rows, stride, panel, length, first, last, ahead, add, sums);
      }
  }
}

// sums [count][PANEL] of outputs [first, last) of a panel, multiples of SLICE (of two of them with
// one row). A part of the panel that the first cache holds is used by all rows in turn, which ask
// for the part after it meanwhile: what is computed takes about as long as what is read. `after`:
// bytes from here to the panel that comes next.
template <class S>
void multiply_rows(const typename Panels<S>::Row* rows, int64_t stride, int64_t count,
                   const S* panel, int64_t length, int first, int last, int64_t after,
                   float* sums) {
  constexpr int unit = Panels<S>::unit;
  constexpr int64_t unit_bytes = PANEL * unit * static_cast<int64_t>(sizeof(S));
  constexpr int64_t DISTANCE = 4096;  // for a single row, which waits for memory alone
  const int64_t groups = (count + Panels<S>::most_rows - 1) / Panels<S>::most_rows;
  const int64_t parts = (length + MOST_TERMS - 1) / MOST_TERMS;
  const int64_t equal = (length + parts * unit - 1) / (parts * unit) * unit;
  for (int64_t k = 0; k < length; k += equal) {
    const int64_t terms = length - k < equal ? length - k : equal;
    const S* const part = panel + k * PANEL;
    const char* next = reinterpret_cast<const char*>(part + terms * PANEL);
    if (k + terms == length) next += after - length / unit * unit_bytes;
    Ahead ahead = {next, unit_bytes / (4 * groups)};
    const char* const own = reinterpret_cast<const char*>(part + first * unit);
    if (count == 1) ahead = {own + DISTANCE, unit_bytes};
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t r = count * g / groups, some = count * (g + 1) / groups - r;
      multiply_group<S>(some, rows + r * stride + k, stride, part, terms, first, last, ahead, k > 0,
                        sums + r * PANEL);
      ahead.next += terms / unit * unit_bytes / groups;
    }
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
