// What LayerNorm and RMSNorm share, forward and backward: a row is walked vector by vector, more
// than once, while it stays in the first cache level; whatever its type, it lies there as C, the
// type that is computed in.
#pragma once
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "cpu/row_vectors.h"
#include "cpu/types.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Rows are handed to threads in blocks of about this many elements; less than two such blocks are
// not worth the start of a parallel region.
constexpr int64_t norm_block = 16384;

// sum[r]: the sum of term(where, r) over row r of R, in an order that depends on d alone.
template <int R, class C, class Term>
PYFUSE_INLINE void sum_along(int64_t d, const Term& term, C (&sum)[R]) {
  vec_t<C> sums[R][accumulators] = {};
  for_vectors<C>(d, [&](const auto& at, int a) PYFUSE_INLINE_BODY {
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) sums[r][a] += term(at, r);
  });
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) sum[r] = reduce_add(combine(sums[r]));
}

template <class T>
PYFUSE_INLINE vec_t<T> round_to(vec_t<T> v) {
  if constexpr (same<T, compute_t<T>>) return v;
  T lane[width<T>];
  store(lane, v);
  return load(lane);
}

// ---- z = dropout(x) + residual ----------------------------------------------------------------

// A row of what z is made of; residual and factor may be null.
template <class T, class Z>
struct Operands {
  const T* x;
  const Z* residual;
  const compute_t<T>* factor;
};

template <class C>
struct Sums {
  C plain, squares;
};

// z, rounded to Z, goes to `row` as C and, where that is not null, to `copy`; its sums.
template <bool dropped, bool added, class T, class Z, class C>
PYFUSE_INLINE Sums<C> gather(const Operands<T, Z> from, int64_t d, C* row, Z* copy, bool streamed) {
  typedef vec_t<T> V;
  V plain[accumulators] = {}, squares[accumulators] = {};
  for_vectors<C>(d, [&](const auto& at, int a) PYFUSE_INLINE_BODY {
    V v = at(from.x);
    if (dropped) v = apply_dropout(v, at(from.factor));
    if (added) v += at(from.residual);
    if (dropped || added) v = round_to<Z>(v);
    at.put(row, v);
    if (copy != nullptr) streamed ? at.template put<true>(copy, v) : at.put(copy, v);
    plain[a] += v;
    squares[a] += v * v;
  });
  return {reduce_add(combine(plain)), reduce_add(combine(squares))};
}

// The same for row `row` of p's operands, to the row of z at `copies` (null: not wanted). Not
// inlined: every kind of norm would carry its loops.
template <class T, class Z, class C>
__attribute__((noinline)) Sums<C> gather_row(const NormArguments& p, int64_t row, const C* factor,
                                             C* to, void* copies) {
  Operands<T, Z> from = {static_cast<const T*>(p.x) + row * p.x_stride, nullptr, factor};
  Z* copy = copies == nullptr ? nullptr : static_cast<Z*>(copies) + row * p.d;
  if (p.residual != nullptr)
    from.residual = static_cast<const Z*>(p.residual) + row * p.residual_stride;
  if (factor == nullptr)
    return from.residual == nullptr ? gather<false, false>(from, p.d, to, copy, p.stream)
                                    : gather<false, true>(from, p.d, to, copy, p.stream);
  return from.residual == nullptr ? gather<true, false>(from, p.d, to, copy, p.stream)
                                  : gather<true, true>(from, p.d, to, copy, p.stream);
}
template <class T, class C>
PYFUSE_INLINE Sums<C> gather(const NormArguments& p, int64_t row, const C* factor, C* to,
                             void* copies) {
  return p.z_dtype == p.dtype ? gather_row<T, T>(p, row, factor, to, copies)
                              : gather_row<T, C>(p, row, factor, to, copies);
}

// The factors of a row, if there is dropout; else null.
template <class C>
__attribute__((noinline)) const C* dropout_factors(const NormArguments& p, const DropoutRule& rule,
                                                   int64_t row, C* to) {
  if (p.dropout_seed == nullptr) return nullptr;
  dropout_row(rule, 0, 0, static_cast<uint32_t>(row), 0, p.d, to);
  return to;
}

// ---- statistics ---------------------------------------------------------------------------------

PYFUSE_INLINE float reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(x); }
PYFUSE_INLINE double reciprocal_root(double x) { return 1.0 / __builtin_sqrt(x); }

// A second pass: E[z²] - mean² would cancel where the mean is large against the deviation.
template <int R, class C>
PYFUSE_INLINE void sum_squared_deviations(const C* const (&z)[R], const C (&mean)[R], int64_t d,
                                          C (&sum)[R]) {
  const auto term = [&](const auto& at, int r) PYFUSE_INLINE_BODY {
    const vec_t<C> off = at.only(at(z[r]) - mean[r]);
    return off * off;
  };
  sum_along<R, C>(d, term, sum);
}

// ---- parameters ---------------------------------------------------------------------------------

template <class S, class C>
PYFUSE_INLINE void convert(const S* from, int64_t d, C plus, C* to) {
  if constexpr (same<compute_t<S>, C>) {
    for_vectors<C, 1>(d, [&](const auto& at, int) { at.put(to, at(from) + plus); });
  } else {
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<C>(to_compute(from[i])) + plus;
  }
}

// A parameter of any dtype plus a number, as C: where it lies if that is what it is, else in `to`.
// One that is not given is `none` throughout.
template <class C>
__attribute__((noinline)) const C* parameter(const void* from, DType dtype, double plus,
                                             double none, int64_t d, C* to) {
  const C* result = to;
  if (from == nullptr) {
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<C>(none);
    return result;
  }
  with_type(dtype, [&](auto type) {
    typedef decltype(type) S;
    if (same<S, C> && plus == 0)
      result = static_cast<const C*>(from);
    else
      convert(static_cast<const S*>(from), d, static_cast<C>(plus), to);
  });
  return result;
}

// `to`: room for it.
template <class C>
PYFUSE_INLINE const C* weight_of(const NormArguments& p, C* to) {
  const double plus = p.kind == NormKind::gemma ? 1.0 : 0.0;
  return parameter(p.weight, p.weight_dtype, plus, 1.0, p.d, to);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
