// LayerNorm and RMSNorm: z = x + residual, the statistics of z, y; a row or two at a time. A row of
// z stays in the first cache level between the passes: memory is read once and written once.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

// Rows are handed to threads in blocks of about this many elements; less than two such blocks are
// not worth the start of a parallel region.
constexpr int64_t block_elements = 16384;
constexpr int accumulators = 4;  // independent sums of a row, to hide the latency of an addition
// Rows that go through the passes together. Half types spend their time on conversions, and two
// rows share those of the weights; wide ones wait for memory, which comes fastest row after row.
template <class T>
constexpr int together = sizeof(T) == 2 ? 2 : 1;

template <class T>
PYFUSE_INLINE vec_t<T> round_to(vec_t<T> v) {
  T lane[width<T>];
  store(lane, v);
  return load(lane);
}

// z = x + residual, rounded to T as it will be read again.
template <class T>
void add_row(const T* x, const T* residual, T* z, int64_t d) {
  constexpr int64_t w = width<T>;
  int64_t i = 0;
  for (; i + w <= d; i += w) store(z + i, load(x + i) + load(residual + i));
  if (i < d) store(z + i, load(x + i, d - i) + load(residual + i, d - i), d - i);
}

// For each of R rows the sum of term(vector, row, lanes that count) over its d elements, in an
// order that depends on d alone. Lanes that do not count are zero.
template <int R, class T, class Term>
PYFUSE_INLINE void sum_rows(const T* const (&z)[R], int64_t d, const Term& term,
                            compute_t<T> (&sum)[R]) {
  constexpr int64_t w = width<T>;
  vec_t<T> sums[R][accumulators] = {};
  int64_t i = 0;
  for (; i + accumulators * w <= d; i += accumulators * w)
    PYFUSE_UNROLL for (int a = 0; a < accumulators; ++a) PYFUSE_UNROLL for (int r = 0; r < R; ++r)
        sums[r][a] += term(load(z[r] + i + a * w), r, w);
  for (; i + w <= d; i += w)
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) sums[r][0] += term(load(z[r] + i), r, w);
  if (i < d)
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) sums[r][1] += term(load(z[r] + i, d - i), r, d - i);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) sum[r] =
      reduce_add((sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
}

PYFUSE_INLINE float reciprocal_root(float x) { return 1.0f / __builtin_sqrtf(x); }
PYFUSE_INLINE double reciprocal_root(double x) { return 1.0 / __builtin_sqrt(x); }

template <bool rms, int R, class T>
PYFUSE_INLINE void statistics(const T* const (&z)[R], int64_t d, double eps,
                              compute_t<T> (&mean)[R], compute_t<T> (&rstd)[R]) {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  const C count = static_cast<C>(d);
  C square[R];
  if constexpr (rms) {
    sum_rows(z, d, [](V v, int, int64_t) { return v * v; }, square);
  } else {
    sum_rows(z, d, [](V v, int, int64_t) { return v; }, mean);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) mean[r] /= count;
    // A second pass: E[z²] - mean² would cancel where the mean is large against the deviation.
    const V lane = iota<C>();
    const auto squared_deviation = [&](V v, int r, int64_t counted) {
      V off = v - mean[r];
      if (counted < width<T>) off = lane < static_cast<C>(counted) ? off : V{};
      return off * off;
    };
    sum_rows(z, d, squared_deviation, square);
  }
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) rstd[r] =
      reciprocal_root(square[r] / count + static_cast<C>(eps));
}

template <class T, class W>
struct Affine {
  const W *weight, *bias;  // null: 1 and 0
  compute_t<T> weight_plus;
  bool round_first;
};

// y = (z - mean) · rstd · weight + bias. `at` loads the vector that is being worked on from a row
// of any type, `put` stores it.
template <bool rms, int R, class T, class W, class At, class Put>
PYFUSE_INLINE void write_vectors(const T* const (&z)[R], T* const (&y)[R],
                                 const compute_t<T> (&mean)[R], const compute_t<T> (&rstd)[R],
                                 const Affine<T, W>& affine, const At& at, const Put& put) {
  typedef vec_t<T> V;
  V weight = splat(compute_t<T>(1)), bias{};
  if (affine.weight != nullptr) weight = at(affine.weight) + affine.weight_plus;
  if (!rms && affine.bias != nullptr) bias = at(affine.bias);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    const V v = at(z[r]);
    V n = rms ? v * rstd[r] : (v - mean[r]) * rstd[r];
    if (affine.round_first) n = round_to<T>(n);
    put(y[r], rms ? n * weight : n * weight + bias);
  }
}

template <bool rms, int R, class T, class W>
PYFUSE_INLINE void norm_together(const NormParams& p, int64_t row, const Affine<T, W> affine) {
  constexpr int64_t w = width<T>;
  const int64_t d = p.d;
  const T* z[R];
  T* y[R];
  compute_t<T> mean[R], rstd[R];
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    z[r] = static_cast<const T*>(p.x) + (row + r) * p.x_stride;
    y[r] = static_cast<T*>(p.y) + (row + r) * p.y_stride;
    if (p.residual != nullptr) {
      // Where the caller does not want z, y's row holds it until y overwrites it.
      T* sum = p.z != nullptr ? static_cast<T*>(p.z) + (row + r) * p.z_stride : y[r];
      add_row(z[r], static_cast<const T*>(p.residual) + (row + r) * p.residual_stride, sum, d);
      z[r] = sum;
    }
  }
  statistics<rms>(z, d, p.eps, mean, rstd);
  int64_t i = 0;
  for (; i + w <= d; i += w)
    write_vectors<rms>(
        z, y, mean, rstd, affine, [i](const auto* from) { return load(from + i); },
        [i](T* to, vec_t<T> v) { store(to + i, v); });
  const int64_t rest = d - i;
  if (rest > 0)
    write_vectors<rms>(
        z, y, mean, rstd, affine, [=](const auto* from) { return load(from + i, rest); },
        [=](T* to, vec_t<T> v) { store(to + i, v, rest); });
}

template <bool rms, class T, class W>
void norm_rows(const NormParams& p) {
  const Affine<T, W> affine = {static_cast<const W*>(p.weight), static_cast<const W*>(p.bias),
                               static_cast<compute_t<T>>(p.weight_plus), p.round_first};
  constexpr int pair = together<T>;
  const int64_t block = pair * (block_elements / (pair * p.d) + 1);
  parallel_for((p.rows + block - 1) / block, p.threads, [&](int64_t task, int) {
    const int64_t end = (task + 1) * block < p.rows ? (task + 1) * block : p.rows;
    int64_t row = task * block;
    for (; row + pair <= end; row += pair) norm_together<rms, pair>(p, row, affine);
    for (; row < end; ++row) norm_together<rms, 1>(p, row, affine);
  });
}

template <class T, class W>
void norm_kind(const NormParams& p) {
  p.rms ? norm_rows<true, T, W>(p) : norm_rows<false, T, W>(p);
}

}  // namespace

// csrc/api/norm.cpp has checked that weights are of x's dtype, or float beside a half type.
void norm(const NormParams& p) {
  const bool own_weight = p.weight_dtype == p.dtype;
  switch (p.dtype) {
    case DType::f32:
      return norm_kind<float, float>(p);
    case DType::f64:
      return norm_kind<double, double>(p);
    case DType::bf16:
      return own_weight ? norm_kind<bf16, bf16>(p) : norm_kind<bf16, float>(p);
    case DType::f16:
      return own_weight ? norm_kind<f16, f16>(p) : norm_kind<f16, float>(p);
    default:
      bad_switch_value("dtype", static_cast<int>(p.dtype));
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
