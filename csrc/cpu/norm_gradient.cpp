// LayerNorm and RMSNorm, backward. With n = (z - mean) · rstd and g = dy · weight
//   dz' = rstd · (g - mean(g) - n · mean(g · n)) + dz      (RMSNorm: without mean and mean(g))
//   dweight = sum over the rows of dy · n,  dbias = sum of dy
// Nothing but z is kept from the forward: the statistics of a row that is read anyway cost less
// than their way through memory. The gradients of the parameters are summed over blocks of rows
// whose size depends on the tensors' sizes alone, and these sums pairwise, so that the result does
// not depend on the number of threads.
#include "cpu/norm_row.h"
#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

// Rows that go through the passes together: they share the loads of the weight and of the sums.
constexpr int together = 2;
constexpr int64_t max_blocks = 128;     // of rows: enough for any number of threads,
constexpr int64_t min_block_rows = 16;  // each so large that its sums are small beside it
constexpr int64_t leaf_rows = 64;       // are added up one after the other
constexpr int64_t chunk = 256;          // columns of a task that adds the blocks up

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
    sum_along<R, C>(p.d, [&](const auto& at, int r) { return at.read(rows.z[r]); }, rows.mean);
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
  each_vector<C, steps>(p.d, [&](const auto& at, int s) __attribute__((always_inline)) {
    const V w = at.read(weight);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      const V v = at.read(dy + r * stride), g = v * w, z = at.read(given.z[r]);
      const V off = rms ? z : at.only(z - given.mean[r]);
      if (!same<Y, C>) at.write(dy_room.row(r), v);
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
  each_vector<C, 1>(d, [&](const auto& at, int) __attribute__((always_inline)) {
    const V w = at.read(weight);
    V sum_weight{}, sum_bias{};  // continued row by row, so that R changes no bit
    if (parameters) sum_weight = at.read(dweight);
    if (parameters && !rms) sum_bias = at.read(dbias);
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      const V dy = at.read(rows.dy[r]), z = at.read(rows.z[r]);
      const V n = (rms ? z : z - rows.mean[r]) * rows.rstd[r];
      sum_weight += dy * n;
      sum_bias += dy;
      if (to == nullptr) continue;
      V out = dy * w * rows.rstd[r] - n * rows.slope[r];
      if (!rms) out -= rows.offset[r];
      if (rows.dz[r] != nullptr) out += at.read(rows.dz[r]);
      at.template write<streamed>(to + r * to_stride, out);
    }
    if (parameters) at.write(dweight, sum_weight);
    if (parameters && !rms) at.write(dbias, sum_bias);
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
void emit(const C* dz, const C* factor, int64_t row, int64_t d, DType dtype, void* result) {
  if (result == nullptr) return;
  with_type_of<C>(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(result) + row * d;
    if (factor == nullptr)
      each_vector<C, 1>(d, [&](const auto& at, int) { at.write(to, at.read(dz)); });
    else
      each_vector<C, 1>(d, [&](const auto& at, int) {
        at.write(to, apply_dropout(at.read(dz), at.read(factor)));
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
    emit(scratch.out.row(r), rows.factor[r], row + r, p.d, p.dtype, p.dx);
    emit<C>(scratch.out.row(r), nullptr, row + r, p.d, p.z_dtype, p.dresidual);
  }
}

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

// to += from, for d elements.
template <class C>
PYFUSE_INLINE void add_to(const C* from, int64_t d, C* to) {
  each_vector<C, 1>(d, [&](const auto& at, int) { at.write(to, at.read(to) + at.read(from)); });
}

// The rows of one block; their sums to dweight and dbias.
template <bool rms, class C>
void backward_block(const NormGradientParams& p, const Call<C>& call, const Scratch<C>& scratch,
                    int64_t begin, int64_t end, C* dweight, C* dbias) {
  if (call.parameters)
    for (int64_t i = 0; i < p.d; ++i)
      dweight[i] = dbias[i] = scratch.dweight[i] = scratch.dbias[i] = C(0);
  for (int64_t leaf = begin; leaf < end; leaf += leaf_rows) {
    const int64_t leaf_end = leaf + leaf_rows < end ? leaf + leaf_rows : end;
    int64_t row = leaf;
    for (; !p.row_by_row && row + together <= leaf_end; row += together)
      backward_together<rms, together>(p, call, scratch, row);
    for (; row < leaf_end; ++row) backward_together<rms, 1>(p, call, scratch, row);
    if (!call.parameters) continue;
    add_to(scratch.dweight, p.d, dweight);
    add_to(scratch.dbias, p.d, dbias);
    for (int64_t i = 0; i < p.d; ++i) scratch.dweight[i] = scratch.dbias[i] = C(0);
  }
  if (p.stream) end_stream();
}

// result = the sum of the blocks' rows, stride apart, in columns [first, first + count).
template <class C>
void add_blocks(C* sums, int64_t blocks, int64_t stride, int64_t first, int64_t count, DType dtype,
                void* result) {
  if (result == nullptr) return;
  sums += first;
  for (int64_t step = 1; step < blocks; step *= 2)
    for (int64_t b = 0; b + step < blocks; b += 2 * step)
      add_to(sums + (b + step) * stride, count, sums + b * stride);
  with_type(dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(result) + first;
    for (int64_t i = 0; i < count; ++i) from_compute(sums[i], to[i]);
  });
}

template <bool rms, class C>
void backward(const NormGradientParams& p) {
  const int64_t bytes = sizeof(C), size = Workspace::round_up(p.d * bytes) / bytes;
  int64_t block = (p.rows + max_blocks - 1) / max_blocks;
  if (block < min_block_rows) block = min_block_rows;
  if (block < norm_block / p.d) block = norm_block / p.d;
  const int64_t blocks = (p.rows + block - 1) / block;
  const bool parameters = p.dweight != nullptr || p.dbias != nullptr;
  const int64_t sums_rows = parameters ? 2 * blocks : 0;
  Workspace memory((1 + sums_rows + p.threads * Scratch<C>::rows) * size * bytes);
  C* const base = reinterpret_cast<C*>(memory.data());
  C* const dweight = base + size;  // of block 0; then dbias, and so on for the others
  const Call<C> call = call_of(p, base);
  parallel_for(blocks, p.threads, [&](int64_t b, int thread) {
    const Scratch<C> scratch(base + (1 + sums_rows + thread * Scratch<C>::rows) * size, size);
    const int64_t end = (b + 1) * block < p.rows ? (b + 1) * block : p.rows;
    C* const sums = dweight + 2 * b * size;
    backward_block<rms>(p, call, scratch, b * block, end, sums, sums + size);
  });
  if (!parameters) return;
  parallel_for((p.d + chunk - 1) / chunk, p.threads, [&](int64_t task, int) {
    const int64_t first = task * chunk, count = first + chunk < p.d ? chunk : p.d - first;
    add_blocks(dweight, blocks, 2 * size, first, count, p.weight_dtype, p.dweight);
    add_blocks(dweight + size, blocks, 2 * size, first, count, p.bias_dtype, p.dbias);
  });
}

}  // namespace

void norm_gradient(const NormGradientParams& p) {
  const bool rms = p.kind != NormKind::layer;
  if (p.dtype == DType::f64)
    rms ? backward<true, double>(p) : backward<false, double>(p);
  else
    rms ? backward<true, float>(p) : backward<false, float>(p);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
