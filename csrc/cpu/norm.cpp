// LayerNorm and RMSNorm, forward, a row or two at a time. A row of z stays in the first cache level
// between the passes: memory is read once and written once.
#include "cpu/norm_row.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

// Rows that go through the passes together. Half types spend their time on conversions, and two
// rows share the loads of the parameters; wide ones wait for memory, which comes fastest row after
// row.
template <class T>
constexpr int together = sizeof(T) == 2 ? 2 : 1;

// What all rows of a call share.
template <class C>
struct Call {
  const C *weight, *bias;
  bool round_first;  // round the normalised row before the weight
  DropoutRule dropout;
};

// What a thread works in; null where x is z and lies as C.
template <class C>
struct Scratch {
  C *rows, *factor;
  int64_t stride;
};

// The R rows of z from `row` on, and the sum (RMSNorm: of the squares) of each.
template <bool rms, int R, class T, class C>
PYFUSE_INLINE void read_rows(const NormParams& p, const Call<C>& call, const Scratch<C>& scratch,
                             int64_t row, const C* (&z)[R], C (&sum)[R]) {
  if (scratch.rows == nullptr) {
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) z[r] =
        static_cast<const C*>(p.x) + (row + r) * p.x_stride;
    const auto term = [&](const auto& at, int r) PYFUSE_INLINE_BODY {
      const vec_t<C> v = at(z[r]);
      return rms ? v * v : v;
    };
    return sum_along<R, C>(p.d, term, sum);
  }
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    C* to = scratch.rows + r * scratch.stride;
    const C* factor = dropout_factors(p, call.dropout, row + r, scratch.factor);
    const Sums<C> sums = gather<T>(p, row + r, factor, to, p.z);
    sum[r] = rms ? sums.squares : sums.plain;
    z[r] = to;
  }
}

// y = (z - mean) · rstd · weight + bias. Streaming, it asks for the next rows: nothing else does
// while these are written.
template <bool rms, bool streamed, class T, class Y, int R, class C>
PYFUSE_INLINE void write_rows(const NormParams& p, const Call<C> call, int64_t row,
                              const C* const (&z)[R], const C (&mean)[R], const C (&rstd)[R]) {
  Y* y = static_cast<Y*>(p.y) + row * p.d;
  const int64_t d = p.d, next_row = row + R < p.rows ? row + R : row;
  const T* next = static_cast<const T*>(p.x) + next_row * p.x_stride;
  for_vectors<C, 4>(d, [&](const auto& at, int) PYFUSE_INLINE_BODY {
    const vec_t<C> weight = at(call.weight);
    const vec_t<C> bias = rms ? vec_t<C>{} : at(call.bias);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      if (streamed) __builtin_prefetch(next + r * p.x_stride + at.i);
      const vec_t<C> v = at(z[r]);
      vec_t<C> n = rms ? v * rstd[r] : (v - mean[r]) * rstd[r];
      if (rms && call.round_first) n = round_to<T>(n);
      at.template put<streamed>(y + r * d, rms ? n * weight : n * weight + bias);
    }
  });
}

template <bool rms, int R, class T, class Y, class C>
PYFUSE_INLINE void norm_together(const NormParams& p, const Call<C>& call,
                                 const Scratch<C>& scratch, int64_t row) {
  const C* z[R];
  C mean[R], square[R], rstd[R];
  read_rows<rms, R, T>(p, call, scratch, row, z, square);
  const C count = static_cast<C>(p.d);
  if constexpr (!rms) {
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) mean[r] = square[r] / count;
    sum_squared_deviations(z, mean, p.d, square);
  }
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) rstd[r] =
      reciprocal_root(square[r] / count + static_cast<C>(p.eps));
  p.stream ? write_rows<rms, true, T, Y>(p, call, row, z, mean, rstd)
           : write_rows<rms, false, T, Y>(p, call, row, z, mean, rstd);
}

template <bool rms, class T, class Y>
void norm_rows(const NormParams& p) {
  typedef compute_t<T> C;
  constexpr int pair = together<T>;
  const bool in_place = same<T, C> && p.residual == nullptr && p.dropout_seed == nullptr;
  const int64_t row_size = Workspace::round_up(p.d * sizeof(C)) / static_cast<int64_t>(sizeof(C));
  const int64_t thread_size = in_place ? 0 : (pair + 1) * row_size;
  Workspace memory((2 * row_size + p.threads * thread_size) * static_cast<int64_t>(sizeof(C)));
  C* const base = reinterpret_cast<C*>(memory.data());
  Call<C> call;
  call.weight = weight_of(p, base);
  call.bias = rms ? nullptr : parameter(p.bias, p.bias_dtype, 0.0, 0.0, p.d, base + row_size);
  call.round_first = p.kind == NormKind::llama;
  if (p.dropout_seed != nullptr) call.dropout = dropout_rule(p.dropout_seed, p.dropout_p);
  const int64_t block = pair * (norm_block / (pair * p.d) + 1);
  parallel_for((p.rows + block - 1) / block, p.threads, [&](int64_t task, int thread) {
    C* const rows = in_place ? nullptr : base + 2 * row_size + thread * thread_size;
    const Scratch<C> scratch = {rows, in_place ? nullptr : rows + pair * row_size, row_size};
    const int64_t end = (task + 1) * block < p.rows ? (task + 1) * block : p.rows;
    int64_t row = task * block;
    for (; row + pair <= end; row += pair) norm_together<rms, pair, T, Y>(p, call, scratch, row);
    for (; row < end; ++row) norm_together<rms, 1, T, Y>(p, call, scratch, row);
    if (p.stream) end_stream();
  });
}

// y is wider than x in Llama's casting with a float weight alone.
template <class T>
void norm_half(const NormParams& p) {
  if (p.kind == NormKind::layer) return norm_rows<false, T, T>(p);
  p.y_dtype == p.dtype ? norm_rows<true, T, T>(p) : norm_rows<true, T, float>(p);
}
template <class T>
void norm_wide(const NormParams& p) {
  p.kind == NormKind::layer ? norm_rows<false, T, T>(p) : norm_rows<true, T, T>(p);
}

}  // namespace

// csrc/api/norm.cpp has checked that the dtypes go together.
void norm(const NormParams& p) {
  switch (p.dtype) {
    case DType::f32:
      return norm_wide<float>(p);
    case DType::f64:
      return norm_wide<double>(p);
    case DType::bf16:
      return norm_half<bf16>(p);
    case DType::f16:
      return norm_half<f16>(p);
    default:
      bad_switch_value("dtype", static_cast<int>(p.dtype));
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
