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

// Lanes J of: the sums of neighbouring units of U lanes, those of a, then those of b, within groups
// of G lanes. The compiler makes a shuffle of each half.
template <int G, int U, int PART>
constexpr int source_lane(int j, int width) {
  const int within = j % G, half = G / 2, k = within % half;
  return j / G * G + 2 * (k / U) * U + PART * U + k % U + (within < half ? 0 : width);
}
template <int G, int U, class V, int... J>
PYFUSE_INLINE V unit_sums(V a, V b, Lanes<J...>) {
  constexpr int W = sizeof...(J);
  return __builtin_shufflevector(a, b, source_lane<G, U, 0>(J, W)...) +
         __builtin_shufflevector(a, b, source_lane<G, U, 1>(J, W)...);
}

// Lane i of the result is the sum of the lanes of row[i]: W horizontal sums for 2(W-1) shuffles,
// first within 16 bytes, where shuffles are cheapest, then of whole 16 bytes.
template <int N, int W, class V>
PYFUSE_INLINE V row_sums_from(V (&row)[W]) {
  if constexpr (N > 1) {
    constexpr int L = 16 / (sizeof(V) / W), G = W / N < L ? L : W, U = W / N < L ? 1 : L;
    PYFUSE_UNROLL for (int i = 0; i < N / 2; ++i) {
      row[i] = unit_sums<G, U>(row[2 * i], row[2 * i + 1], typename LanesOf<W>::type{});
    }
    return row_sums_from<N / 2>(row);
  } else {
    return row[0];
  }
}
template <int W, class V>
PYFUSE_INLINE V row_sums(V (&row)[W]) {
  return row_sums_from<W>(row);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
