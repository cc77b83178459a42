// The gradients of one or two rows of a norm; csrc/cpu/norm_gradient.cpp has the formulas. z and dy
// are read once; what is read again lies in the first cache level.
#pragma once
#include "cpu/norm_row.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace norm_gradients {

// Rows that go through the passes together: they share the loads of the weight and of the sums.
constexpr int together = 2;

// R rows as C, one behind the other where they are no tensor's.
template <class C>
struct Room {
  C* base;
  int64_t size;  // of a row
  PYFUSE_INLINE C* row(int r) const { return base + r * size; }
};

// What a thread works in.
template <class C>
struct Scratch {
  Room<C> z, dy, dz, factor, out;
  C *dweight, *dbias;
  static constexpr int rows = 5 * together + 2;

  Scratch(C* base, int64_t size) {
    const auto take = [&](int count) {
      C* piece = base;
      base += count * size;
      return piece;
    };
    z = {take(together), size}, dy = {take(together), size}, dz = {take(together), size};
    factor = {take(together), size}, out = {take(together), size};
    dweight = take(1), dbias = take(1);
  }
};

// What all rows of a call share.
template <class C>
struct Call {
  NormArguments source;  // what z is made of: itself, or the forward's x and residual
  bool in_place;         // z lies as C
  bool parameters;       // a gradient of weight or bias is wanted
  void* direct;          // the result that is dz' as it is; null where there is none or are two
  DType direct_dtype;
  const C* weight;
  DropoutRule dropout;
};

template <class C>
Call<C> call_of(const NormGradientParams& p, C* weight) {
  Call<C> call{};
  call.source = p;
  if (p.z != nullptr) {
    call.source.x = p.z, call.source.x_stride = p.z_stride, call.source.dtype = p.z_dtype;
    call.source.residual = nullptr, call.source.dropout_seed = nullptr;
  }
  call.in_place = (call.source.dtype == DType::f32 || call.source.dtype == DType::f64) &&
                  call.source.residual == nullptr && call.source.dropout_seed == nullptr;
  call.parameters = p.dweight != nullptr || p.dbias != nullptr;
  call.direct_dtype = p.dtype;
  if (p.dx == nullptr) call.direct = p.dresidual, call.direct_dtype = p.z_dtype;
  if (p.dresidual == nullptr && p.dropout_seed == nullptr) call.direct = p.dx;
  call.weight = weight_of(p, weight);
  if (p.dropout_seed != nullptr) call.dropout = dropout_rule(p.dropout_seed, p.dropout_p);
  return call;
}

// R rows; null: not given.
template <int R, class C>
struct Rows {
  const C *z[R], *dy[R], *dz[R], *factor[R];
  C mean[R], rstd[R];
  C offset[R], slope[R];  // dz' = rstd · g - offset - slope · n + dz
};

template <bool rms, int R, class C>
PYFUSE_INLINE void read_rows(const NormGradientParams& p, const Call<C>& call,
                             const Scratch<C>& scratch, int64_t row, Rows<R, C>& rows) {
  const C count = static_cast<C>(p.d);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    rows.factor[r] = dropout_factors(p, call.dropout, row + r, scratch.factor.row(r));
    rows.z[r] = scratch.z.row(r);
    if (call.in_place) {
      rows.z[r] = static_cast<const C*>(call.source.x) + (row + r) * call.source.x_stride;
    } else {
      with_type_of<C>(call.source.dtype, [&](auto type) {
        const C* factor = call.source.dropout_seed == nullptr ? nullptr : rows.factor[r];
        const Sums<C> sums =
            gather<decltype(type)>(call.source, row + r, factor, scratch.z.row(r), nullptr);
        rows.mean[r] = sums.plain / count;
      });
    }
  }
  if (!rms && call.in_place) {
    sum_along<R, C>(p.d, [&](const auto& at, int r) { return at(rows.z[r]); }, rows.mean);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) rows.mean[r] /= count;
  }
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    rows.dz[r] = nullptr;
    if (p.dz == nullptr) continue;
    with_type_of<C>(p.z_dtype, [&](auto type) {
      typedef decltype(type) Z;
      const Z* dz = static_cast<const Z*>(p.dz) + (row + r) * p.dz_stride;
      rows.dz[r] = same<Z, C> ? reinterpret_cast<const C*>(dz) : scratch.dz.row(r);
      if (!same<Z, C>) convert(dz, p.d, C(0), scratch.dz.row(r));
    });
  }
}

// The means over R rows; dy comes as Y and is left as C.
template <bool rms, class Y, int R, class C>
__attribute__((noinline)) void reduce_rows(const NormGradientParams& p, int64_t row,
                                           const C* weight, const Room<C> dy_room,
                                           Rows<R, C>& rows) {
  typedef vec_t<C> V;
  constexpr int steps = 2;
  V squares[R][steps] = {}, plain[R][steps] = {}, along[R][steps] = {};
  const Y* dy = static_cast<const Y*>(p.dy) + row * p.dy_stride;
  const int64_t stride = p.dy_stride;
  const Rows<R, C> given = rows;
  for_vectors<C, steps>(p.d, [&](const auto& at, int s) PYFUSE_INLINE_BODY {
    const V w = at(weight);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      const V v = at(dy + r * stride), g = v * w, z = at(given.z[r]);
      const V off = rms ? z : at.only(z - given.mean[r]);
      if (!same<Y, C>) at.put(dy_room.row(r), v);
      squares[r][s] += off * off;
      along[r][s] += g * off;
      if (!rms) plain[r][s] += g;
    }
  });
  const C count = static_cast<C>(p.d), eps = static_cast<C>(p.eps);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    const C rstd = reciprocal_root(reduce_add(squares[r][0] + squares[r][1]) / count + eps);
    rows.dy[r] = same<Y, C> ? reinterpret_cast<const C*>(dy + r * stride) : dy_room.row(r);
    rows.rstd[r] = rstd;
    rows.offset[r] = rms ? C(0) : rstd * (reduce_add(plain[r][0] + plain[r][1]) / count);
    rows.slope[r] = rstd * rstd * (reduce_add(along[r][0] + along[r][1]) / count);
  }
}

// Writes dz' of R rows (to: null: not wanted) and adds them to the parameters' gradients.
template <bool rms, bool parameters, bool streamed, class O, int R, class C>
__attribute__((noinline)) void finish_rows(const Rows<R, C> rows, int64_t d, const C* weight,
                                           C* dweight, C* dbias, O* to, int64_t to_stride) {
  typedef vec_t<C> V;
  for_vectors<C, 1>(d, [&](const auto& at, int) PYFUSE_INLINE_BODY {
    const V w = at(weight);
    V sum_weight{}, sum_bias{};  // continued row by row, so that R changes no bit
    if (parameters) sum_weight = at(dweight);
    if (parameters && !rms) sum_bias = at(dbias);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      const V dy = at(rows.dy[r]), z = at(rows.z[r]);
      const V n = (rms ? z : z - rows.mean[r]) * rows.rstd[r];
      sum_weight += dy * n;
      sum_bias += dy;
      if (to == nullptr) continue;
      V out = dy * w * rows.rstd[r] - n * rows.slope[r];
      if (!rms) out -= rows.offset[r];
      if (rows.dz[r] != nullptr) out += at(rows.dz[r]);
      at.template put<streamed>(to + r * to_stride, out);
    }
    if (parameters) at.put(dweight, sum_weight);
    if (parameters && !rms) at.put(dbias, sum_bias);
  });
}
template <bool rms, class O, int R, class C>
void finish_rows(const Rows<R, C>& rows, int64_t d, const Call<C>& call, const Scratch<C>& scratch,
                 O* to, int64_t to_stride, bool streamed) {
  const auto run = [&](auto kernel) {
    kernel(rows, d, call.weight, scratch.dweight, scratch.dbias, to, to_stride);
  };
  if (call.parameters)
    streamed ? run(finish_rows<rms, true, true, O, R, C>)
             : run(finish_rows<rms, true, false, O, R, C>);
  else
    streamed ? run(finish_rows<rms, false, true, O, R, C>)
             : run(finish_rows<rms, false, false, O, R, C>);
}

// One row of dz', through dropout where factor is not null, to row `row` of a result.
template <class C>
void emit(const NormArguments& p, const C* dz, const C* factor, int64_t row, DType dtype,
          void* result) {
  if (result == nullptr) return;
  with_type_of<C>(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(result) + row * p.d;
    for_vectors<C, 1>(p.d, [&](const auto& at, int) PYFUSE_INLINE_BODY {
      const vec_t<C> v = at(dz);
      const vec_t<C> out = factor == nullptr ? v : apply_dropout(v, at(factor));
      p.stream ? at.template put<true>(to, out) : at.put(to, out);
    });
  });
}

template <bool rms, int R, class C>
PYFUSE_INLINE void backward_together(const NormGradientParams& p, const Call<C>& call,
                                     const Scratch<C>& scratch, int64_t row) {
  Rows<R, C> rows;
  read_rows<rms>(p, call, scratch, row, rows);
  with_type_of<C>(p.y_dtype, [&](auto type) {
    reduce_rows<rms, decltype(type)>(p, row, call.weight, scratch.dy, rows);
  });
  if (call.direct != nullptr || (p.dx == nullptr && p.dresidual == nullptr)) {
    with_type_of<C>(call.direct_dtype, [&](auto type) {
      auto* to = static_cast<decltype(type)*>(call.direct);
      if (to != nullptr) to += row * p.d;
      finish_rows<rms>(rows, p.d, call, scratch, to, p.d, p.stream);
    });
    return;
  }
  finish_rows<rms>(rows, p.d, call, scratch, scratch.out.base, scratch.out.size, false);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    emit(p, scratch.out.row(r), rows.factor[r], row + r, p.dtype, p.dx);
    emit<C>(p, scratch.out.row(r), nullptr, row + r, p.z_dtype, p.dresidual);
  }
}

}  // namespace norm_gradients
}  // namespace pyfuse::cpu::PYFUSE_ISA
