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

// Lane i of the result is the sum of the lanes of row[i]: W horizontal sums for 2(W-1) shuffles.
template <int S, int W, class V>
PYFUSE_INLINE V row_sums_from(V (&row)[W]) {
  if constexpr (S < W) {
    PYFUSE_UNROLL for (int i = 0; i < W; i += 2 * S) {
      exchange<S>(row[i], row[i + S], typename LanesOf<W>::type{});
      row[i] += row[i + S];
    }
    return row_sums_from<2 * S>(row);
  } else {
    return row[0];
  }
}
template <int W, class V>
PYFUSE_INLINE V row_sums(V (&row)[W]) {
  return row_sums_from<1>(row);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
