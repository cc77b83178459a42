// Transposing a square of W vectors of W lanes, and the same tree with the rows added up on the
// way.
#pragma once
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

template <int... J>
struct Lanes {};
template <int W>
struct LanesOf;
template <>
struct LanesOf<2> {
  typedef Lanes<0, 1> type;
};
template <>
struct LanesOf<4> {
  typedef Lanes<0, 1, 2, 3> type;
};
template <>
struct LanesOf<8> {
  typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7> type;
};
template <>
struct LanesOf<16> {
  typedef Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15> type;
};

// Exchanges, between rows S apart, the blocks of S lanes across the diagonal.
template <int S, class V, int... J>
PYFUSE_INLINE void exchange(V& a, V& b, Lanes<J...>) {
  constexpr int W = sizeof...(J);
  const V upper = __builtin_shufflevector(a, b, ((J & S) ? W + J - S : J)...);
  const V lower = __builtin_shufflevector(a, b, ((J & S) ? W + J : J + S)...);
  a = upper;
  b = lower;
}

template <int S, int W, class V>
PYFUSE_INLINE void transpose_from(V (&row)[W]) {
  if constexpr (S < W) {
    PYFUSE_UNROLL for (int i = 0; i < W; ++i) {
      if ((i & S) == 0) exchange<S>(row[i], row[i + S], typename LanesOf<W>::type{});
    }
    transpose_from<2 * S>(row);
  }
}
template <int W, class V>
PYFUSE_INLINE void transpose(V (&row)[W]) {
  transpose_from<1>(row);
}

// How two vectors become one, lane by lane.
struct Add {
  template <class V>
  PYFUSE_INLINE V operator()(V a, V b) const {
    return a + b;
  }
};
struct Max {
  template <class V>
  PYFUSE_INLINE V operator()(V a, V b) const {
    return max(a, b);
  }
};

// Lanes J of: neighbouring units of U lanes taken together, those of a, then those of b, within
// groups of G lanes. The compiler makes a shuffle of each half.
template <int G, int U, int PART>
constexpr int source_lane(int j, int width) {
  const int within = j % G, half = G / 2, k = within % half;
  return j / G * G + 2 * (k / U) * U + PART * U + k % U + (within < half ? 0 : width);
}
template <int G, int U, class Op, class V, int... J>
PYFUSE_INLINE V fold_units(V a, V b, const Op& op, Lanes<J...>) {
  constexpr int W = sizeof...(J);
  return op(__builtin_shufflevector(a, b, source_lane<G, U, 0>(J, W)...),
            __builtin_shufflevector(a, b, source_lane<G, U, 1>(J, W)...));
}

// Lane i of the result is op over the lanes of row[i]: W horizontal sums (or maxima) for 2(W-1)
// shuffles, first within 16 bytes, where shuffles are cheapest, then of whole 16 bytes.
template <int N, class Op, int W, class V>
PYFUSE_INLINE V fold_rows_from(V (&row)[W], const Op& op) {
  if constexpr (N > 1) {
    constexpr int L = 16 / (sizeof(V) / W), G = W / N < L ? L : W, U = W / N < L ? 1 : L;
    PYFUSE_UNROLL for (int i = 0; i < N / 2; ++i) {
      row[i] = fold_units<G, U>(row[2 * i], row[2 * i + 1], op, typename LanesOf<W>::type{});
    }
    return fold_rows_from<N / 2>(row, op);
  } else {
    return row[0];
  }
}
template <int W, class V>
PYFUSE_INLINE V row_sums(V (&row)[W]) {
  return fold_rows_from<W>(row, Add{});
}

// The same for any number of rows: lane i % W of out[i / W] is op over the lanes of row[i]. Rows
// that are missing to a power of two are copies, of which the compiler computes nothing twice.
template <int W, int R, class Op, class V>
PYFUSE_INLINE void fold_rows(const V (&row)[R], const Op& op, V (&out)[(R + W - 1) / W]) {
  constexpr int period = R <= 2 ? 2 : R <= 4 ? 4 : R <= 8 ? 8 : W;
  PYFUSE_UNROLL for (int g = 0; g < (R + W - 1) / W; ++g) {
    V all[W];
    PYFUSE_UNROLL for (int i = 0; i < W; ++i) {
      const int from = g * W + i % period;
      all[i] = row[from < R ? from : R - 2 + from % 2];
    }
    out[g] = fold_rows_from<W>(all, op);
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
