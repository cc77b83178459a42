// Attention forward for few queries (decoding): bound by reading K and V, which happens once.
//
// All rows that share a key head (its group of query heads, times the few queries) are handled
// together. The keys are split into chunks of a fixed length; each chunk gives a partial maximum,
// sum and output per row, merged afterwards in order. The split depends on the sizes alone, so the
// result does not depend on the number of threads.
#include <math.h>

#include "cpu/attention_scores.h"
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t CHUNK = 256;  // keys of a task: 64 KiB of K at D = 64 in float
constexpr int64_t SERIAL_BYTES =
    64 * 1024;  // below this, waking a thread costs more than it brings

// Dot products of W keys with one query row. The query is stored as the kernel multiplies it.
template <class T>
struct Dots {
  typedef compute_t<T> Q;
  static constexpr int W = width<T>;
  static int64_t padded(int64_t d) { return (d + W - 1) / W * W; }
  static Q from(T x) { return to_compute(x); }

  static PYFUSE_INLINE vec_t<T> run(const Q* q, const T* k, int64_t stride, int64_t count,
                                    int64_t d) {
    vec_t<T> acc[W] = {};
    const int64_t whole = d / W * W;
    for (int64_t j = 0; j < whole; j += W) {
      const vec_t<T> x = load(q + j);
      PYFUSE_UNROLL for (int i = 0; i < W; ++i) acc[i] +=
          x * load(k + (i < count ? i : 0) * stride + j);
    }
    if (whole < d) {
      const vec_t<T> x = load(q + whole);
      for (int i = 0; i < W; ++i) {
        acc[i] += x * load(k + (i < count ? i : 0) * stride + whole, d - whole);
      }
    }
    return row_sums(acc);
  }
};

#if defined(__AVX512BF16__)
template <>
struct Dots<bf16> {  // pairs of exact products, added in float
  typedef bf16 Q;
  static constexpr int W = 16;
  static int64_t padded(int64_t d) { return (d + 31) / 32 * 32; }
  static bf16 from(bf16 x) { return x; }

  static PYFUSE_INLINE vfloat run(const bf16* q, const bf16* k, int64_t stride, int64_t count,
                                  int64_t d) {
    __m512 acc[W] = {};
    for (int64_t j = 0; j < d; j += 32) {
      const __m512bh x = (__m512bh)_mm512_loadu_si512(q + j);
      const __mmask32 present = d - j >= 32 ? ~0u : (1u << (d - j)) - 1;
      PYFUSE_UNROLL for (int i = 0; i < W; ++i) {
        const __m512i y = _mm512_maskz_loadu_epi16(present, k + (i < count ? i : 0) * stride + j);
        acc[i] = _mm512_dpbf16_ps(acc[i], x, (__m512bh)y);
      }
    }
    vfloat sums[W];
    PYFUSE_UNROLL for (int i = 0; i < W; ++i) sums[i] = (vfloat)acc[i];
    return row_sums(sums);
  }
};
#endif

template <class T>
class Decode {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  typedef typename Dots<T>::Q Q;
  static constexpr int W = width<T>;
  static constexpr int ROWS = 4, NV = PYFUSE_VECTOR_BYTES == 64 ? 4 : 2;  // of P·V in registers

  const AttentionParams& p;
  const int64_t group = p.heads_q / p.heads_k;
  const int64_t rows = group * p.queries;  // sharing one key head: row = g·M + m
  const int64_t d_padded = Dots<T>::padded(p.d);
  const int64_t dv_padded = (p.dv + W - 1) / W * W;
  const int64_t chunks = p.keys > 0 ? (p.keys + CHUNK - 1) / CHUNK : 1;
  const C c = exponent_scale<C>(p);

  struct Partial {  // of one batch, key head and chunk; `rows` of each
    C *max, *sum, *o;
  };
  struct Task {
    Q* q;
    C *scores, *mask;
  };
  Partial take_partial(Carver& carver) const {
    return {carver.take<C>(rows), carver.take<C>(rows), carver.take<C>(rows * dv_padded)};
  }
  Task take_task(Carver& carver) const {
    return {carver.take<Q>(rows * d_padded), carver.take<C>(rows * CHUNK), carver.take<C>(CHUNK)};
  }

  int64_t head(int64_t hk, int64_t row) const { return hk * group + row / p.queries; }

  void read_queries(int64_t b, int64_t hk, Q* q) const {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = static_cast<const T*>(p.q) + b * p.q_stride[0] + head(hk, r) * p.q_stride[1] +
                      r % p.queries * p.q_stride[2];
      for (int64_t j = 0; j < d_padded; ++j)
        q[r * d_padded + j] = j < p.d ? Dots<T>::from(from[j]) : Q{};
    }
  }

  // scores [rows][CHUNK] -> probabilities in place, with each row's maximum and sum.
  void softmax(const Task& t, int64_t width, const Partial& out) const {
    for (int64_t r = 0; r < rows; ++r) {
      C* s = t.scores + r * CHUNK;
      V top = load(s);
      for (int64_t j = W; j < width; j += W) top = max(top, load(s + j));
      const C peak = reduce_max(top);
      const C pivot = peak == -static_cast<C>(INFINITY) ? C(0) : peak;
      const V shift = splat(-pivot * c);
      V total{};
      for (int64_t j = 0; j < width; j += W) {
        const V e = exp2_bounded(load(s + j) * c + shift);
        total += e;
        store(s + j, e);
      }
      out.max[r] = peak;
      out.sum[r] = reduce_add(total);
    }
  }

  // o = P·V of R rows and up to NC vectors of columns, held in registers over all keys.
  template <int R, int NC>
  void multiply_v(const C* probability, const T* v, int64_t count, int64_t left, C* o) const {
    V acc[R][NC] = {};
    const bool whole = left >= NC * W;
    for (int64_t n = 0; n < count; ++n, v += p.v_stride[2]) {
      V x[NC];
      PYFUSE_UNROLL for (int i = 0; i < NC; ++i) {
        x[i] = whole || i < NC - 1 ? load(v + i * W) : load(v + i * W, left - i * W);
      }
      PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
        const V weight = splat(probability[r * CHUNK + n]);
        PYFUSE_UNROLL for (int i = 0; i < NC; ++i) acc[r][i] += weight * x[i];
      }
    }
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      PYFUSE_UNROLL for (int i = 0; i < NC; ++i) store(o + r * dv_padded + i * W, acc[r][i]);
    }
  }

  template <int R>
  void multiply_v_rows(const C* probability, const T* v, int64_t count, C* o) const {
    for (int64_t j = 0; j < p.dv; j += NV * W) {
      const int64_t left = p.dv - j;
      switch (left >= NV * W ? NV : (left + W - 1) / W) {
        case 1:
          multiply_v<R, 1>(probability, v + j, count, left, o + j);
          break;
        case 2:
          multiply_v<R, 2>(probability, v + j, count, left, o + j);
          break;
        case 3:
          multiply_v < R, NV<3 ? 1 : 3>(probability, v + j, count, left, o + j);
          break;
        default:
          multiply_v<R, NV>(probability, v + j, count, left, o + j);
          break;
      }
    }
  }

  // Where the plain product met a NaN or infinity that may belong to a hidden key: 0·NaN must not
  // count.
  void multiply_v_visible(const C* probability, const T* v, int64_t count, C* o) const {
    for (int64_t j = 0; j < p.dv; ++j) o[j] = 0;
    for (int64_t n = 0; n < count; ++n, v += p.v_stride[2]) {
      if (probability[n] == C(0)) continue;
      for (int64_t j = 0; j < p.dv; ++j) o[j] += probability[n] * to_compute(v[j]);
    }
  }

  bool finite(const C* o) const {
    C sum = 0;
    for (int64_t j = 0; j < p.dv; ++j) sum += o[j] - o[j];
    return sum == C(0);
  }

  void accumulate(const C* probability, const T* v, int64_t count, C* o) const {
    for (int64_t r = 0; r < rows; r += ROWS) {
      const C* weights = probability + r * CHUNK;
      C* out = o + r * dv_padded;
      switch (rows - r < ROWS ? rows - r : ROWS) {
        case 1:
          multiply_v_rows<1>(weights, v, count, out);
          break;
        case 2:
          multiply_v_rows<2>(weights, v, count, out);
          break;
        case 3:
          multiply_v_rows<3>(weights, v, count, out);
          break;
        default:
          multiply_v_rows<ROWS>(weights, v, count, out);
          break;
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      if (!finite(o + r * dv_padded))
        multiply_v_visible(probability + r * CHUNK, v, count, o + r * dv_padded);
  }

  void run_chunk(const Task& t, int64_t b, int64_t hk, int64_t chunk, const Partial& out) const {
    // Of the chunk, only what some row sees is read.
    int64_t lo = visible_keys(p, b, 0).lo, hi = visible_keys(p, b, p.queries - 1).hi;
    lo = lo > chunk * CHUNK ? lo : chunk * CHUNK;
    hi = hi < (chunk + 1) * CHUNK ? hi : (chunk + 1) * CHUNK;
    const int64_t count = hi > lo ? hi - lo : 0, width = (count + W - 1) / W * W;
    if (count == 0) {
      for (int64_t r = 0; r < rows; ++r) out.max[r] = -static_cast<C>(INFINITY), out.sum[r] = 0;
      memset(out.o, 0, static_cast<size_t>(rows * dv_padded) * sizeof(C));
      return;
    }
    read_queries(b, hk, t.q);
    const T* k =
        static_cast<const T*>(p.k) + b * p.k_stride[0] + hk * p.k_stride[1] + lo * p.k_stride[2];
    const T* v =
        static_cast<const T*>(p.v) + b * p.v_stride[0] + hk * p.v_stride[1] + lo * p.v_stride[2];
    for (int64_t n = 0; n < count; n += W) {
      const int64_t present = count - n < W ? count - n : W;
      for (int64_t r = 0; r < rows; ++r) {
        const V s =
            Dots<T>::run(t.q + r * d_padded, k + n * p.k_stride[2], p.k_stride[2], present, p.d);
        store(t.scores + r * CHUNK + n, s);
      }
    }
    const bool all_visible = p.mask == nullptr && p.queries == 1 && width == count;
    if (!all_visible || has_score_terms(p)) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t m = r % p.queries;
        KeyRange range = visible_keys(p, b, m);
        range.hi = range.hi < hi ? range.hi : hi;  // lanes past the chunk's last key hold copies
        finish_scores(p, b, head(hk, r), m, range, lo, width, t.scores + r * CHUNK, t.mask);
      }
    }
    softmax(t, width, out);
    accumulate(t.scores, v, count, out.o);
  }

  // Adds up the chunks of one row, in order, and writes it. The first chunk's memory is reused.
  template <class PartialOf>
  void merge_row(int64_t b, int64_t hk, int64_t r, const PartialOf& partial_of) const {
    C top = partial_of(0).max[r];
    for (int64_t i = 1; i < chunks; ++i)
      top = partial_of(i).max[r] > top ? partial_of(i).max[r] : top;
    const C pivot = top == -static_cast<C>(INFINITY) ? C(0) : top;
    C sum = 0;
    C* acc = partial_of(0).o + r * dv_padded;
    for (int64_t i = 0; i < chunks; ++i) {
      const Partial part = partial_of(i);
      const V weight = exp2(splat((part.max[r] - pivot) * c));
      sum += part.sum[r] * weight[0];
      for (int64_t j = 0; j < dv_padded; j += W) {
        const V x = load(part.o + r * dv_padded + j) * weight;
        store(acc + j, i == 0 ? x : load(acc + j) + x);
      }
    }
    write_row<T>(p, b, head(hk, r), r % p.queries, top, sum, acc);
  }

  int threads() const {
    const int64_t bytes =
        p.batch * p.heads_k * p.keys * (p.d + p.dv) * static_cast<int64_t>(sizeof(T));
    return bytes < SERIAL_BYTES ? 1 : p.threads;
  }

 public:
  explicit Decode(const AttentionParams& params) : p(params) {}

  void run() const {
    Carver partial_size(nullptr), task_size(nullptr);
    take_partial(partial_size), take_task(task_size);
    const int64_t heads = p.batch * p.heads_k;
    Workspace memory(heads * chunks * partial_size.used() + threads() * task_size.used());
    const auto partial = [&](int64_t i) {
      Carver carver(memory.data() + i * partial_size.used());
      return take_partial(carver);
    };
    char* const tasks = memory.data() + heads * chunks * partial_size.used();
    parallel_for(heads * chunks, threads(), [&](int64_t i, int thread) {
      Carver carver(tasks + thread * task_size.used());
      const int64_t bh = i / chunks;
      run_chunk(take_task(carver), bh / p.heads_k, bh % p.heads_k, i % chunks, partial(i));
    });
    for (int64_t i = 0; i < heads * rows; ++i) {
      const int64_t bh = i / rows;
      merge_row(bh / p.heads_k, bh % p.heads_k, i % rows,
                [&](int64_t chunk) { return partial(bh * chunks + chunk); });
    }
  }
};

}  // namespace

void attention_decode(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::f32:
      return Decode<float>(p).run();
    case DType::bf16:
      return Decode<bf16>(p).run();
    case DType::f16:
      return Decode<f16>(p).run();
    case DType::f64:
      return Decode<double>(p).run();
  }
  bad_switch_value("attention_decode: dtype", static_cast<int>(p.dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
