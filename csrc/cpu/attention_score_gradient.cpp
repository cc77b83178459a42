// The gradients of what attention adds to its scores or their denominator: a float mask, ALiBi's
// slopes, sinks.
//
// The gradient of the scores, ds (before softcap's factor), is computed again tile by tile
// (attention_gradient_block.h) and added up over whatever the term was broadcast over:
//
//     dmask[b', h', m', n'] = Σ ds[b, h, m, n]   over what has size 1 in the mask
//     dslope[h] = Σ -|i + N - M - j| · ds        dsink[h] = Σ -exp(sink - lse) · delta
//
// The last two add up whole heads, where an error that a row has in common (delta from a rounded o,
// lse) would not average out: there delta is rowsum(p · dp) / rowsum(p) - dlse.
//
// One task owns each element of a result and adds in a fixed order, in double: nothing is atomic,
// and the number of threads does not show. It costs two more products than dq, dk and dv alone, and
// is run only for a gradient that is wanted.
#include "cpu/attention_gradient_block.h"
#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

template <class T, class Path>
class ScoreGradient {
  typedef GradientBlock<T, Path> Block;
  typedef typename Path::Compute C;
  typedef typename Block::Span Span;
  static constexpr int BM = Block::BM, BN = Weights<Path>::BN;

  const AttentionGradientParams& g;
  const AttentionParams& p = g.call;
  const Block longest{g};

  struct Task {
    typename Block::Queries queries;  // one block of them
    typename Block::Keys keys;
    typename Block::Tile tile;
    double* sum;  // what is added up: of a mask's elements, or of the rows of a head
  };
  Task take_task(Carver& carver, int64_t sums) const {
    return {longest.take_queries(carver, BM), longest.take_keys(carver), longest.take_tile(carver),
            carver.take<double>(sums)};
  }

  // use(first row, rows, span, p, ds) for every block of queries of head h that sees something of
  // the tile; p and ds have rows of BN. Without delta ds is p · dp.
  template <bool delta, class Use>
  void visit(const Task& t, const Block& block, int64_t h, int64_t tile, const Use& use) const {
    block.pack_keys(t.keys, h / block.group, tile);
    for (int64_t i = 0; i < block.blocks; ++i) {
      Span span = block.span_of(i, tile);
      if (span.count == 0) continue;
      span.whole = span.whole && delta;
      block.pack_queries(t.queries, h, i, 0);
      for (int64_t r = 0; r < BM && !delta; ++r) t.queries.delta[r] = 0;
      block.template weights<true>(t.tile, t.queries, t.keys, h, i, 0, tile, span);
      const int64_t left = p.queries - i * BM;
      use(i * BM, left < BM ? left : BM, span, t.tile.scores, t.tile.dp);
    }
  }

  int64_t mask_tiles() const { return g.mask_size[3] == 1 ? 1 : longest.tiles; }
  int64_t mask_sums() const {
    return (g.mask_size[2] == 1 ? 1 : p.queries) * (g.mask_size[3] == 1 ? 1 : BN);
  }

  // Elements [mb, mh, :, one tile of keys] of the mask's gradient.
  void mask_tile(const Task& t, int64_t mb, int64_t mh, int64_t mask_tile) const {
    const bool every_batch = g.mask_size[0] == 1, every_head = g.mask_size[1] == 1;
    const bool every_row = g.mask_size[2] == 1, every_key = g.mask_size[3] == 1;
    const int64_t width = every_key ? 1 : BN, sums = mask_sums();
    for (int64_t i = 0; i < sums; ++i) t.sum[i] = 0;
    const auto add = [&](int64_t first, int64_t rows, Span span, const C*, const C* ds) {
      const int64_t count = span.count;
      for (int64_t i = 0; i < rows; ++i) {
        double* to = t.sum + (every_row ? 0 : first + i) * width + (every_key ? 0 : span.from);
        if (every_key) {
          for (int64_t j = 0; j < count; ++j) *to += ds[i * BN + j];
        } else {
          for (int64_t j = 0; j < count; ++j) to[j] += ds[i * BN + j];
        }
      }
    };
    for (int64_t b = every_batch ? 0 : mb; b < (every_batch ? p.batch : mb + 1); ++b) {
      const Block block(sequence_of(g, b));
      for (int64_t h = every_head ? 0 : mh; h < (every_head ? p.heads_q : mh + 1); ++h)
        for (int64_t tile = every_key ? 0 : mask_tile;
             tile < (every_key ? block.tiles : mask_tile + 1); ++tile)
          visit<true>(t, block, h, tile, add);
    }
    const int64_t row_size = g.mask_size[3], first = every_key ? 0 : mask_tile * BN;
    const int64_t count = row_size - first < width ? row_size - first : width;
    for (int64_t m = 0; m < g.mask_size[2]; ++m) {
      const int64_t at = ((mb * g.mask_size[1] + mh) * g.mask_size[2] + m) * row_size + first;
      write(at, t.sum + m * width, count);
    }
  }

  template <class M>
  static void write_as(void* to, int64_t at, const double* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j)
      from_compute(static_cast<compute_t<M>>(from[j]), static_cast<M*>(to)[at + j]);
  }
  void write(int64_t at, const double* from, int64_t count) const {
    switch (p.mask_dtype) {
      case DType::f32:
        return write_as<float>(g.d_mask, at, from, count);
      case DType::bf16:
        return write_as<bf16>(g.d_mask, at, from, count);
      case DType::f16:
        return write_as<f16>(g.d_mask, at, from, count);
      case DType::f64:
        return write_as<double>(g.d_mask, at, from, count);
    }
  }

  struct RowSums {  // over the keys, for every row of a head
    double *p, *p_dp, *distance_p, *distance_p_dp;
  };

  RowSums row_sums(const Task& t, const Block& block, int64_t h) const {
    const RowSums sums{t.sum, t.sum + p.queries, t.sum + 2 * p.queries, t.sum + 3 * p.queries};
    for (int64_t i = 0; i < 4 * p.queries; ++i) t.sum[i] = 0;
    for (int64_t tile = 0; tile < block.tiles; ++tile) {
      visit<false>(t, block, h, tile,
                   [&](int64_t first, int64_t rows, Span span, const C* weight, const C* p_dp) {
                     for (int64_t i = 0; i < rows; ++i) {
                       const int64_t m = first + i;
                       const int64_t diagonal = diagonal_key(block.p, 0, m) - tile * BN - span.from;
                       for (int64_t j = i * BN; j < i * BN + span.count; ++j) {
                         const int64_t offset = diagonal - (j - i * BN);
                         const double distance = static_cast<double>(offset < 0 ? -offset : offset);
                         sums.p[m] += weight[j];
                         sums.p_dp[m] += p_dp[j];
                         sums.distance_p_dp[m] += distance * p_dp[j];
                         sums.distance_p[m] += distance * weight[j];
                       }
                     }
                   });
    }
    return sums;
  }

  void head_gradients(const Task& t, int64_t h) const {
    double slope = 0, sink = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Block block(sequence_of(g, b));
      const RowSums sums = row_sums(t, block, h);
      for (int64_t m = 0; m < block.p.queries; ++m) {
        const bool has_sink = p.sinks != nullptr && p.sinks[h] > -INFINITY;
        const double p_sink = has_sink ? ::exp(p.sinks[h] - block.lse_of(h, m)) : 0;
        const double total = sums.p[m] + p_sink;  // 1, but for the rounding that lse came from
        if (total == 0) continue;                 // no key, no sink
        const double delta = sums.p_dp[m] / total - block.dlse_of(h, m);
        slope -= (sums.distance_p_dp[m] - delta * sums.distance_p[m]) / total;
        sink -= p_sink / total * delta;
      }
    }
    if (g.d_alibi_slopes != nullptr) g.d_alibi_slopes[h] = slope;
    if (g.d_sinks != nullptr) g.d_sinks[h] = sink;
  }

 public:
  explicit ScoreGradient(const AttentionGradientParams& params) : g(params) {}

  void run() const {
    const bool per_head = g.d_sinks != nullptr || g.d_alibi_slopes != nullptr;
    int64_t sums = per_head ? 4 * p.queries : 0;
    if (g.d_mask != nullptr && mask_sums() > sums) sums = mask_sums();
    Carver size(nullptr);
    take_task(size, sums);
    Workspace memory(p.threads * size.used());
    const auto task = [&](int thread) {
      Carver carver(memory.data() + thread * size.used());
      return take_task(carver, sums);
    };
    if (g.d_mask != nullptr) {
      const int64_t tiles = mask_tiles(), heads = g.mask_size[1];
      parallel_for(g.mask_size[0] * heads * tiles, p.threads, [&](int64_t i, int thread) {
        mask_tile(task(thread), i / tiles / heads, i / tiles % heads, i % tiles);
      });
    }
    if (per_head) {
      parallel_for(p.heads_q, p.threads,
                   [&](int64_t h, int thread) { head_gradients(task(thread), h); });
    }
  }
};

}  // namespace

void attention_score_gradient(const AttentionGradientParams& g) {
  with_types(g.call.dtype, "attention_score_gradient: dtype", [&](auto types) {
    ScoreGradient<typename decltype(types)::Stored, typename decltype(types)::Path>(g).run();
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
