// transpose.h and tile_product.h, on integers: every sum is exact, so results must be equal.
#include <stdlib.h>

#include "../check.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

using test::Memory;

template <class C>
void check_transpose() {
  typedef typename Vec<C>::type V;
  constexpr int W = Vec<C>::width;
  V row[W], summed[W];
  for (int i = 0; i < W; ++i) summed[i] = row[i] = iota<C>() + C(W * i);
  transpose(row);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) CHECK(row[i][j] == C(W * j + i), "row %d, lane %d", i, j);
  const V sums = row_sums(summed);
  for (int i = 0; i < W; ++i) CHECK(sums[i] == C(W * W * i + W * (W - 1) / 2), "row %d", i);
}

TEST(transposed_squares_and_row_sums) {
  check_transpose<float>();
  check_transpose<double>();
}

// Of R rows, as many vectors of results as they need.
template <class C, int R>
void check_fold() {
  typedef typename Vec<C>::type V;
  constexpr int W = Vec<C>::width;
  V row[R], sums[(R + W - 1) / W], tops[(R + W - 1) / W];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < W; ++j) row[i][j] = C((7 * i + 5 * j) % 11 - 20 * i);
  fold_rows<W>(row, Add{}, sums);
  fold_rows<W>(row, Max{}, tops);
  for (int i = 0; i < R; ++i) {
    C sum = 0, top = row[i][0];
    for (int j = 0; j < W; ++j) sum += row[i][j], top = row[i][j] > top ? row[i][j] : top;
    CHECK(sums[i / W][i % W] == sum, "row %d of %d", i, R);
    CHECK(tops[i / W][i % W] == top, "row %d of %d", i, R);
  }
}
template <class C>
void check_folds() {
  check_fold<C, 1>(), check_fold<C, 2>(), check_fold<C, 3>(), check_fold<C, 5>();
  check_fold<C, 6>(), check_fold<C, 8>(), check_fold<C, 13>(), check_fold<C, 16>();
}

TEST(sums_and_maxima_of_any_number_of_rows) {
  check_folds<float>();
  check_folds<double>();
}

// Integers from -4 to 4.
double digit() { return static_cast<int>(4.5 * test::random_unit()); }

template <class T>
void fill(const Memory& memory, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    from_compute(static_cast<compute_t<T>>(digit()), static_cast<T*>(memory.data())[i]);
}

// Six rows of a stride longer than they are, against a panel that is a part of a wider one; the
// memory of each ends with its last element.
struct Shape {
  int64_t length, row_stride, panel_stride, out_stride, columns;
  int64_t row_elements() const { return length > 0 ? (MR - 1) * row_stride + length : 0; }
  int64_t out_elements() const { return (MR - 1) * out_stride + columns; }
};

template <class C>
void check_out(const Shape& s, const Memory& memory, const double* exact) {
  const C* out = static_cast<const C*>(memory.data());
  for (int r = 0; r < MR; ++r) {
    for (int64_t j = 0; j < s.columns; ++j)
      CHECK(out[r * s.out_stride + j] == exact[r * s.columns + j], "row %d, column %d", r, int(j));
    for (int64_t j = s.columns; j < s.out_stride && r < MR - 1; ++j)
      CHECK(out[r * s.out_stride + j] != out[r * s.out_stride + j], "wrote between the rows");
  }
}

template <class C, class P>
void check_panel(int64_t length) {
  const Shape s = {length, length + 3, NV * Vec<C>::width + 5, NV * Vec<C>::width + 1,
                   NV * Vec<C>::width};
  const int64_t panel_elements = length > 0 ? (length - 1) * s.panel_stride + s.columns : 0;
  const Memory rows(s.row_elements() * sizeof(C)), panel(panel_elements * sizeof(P)),
      out(s.out_elements() * sizeof(C));
  const C* a = static_cast<C*>(rows.data());
  const P* b = static_cast<P*>(panel.data());
  fill<C>(rows, s.row_elements());
  fill<P>(panel, panel_elements);
  double exact[MR * NV * Vec<C>::width] = {};
  for (int add = 0; add <= 1; ++add) {
    multiply_panel(a, s.row_stride, b, s.panel_stride, length, static_cast<C*>(out.data()),
                   s.out_stride, add != 0);
    for (int r = 0; r < MR; ++r)
      for (int64_t k = 0; k < length; ++k)
        for (int64_t j = 0; j < s.columns; ++j)
          exact[r * s.columns + j] +=
              a[r * s.row_stride + k] * double(to_compute(b[k * s.panel_stride + j]));
    check_out<C>(s, out, exact);
  }
}

TEST(six_rows_against_a_panel) {
  const int64_t lengths[] = {0, 1, 2, 7, 64, 65};
  for (const int64_t length : lengths) {
    check_panel<float, float>(length);
    check_panel<float, f16>(length);
    check_panel<double, double>(length);
  }
}

void check_pairs(int64_t pairs) {
  constexpr int columns = NV * Vec<float>::width;
  const Shape s = {2 * pairs, 2 * pairs + 4, columns + 6, columns + 1, columns};
  const int64_t panel_elements = pairs > 0 ? 2 * ((pairs - 1) * s.panel_stride + columns) : 0;
  const Memory rows(s.row_elements() * sizeof(pair_row)), panel(panel_elements * sizeof(bf16)),
      out(s.out_elements() * sizeof(float));
  const pair_row* a = static_cast<pair_row*>(rows.data());
  const bf16* b = static_cast<bf16*>(panel.data());
  fill<pair_row>(rows, s.row_elements());
  fill<bf16>(panel, panel_elements);
  double exact[MR * columns] = {};
  for (int add = 0; add <= 1; ++add) {
    multiply_pairs(a, s.row_stride, b, s.panel_stride, pairs, static_cast<float*>(out.data()),
                   s.out_stride, add != 0);
    for (int r = 0; r < MR; ++r)
      for (int64_t k = 0; k < 2 * pairs; ++k)
        for (int64_t j = 0; j < columns; ++j)
          exact[r * columns + j] += double(to_compute(a[r * s.row_stride + k])) *
                                    to_compute(b[2 * (k / 2 * s.panel_stride + j) + k % 2]);
    check_out<float>(s, out, exact);
  }
}

TEST(six_rows_against_a_panel_of_pairs) {
  const int64_t counts[] = {0, 1, 2, 7, 32, 33};
  for (const int64_t pairs : counts) check_pairs(pairs);
}

}  // namespace
}  // namespace pyfuse::cpu::PYFUSE_ISA
