// Attention forward for many queries (prefill, encoders): tiles of keys, online softmax.
//
// For every batch and key head, K and V are packed once (attention_tile.h). A task is then a block
// of BM query rows of one head: for each tile of BN keys, six rows at a time, it computes the
// scores, folds them into the running maximum m and sum l of each row, and adds P·V to the running
// output, rescaled by alpha = exp(m_old - m_new) (Milakov & Gimelshein, arXiv:1805.02867; Dao,
// 2307.08691). The exponential is 2^(c·s - c·m), c = scale·log2(e): one fused multiply-add and a
// polynomial. Tiles that no row of a block sees are skipped; masks are looked at only where a
// tile's edge or a mask makes it necessary. A task depends on nothing but its input, so the result
// does not depend on the number of threads.
#include <math.h>

#include "cpu/attention_scores.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int BM = 8 * MR;  // rows of a task: enough to pay for reading a tile of K and V

template <class T, class Path>
class Forward {
  typedef typename Path::Compute C;
  typedef typename Path::Packed Packed;
  typedef typename Path::V V;
  static constexpr int W = Path::W, NR = Path::NR, BN = Path::BN;

  const AttentionParams& p;
  const int64_t group = p.heads_q / p.heads_k;
  const int64_t d_packed = Path::packed_length(p.d);
  const int64_t dv_packed = (p.dv + W - 1) / W * W;
  const int64_t tiles = (p.keys + BN - 1) / BN;
  const int64_t blocks = (p.queries + BM - 1) / BM;
  const bool terms = has_score_terms(p);
  // exp(scale·s) = 2^(c·s); with score terms the scale has been applied already.
  const C c = exponent_scale<C>(p);

  struct Head {  // packed K and V of one batch and key head
    Packed *k, *v;
    C* not_finite;  // per tile: 0, or NaN if V holds anything not finite
  };
  struct Task {  // state of one block of rows
    Packed *q, *probability;
    C *scores, *row, *o, *max, *sum;
  };

  Head take_head(Carver& carver) const {
    return {carver.take<Packed>(tiles * BN * d_packed), carver.take<Packed>(tiles * BN * dv_packed),
            carver.take<C>(tiles)};
  }
  Task take_task(Carver& carver) const {
    return {carver.take<Packed>(BM * d_packed),
            carver.take<Packed>(MR * BN),
            carver.take<C>(MR * BN),
            carver.take<C>(BN),
            carver.take<C>(BM * dv_packed),
            carver.take<C>(BM),
            carver.take<C>(BM)};
  }

  static const T* at(const void* base, const int64_t (&stride)[3], int64_t b, int64_t h,
                     int64_t row) {
    return static_cast<const T*>(base) + b * stride[0] + h * stride[1] + row * stride[2];
  }

  // Keys past the last that any query of this batch sees are not read: they count as zero.
  void pack_tile(const Head& head, int64_t b, int64_t hk, int64_t tile) const {
    const int64_t first = tile * BN;
    int64_t count = visible_keys(p, b, p.queries - 1).hi - first;
    if (count <= 0) return;
    count = count < BN ? count : BN;
    for (int64_t n = 0; n < BN; n += NR) {
      const int64_t rows = count - n < 0 ? 0 : count - n < NR ? count - n : NR;
      const T* k = at(p.k, p.k_stride, b, hk, first + (rows > 0 ? n : 0));
      Path::pack_k(head.k + (first + n) * d_packed, k, p.k_stride[2], rows, p.d);
    }
    head.not_finite[tile] =
        Path::pack_v(head.v + first * dv_packed, at(p.v, p.v_stride, b, hk, first), p.v_stride[2],
                     count, BN, p.dv, dv_packed);
  }

  // scores -> probabilities of six rows; updates max and sum, leaves the rescaling factors in
  // alpha. In three passes, so that the rows' chains of dependent instructions run side by side.
  void softmax(const Task& t, C* max, C* sum, C (&alpha)[MR]) const {
    using namespace pyfuse::cpu::PYFUSE_ISA;
    V top[MR];
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      top[r] = load(t.scores + r * BN);
      PYFUSE_UNROLL for (int j = W; j < BN; j += W) top[r] =
          PYFUSE_ISA::max(top[r], load(t.scores + r * BN + j));
    }
    C pivot[MR], total[MR];
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      const C tile_max = reduce_max(top[r]), new_max = tile_max > max[r] ? tile_max : max[r];
      pivot[r] =
          new_max == -static_cast<C>(INFINITY) ? C(0) : new_max;  // no key yet: not inf - inf
      alpha[r] = (max[r] - pivot[r]) * c;
      max[r] = new_max;
    }
    for (int r = 0; r < MR; r += W) {
      const int count = MR - r < W ? MR - r : W;
      store(alpha + r, exp2_bounded(load(alpha + r, count)), count);
    }
    for (int r = 0; r < MR; ++r) {
      const C* s = t.scores + r * BN;
      const V shift = splat(-pivot[r] * c);
      V parts[2] = {};
      PYFUSE_UNROLL for (int j = 0; j < BN; j += W) {
        const V e = exp2_bounded(load(s + j) * c + shift);
        parts[j / W % 2] += e;
        Path::put_p(t.probability + r * BN, j, e);
      }
      total[r] = reduce_add(parts[0] + parts[1]);
    }
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) sum[r] = sum[r] * alpha[r] + total[r];
  }

  // o = o·alpha + P·V for six rows, up to NV vectors of columns at a time.
  void accumulate(const Task& t, const Packed* v, int64_t count, const C* alpha, C* o) const {
    for (int64_t column = 0; column < dv_packed / W; column += NV) {
      const int64_t left = dv_packed / W - column;
      const Packed* values = v + column * Path::value_vector;
      switch (left < NV ? left : NV) {
        case 1:
          Path::template multiply_v<1>(t.probability, values, dv_packed, count, alpha,
                                       o + column * W);
          break;
        case 2:
          Path::template multiply_v<2>(t.probability, values, dv_packed, count, alpha,
                                       o + column * W);
          break;
        case 3:
          Path::template multiply_v<3>(t.probability, values, dv_packed, count, alpha,
                                       o + column * W);
          break;
        default:
          Path::template multiply_v<NV>(t.probability, values, dv_packed, count, alpha,
                                        o + column * W);
          break;
      }
    }
  }

  // The same where V holds a NaN or infinity and some keys are hidden: 0·NaN must not count.
  void accumulate_visible(const Task& t, const Packed* v, int64_t count, const C* alpha,
                          C* o) const {
    for (int r = 0; r < MR; ++r) {
      for (int64_t j = 0; j < p.dv; ++j) o[r * dv_packed + j] *= alpha[r];
      for (int64_t n = 0; n < count; ++n) {
        const C weight = Path::probability(t.probability + r * BN, n);
        if (weight == C(0)) continue;
        for (int64_t j = 0; j < p.dv; ++j)
          o[r * dv_packed + j] += weight * Path::value(v, dv_packed, n, j);
      }
    }
  }

  // One tile of keys against six rows, from row `first` (absolute) on.
  void fold_tile(const Task& t, const Head& head, int64_t b, int64_t h, int64_t first, int64_t tile,
                 int64_t local) const {
    const int64_t n = tile * BN, last = first + MR - 1 < p.queries ? first + MR - 1 : p.queries - 1;
    const KeyRange top = visible_keys(p, b, first), bottom = visible_keys(p, b, last);
    if (n >= bottom.hi || n + BN <= top.lo) return;
    const bool edge = n < bottom.lo || n + BN > top.hi;

    for (int panel = 0; panel < BN; panel += NR) {
      Path::multiply_k(t.q + local * d_packed, head.k + (n + panel) * d_packed, p.d,
                       t.scores + panel);
    }
    if (edge || terms || p.mask != nullptr) {
      for (int r = 0; r < MR; ++r) {
        const int64_t m =
            first + r < last ? first + r : last;  // rows past the end are never stored
        finish_scores(p, b, h, m, visible_keys(p, b, m), n, BN, t.scores + r * BN, t.row);
      }
    }
    C alpha[MR];
    softmax(t, t.max + local, t.sum + local, alpha);
    const int64_t count = bottom.hi - n < BN ? bottom.hi - n : BN;
    const Packed* v = head.v + n * dv_packed;
    C* o = t.o + local * dv_packed;
    const bool poisoned = head.not_finite[tile] != C(0) && (edge || p.mask != nullptr);
    poisoned ? accumulate_visible(t, v, count, alpha, o) : accumulate(t, v, count, alpha, o);
  }

  void run_block(const Task& t, const Head& head, int64_t b, int64_t h, int64_t block) const {
    const int64_t first = block * BM;
    const int64_t rows = p.queries - first < BM ? p.queries - first : BM;
    for (int64_t i = 0; i < rows; ++i)
      Path::pack_q(t.q + i * d_packed, at(p.q, p.q_stride, b, h, first + i), p.d);
    // The block of six is always computed whole: rows past the end repeat zeros and are not stored.
    for (int64_t i = rows; i < BM && i % MR != 0; ++i)
      memset(t.q + i * d_packed, 0, static_cast<size_t>(d_packed) * sizeof(Packed));
    for (int64_t i = 0; i < BM; ++i) t.max[i] = -static_cast<C>(INFINITY), t.sum[i] = 0;
    memset(t.o, 0, static_cast<size_t>(BM * dv_packed) * sizeof(C));

    const int64_t lo = visible_keys(p, b, first).lo, hi = visible_keys(p, b, first + rows - 1).hi;
    for (int64_t tile = lo / BN; tile * BN < hi; ++tile)
      for (int64_t i = 0; i < rows; i += MR) fold_tile(t, head, b, h, first + i, tile, i);
    for (int64_t i = 0; i < rows; ++i)
      write_row<T>(p, b, h, first + i, t.max[i], t.sum[i], t.o + i * dv_packed);
  }

  // Enough heads for every thread: each packs a head into its own cache and does all its blocks.
  void run_by_head(int threads) const {
    Carver sizes(nullptr);
    take_head(sizes), take_task(sizes);
    const int64_t per_thread = sizes.used();
    Workspace memory(threads * per_thread);
    parallel_for(p.batch * p.heads_k, threads, [&](int64_t i, int thread) {
      Carver carver(memory.data() + thread * per_thread);
      const Head head = take_head(carver);
      const Task task = take_task(carver);
      const int64_t b = i / p.heads_k, hk = i % p.heads_k;
      for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(head, b, hk, tile);
      for (int64_t g = 0; g < group; ++g)
        for (int64_t block = 0; block < blocks; ++block)
          run_block(task, head, b, hk * group + g, block);
    });
  }

  // Few heads: all are packed first, then blocks are shared out, those with most keys first.
  void run_by_block(int threads) const {
    Carver head_size(nullptr), task_size(nullptr);
    take_head(head_size), take_task(task_size);
    const int64_t heads = p.batch * p.heads_k;
    Workspace memory(heads * head_size.used() + threads * task_size.used());
    const auto head_of = [&](int64_t i) {
      Carver carver(memory.data() + i * head_size.used());
      return take_head(carver);
    };
    parallel_for(heads * tiles, threads, [&](int64_t i, int) {
      const int64_t bh = i / tiles;
      pack_tile(head_of(bh), bh / p.heads_k, bh % p.heads_k, i % tiles);
    });
    char* const tasks = memory.data() + heads * head_size.used();
    parallel_for(heads * group * blocks, threads, [&](int64_t i, int thread) {
      Carver carver(tasks + thread * task_size.used());
      const int64_t block = blocks - 1 - i / (heads * group), bh = i % (heads * group);
      const int64_t b = bh / p.heads_q, h = bh % p.heads_q;
      run_block(take_task(carver), head_of(b * p.heads_k + h / group), b, h, block);
    });
  }

 public:
  explicit Forward(const AttentionParams& params) : p(params) {}

  void run() const {
    const int threads = p.threads;
    p.batch* p.heads_k >= 4 * threads ? run_by_head(threads) : run_by_block(threads);
  }
};

}  // namespace

void attention(const AttentionParams& p) {
  switch (p.dtype) {
    case DType::f32:
      return Forward<float, Wide<float>>(p).run();
#if defined(__AVX512BF16__)
    case DType::bf16:
      return Forward<bf16, Dot>(p).run();
#else
    case DType::bf16:
      return Forward<bf16, Wide<float>>(p).run();
#endif
    case DType::f16:
      return Forward<f16, Wide<float>>(p).run();
    case DType::f64:
      return Forward<double, Wide<double>>(p).run();
  }
  bad_switch_value("attention: dtype", static_cast<int>(p.dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
