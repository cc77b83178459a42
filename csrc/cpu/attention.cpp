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
#include "cpu/attention_sequence.h"
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

// More than this, in all, is not in a core's own caches when it is read or written.
constexpr int64_t CACHED = int64_t{6} << 20;
constexpr int64_t MOST_FETCHED = 256 * 1024;  // bytes that can wait in the second-level cache
constexpr int BM = 8 * MR;  // rows of a task: enough to pay for reading a tile of K and V
// Keys of a tile. Its panels are read from the second-level cache as fast as from the first, and
// every tile costs each row a maximum, a sum and a rescaling.
template <class Path>
constexpr int tile_keys = Path::depth == 2 ? 384 : 256;

// The work on one sequence (attention_sequence.h).
template <class T, class Path>
class Forward {
  typedef typename Path::Compute C;
  typedef typename Path::Packed Packed;
  typedef typename Path::V V;
  static constexpr int W = Path::W, NR = Path::NR;
  static constexpr int64_t half = half_panel<Path>;
  static constexpr int ROW_VECTORS = (MR + W - 1) / W;  // that hold a number for each of six rows

  const AttentionParams p;
  const bool far;  // the call's tensors are not in the caches
  const int64_t d_packed = Path::packed_length(p.d);
  const int64_t dv_packed = (p.dv + W - 1) / W * W;
  const bool terms = has_score_terms(p);
  const C c = exponent_scale<C>(p);
  const DropoutRule dropout =
      p.dropout_p > 0 ? dropout_rule(p.dropout_seed, p.dropout_p) : DropoutRule{};

  // The cache lines of a row; it may begin anywhere in the first.
  template <int write, int level>
  static void fetch(const T* row, int64_t length) {
    const char* const end = reinterpret_cast<const char*>(row + length);
    for (const char* line = reinterpret_cast<const char*>(row); line < end; line += 64)
      __builtin_prefetch(line, write, level);
  }
  static const T* at(const void* base, const int64_t (&stride)[3], int64_t h, int64_t row) {
    return static_cast<const T*>(base) + h * stride[1] + row * stride[2];
  }

 public:
  static constexpr int BN = tile_keys<Path>;

  struct Head {  // packed K and V of one key head
    Packed *k, *v;
    C* not_finite;  // per tile: 0, or NaN if V holds anything not finite
  };
  struct Task {  // state of one block of rows
    Packed *q, *probability;
    C *scores, *row, *o, *max, *sum;
  };

  const int64_t group = p.heads_q / p.heads_k;
  const int64_t tiles = (p.keys + BN - 1) / BN;
  const int64_t blocks = (p.queries + BM - 1) / BM;

  Forward(const AttentionParams& sequence, bool is_far) : p(sequence), far(is_far) {}

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

  // Keys past the last that any query sees are not read: they count as zero.
  void pack_tile(const Head& head, int64_t hk, int64_t tile) const {
    const int64_t first = tile * BN;
    int64_t count = visible_keys(p, 0, p.queries - 1).hi - first;
    if (count <= 0) return;
    count = count < BN ? count : BN;
    for (int64_t n = 0; n < count; n += NR) {
      const int64_t rows = count - n < NR ? count - n : NR;
      Path::pack_k(head.k + (first + n) * d_packed, at(p.k, p.k_stride, hk, first + n),
                   p.k_stride[2], rows, p.d);
    }
    const int64_t steps = (count + Path::depth - 1) / Path::depth;  // of the second product
    head.not_finite[tile] =
        Path::pack_v(head.v + first * dv_packed, at(p.v, p.v_stride, hk, first), p.v_stride[2],
                     count, steps * Path::depth, p.dv, dv_packed);
  }

  // The rows of K, V and Q with which a key head's work begins, asked for little by little: all at
  // once they would wait for each other, and the arithmetic for them.
  struct Ahead {
    int64_t hk, row, end, step;
  };
  Ahead ahead(int64_t hk) const {
    const int64_t rows = p.keys > p.queries ? p.keys : p.queries;
    const int64_t folds = group * (p.queries + MR - 1) / MR * tiles;
    return {hk, 0, rows, folds > 0 ? (rows + folds - 1) / folds : rows};
  }
  void fetch_some(Ahead& x) const {
    const int64_t end = x.row + x.step < x.end ? x.row + x.step : x.end;
    for (; x.row < end; ++x.row) {
      if (x.row < p.keys) {
        fetch<0, 2>(at(p.k, p.k_stride, x.hk, x.row), p.d);
        fetch<0, 2>(at(p.v, p.v_stride, x.hk, x.row), p.dv);
      }
      if (x.row < p.queries) fetch<0, 2>(at(p.q, p.q_stride, x.hk * group, x.row), p.d);
    }
  }

  template <class Meanwhile>
  void run_block(const Task& t, const Head& head, int64_t h, int64_t block,
                 const Meanwhile& meanwhile) const {
    const int64_t first = block * BM;
    const int64_t rows = p.queries - first < BM ? p.queries - first : BM;
    for (int64_t i = 0; i < rows; ++i)
      Path::pack_q(t.q + i * d_packed, at(p.q, p.q_stride, h, first + i), p.d);
    if (far) {  // written at the end, when they have arrived
      for (int64_t i = 0; i < rows; ++i) fetch<1, 3>(at(p.o, p.o_stride, h, first + i), p.dv);
    }
    // The block of six is always computed whole: rows past the end repeat zeros and are not stored.
    for (int64_t i = rows; i < BM && i % MR != 0; ++i)
      memset(t.q + i * d_packed, 0, static_cast<size_t>(d_packed) * sizeof(Packed));
    for (int64_t i = 0; i < BM; ++i) t.max[i] = -static_cast<C>(INFINITY), t.sum[i] = 0;
    memset(t.o, 0, static_cast<size_t>(BM * dv_packed) * sizeof(C));

    // Six rows start at the first half panel that they see, and the block goes on together.
    const int64_t lo = visible_keys(p, 0, first).lo, hi = visible_keys(p, 0, first + rows - 1).hi;
    for (int64_t step = 0; lo / half * half + step * BN < hi; ++step)
      for (int64_t i = 0; i < rows; i += MR) {
        meanwhile();
        fold_tile(t, head, h, first + i, step, i);
      }
    for (int64_t i = 0; i < rows; ++i)
      write_row<T>(p, 0, h, first + i, t.max[i], t.sum[i], t.o + i * dv_packed);
  }

 private:
  // The next BN keys against six rows, from row `first` (absolute) on.
  void fold_tile(const Task& t, const Head& head, int64_t h, int64_t first, int64_t step,
                 int64_t local) const {
    const int64_t last = first + MR - 1 < p.queries ? first + MR - 1 : p.queries - 1;
    const KeyRange top = visible_keys(p, 0, first), bottom = visible_keys(p, 0, last);
    const int64_t n = top.lo / half * half + step * BN;
    const int64_t count = bottom.hi - n < BN ? bottom.hi - n : BN;
    if (count <= 0) return;
    const int64_t width = (count + half - 1) / half * half;  // what is computed
    multiply_keys<Path, BN>(t.q + local * d_packed, d_packed, head.k, n, width, p.d, t.scores);
    const bool left = n<bottom.lo, right = n + width> top.hi;
    if (terms || p.mask != nullptr) {
      finish(t, h, first, last, n, 0, width);
    } else if (left || right) {  // up to the first half panel that all rows see; from the last on
      const int64_t to = left ? (bottom.lo - n + half - 1) / half * half : 0;
      const int64_t from = !right ? width : top.hi > n ? (top.hi - n) / half * half : 0;
      if (to >= from) {
        finish(t, h, first, last, n, 0, width);
      } else {
        if (left) finish(t, h, first, last, n, 0, to);
        if (right) finish(t, h, first, last, n, from, width);
      }
    }
    alignas(64) C alpha[ROW_VECTORS * W];
    const bool edge = left || right, dropping = p.dropout_p > 0;
    dropping ? softmax<true>(t, h, first, n, width, local, alpha)
             : softmax<false>(t, h, first, n, width, local, alpha);
    const Packed* v = head.v + n * dv_packed;
    C* o = t.o + local * dv_packed;
    const C poison = head.not_finite[n / BN] + head.not_finite[(n + count - 1) / BN];
    if (poison != C(0) && (edge || dropping || p.mask != nullptr)) {
      accumulate_visible(t, v, count, alpha, o);
    } else {
      accumulate_columns<Path, MR>(t.probability, BN, Path::depth, v, dv_packed, count, alpha, o);
    }
  }

  // The columns [from, to) of six rows, which start at key n.
  void finish(const Task& t, int64_t h, int64_t first, int64_t last, int64_t n, int64_t from,
              int64_t to) const {
    for (int r = 0; r < MR; ++r) {
      const int64_t m = first + r < last ? first + r : last;  // rows past the end are never stored
      finish_scores(p, 0, h, m, visible_keys(p, 0, m), n + from, to - from,
                    t.scores + r * BN + from, t.row);
    }
  }

  // scores -> probabilities of six rows; updates max and sum, leaves the rescaling factors in
  // alpha. What there is one of per row lies in the lanes of a vector.
  template <bool dropping>
  void softmax(const Task& t, int64_t h, int64_t first, int64_t n, int64_t width, int64_t local,
               C (&alpha)[ROW_VECTORS * W]) const {
    V row[MR], top[ROW_VECTORS];
    PYFUSE_UNROLL for (int r = 0; r < MR; ++r) {
      row[r] = load(t.scores + r * BN);
      for (int64_t j = 0; j < width; j += half) {
        PYFUSE_UNROLL for (int v = 0; v < half / W; ++v) row[r] =
            PYFUSE_ISA::max(row[r], load(t.scores + r * BN + j + v * W));
      }
    }
    fold_rows<W>(row, Max{}, top);
    alignas(64) C shift[ROW_VECTORS * W];
    PYFUSE_UNROLL for (int g = 0; g < ROW_VECTORS; ++g) {
      const int rows = MR - g * W < W ? MR - g * W : W;
      C* const max = t.max + local + g * W;
      const V old = load(max, rows), now = top[g] > old ? top[g] : old;
      const V pivot = now == -static_cast<C>(INFINITY) ? V{} : now;  // no key yet: not inf - inf
      store(max, now, rows);
      store(shift + g * W, -pivot * c);
      store(alpha + g * W, exp2_bounded((old - pivot) * c));
    }
    for (int r = 0; r < MR; ++r) {
      const C* s = t.scores + r * BN;
      const V by = splat(shift[r]);
      if (dropping)
        dropout_row(dropout, static_cast<uint32_t>(p.sequence), static_cast<uint32_t>(h),
                    static_cast<uint32_t>(first + r), n, width, t.row);
      V part[half / W] = {};
      for (int64_t j = 0; j < width; j += half) {
        V e[half / W];
        PYFUSE_UNROLL for (int v = 0; v < half / W; ++v) {
          e[v] = exp2_bounded(load(s + j + v * W) * c + by);
          part[v] += e[v];
          if (dropping) e[v] *= load(t.row + j + v * W);
        }
        Path::put_p(t.probability + r * BN + j, e);
      }
      row[r] = part[0];
      PYFUSE_UNROLL for (int v = 1; v < half / W; ++v) row[r] += part[v];
    }
    fold_rows<W>(row, Add{}, top);
    PYFUSE_UNROLL for (int g = 0; g < ROW_VECTORS; ++g) {
      const int rows = MR - g * W < W ? MR - g * W : W;
      C* const sum = t.sum + local + g * W;
      store(sum, load(sum, rows) * load(alpha + g * W) + top[g], rows);
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
};

// Of the K, V and Q with which a key head's work begins.
template <class T>
int64_t head_bytes(const AttentionParams& p) {
  return (p.keys * (p.d + p.dv) + p.queries * p.d) * static_cast<int64_t>(sizeof(T));
}
template <class T>
bool is_far(const AttentionParams& p) {
  return p.batch * p.heads_k * head_bytes<T>(p) > CACHED;
}

// Enough heads for every thread: each packs a head into its own cache and does all its blocks.
template <class T, class Path>
void run_by_head(const AttentionParams& p) {
  Carver sizes(nullptr);
  const bool far = is_far<T>(p);
  const Forward<T, Path> longest(p, far);
  longest.take_head(sizes), longest.take_task(sizes);
  const int64_t per_thread = sizes.used();
  Workspace memory(p.threads * per_thread);
  const int64_t heads = p.batch * p.heads_k;
  const bool fetches = far && head_bytes<T>(p) <= MOST_FETCHED;
  parallel_for(heads, p.threads, [&](int64_t i, int thread) {
    const Forward<T, Path> forward(sequence_of(p, i / p.heads_k), far);
    const int64_t hk = i % p.heads_k;
    Carver carver(memory.data() + thread * per_thread);
    const auto head = forward.take_head(carver);
    const auto task = forward.take_task(carver);
    for (int64_t tile = 0; tile < forward.tiles; ++tile) forward.pack_tile(head, hk, tile);
    // The head that this thread takes next, most likely, comes out of memory meanwhile.
    const int64_t next = fetches && i + p.threads < heads ? i + p.threads : i;
    const Forward<T, Path> then(sequence_of(p, next / p.heads_k), far);
    auto rest = then.ahead(next % p.heads_k);
    if (next == i) rest.end = 0;
    const auto fetch = [&] { then.fetch_some(rest); };
    for (int64_t g = 0; g < forward.group; ++g)
      for (int64_t block = 0; block < forward.blocks; ++block)
        forward.run_block(task, head, hk * forward.group + g, block, fetch);
  });
}

// Few heads: those of one sequence are packed first, then its blocks are shared out, those with
// most keys first.
template <class T, class Path>
void run_by_block(const AttentionParams& p) {
  Carver head_size(nullptr), task_size(nullptr);
  const bool far = is_far<T>(p);
  const Forward<T, Path> longest(p, far);
  longest.take_head(head_size), longest.take_task(task_size);
  Workspace memory(p.heads_k * head_size.used() + p.threads * task_size.used());
  char* const tasks = memory.data() + p.heads_k * head_size.used();
  const auto head_of = [&](const Forward<T, Path>& forward, int64_t hk) {
    Carver carver(memory.data() + hk * head_size.used());
    return forward.take_head(carver);
  };
  for (int64_t b = 0; b < p.batch; ++b) {
    const Forward<T, Path> forward(sequence_of(p, b), far);
    parallel_for(p.heads_k * forward.tiles, p.threads, [&](int64_t i, int) {
      const int64_t hk = i / forward.tiles;
      forward.pack_tile(head_of(forward, hk), hk, i % forward.tiles);
    });
    parallel_for(p.heads_q * forward.blocks, p.threads, [&](int64_t i, int thread) {
      Carver carver(tasks + thread * task_size.used());
      const int64_t block = forward.blocks - 1 - i / p.heads_q, h = i % p.heads_q;
      forward.run_block(forward.take_task(carver), head_of(forward, h / forward.group), h, block,
                        [] {});
    });
  }
}

template <class T, class Path>
void run(const AttentionParams& p) {
  p.batch* p.heads_k >= 4 * p.threads ? run_by_head<T, Path>(p) : run_by_block<T, Path>(p);
}

}  // namespace

void attention(const AttentionParams& p) {
  with_types(p.dtype, "attention: dtype", [&](auto types) {
    run<typename decltype(types)::Stored, typename decltype(types)::Path>(p);
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
