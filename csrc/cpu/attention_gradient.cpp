// Attention backward: dq, dk and dv by recomputation (Dao, arXiv:2307.08691, algorithm 2).
//
// A task is a chunk of keys of one key head, tile by tile: a tile's K and V are packed, all queries
// that see it pass by in blocks, and each block gives five products (attention_gradient_block.h has
// the first two and what lies between):
//
//     s = Q·Kᵀ   dp = dO·Vᵀ   dV += Pᵀ·dO   dK += dSᵀ·Q   dQ += dS·K
//
// dK and dV of a tile belong to one task alone, which adds up in the order of the queries. dQ gets
// a contribution from every chunk: each chunk has its own, and they are added in the order of the
// keys when all are there. The chunks depend on the sizes alone, so the result does not depend on
// the number of threads, and nothing is atomic.
#include "cpu/attention_gradient_block.h"
#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

// Tasks wanted, so that few heads use many threads, and the keys that one has at least: each packs
// its queries anew.
constexpr int64_t TASKS = 32, LEAST_KEYS = 256;
constexpr int64_t MEMORY = int64_t{32} << 20;  // bytes for the chunks' dQ, if one head fits

// Row `row` of T at `to` = scale · from, d elements.
template <class T, class C>
void write_scaled(T* to, const C* from, int64_t d, C scale) {
  constexpr int W = width<T>;
  int64_t j = 0;
  for (; j + W <= d; j += W) store(to + j, load(from + j) * scale);
  if (j < d) store(to + j, load(from + j, d - j) * scale, d - j);
}

template <class T, class Path>
class Gradient : public GradientBlock<T, Path> {
  typedef GradientBlock<T, Path> Base;
  using Base::BM, Base::BN, Base::W;
  using Base::d_padded, Base::dv_padded, Base::g, Base::p, Base::rows;
  using typename Base::C;
  using typename Base::Keys;
  using typename Base::Packed;
  using typename Base::Queries;
  using typename Base::Span;
  using typename Base::Tile;

 public:
  using Base::blocks, Base::group, Base::tiles;

  struct Task {
    Queries* queries;  // of each query head of the group
    Keys keys;
    Tile tile;
    C *dk, *dv;  // of one tile
  };

  explicit Gradient(const AttentionGradientParams& sequence) : Base(sequence) {}

  Task take_task(Carver& carver, bool fill) const {
    Task t{};
    t.queries = carver.take<Queries>(group);
    for (int64_t i = 0; i < group; ++i) {
      const Queries x = Base::take_queries(carver, rows);
      if (fill) t.queries[i] = x;
    }
    t.keys = Base::take_keys(carver);
    t.tile = Base::take_tile(carver);
    t.dk = carver.take<C>(BN * d_padded);
    t.dv = carver.take<C>(BN * dv_padded);
    return t;
  }

  int64_t dq_size() const { return group * rows * d_padded; }  // of one key head

  // How many chunks share the keys of one head: enough tasks, none below LEAST_KEYS, memory
  // bounded.
  int64_t chunks(int64_t heads) const {
    const int64_t wanted = (TASKS + heads - 1) / heads, most = p.keys / LEAST_KEYS;
    const int64_t room = MEMORY / (dq_size() * static_cast<int64_t>(sizeof(C)) + 1);
    int64_t count = wanted < most ? wanted : most;
    count = count < room ? count : room;
    return count < 1 ? 1 : count;
  }

  // Tiles [first, last) of key head hk: writes dk and dv, leaves the chunk's part of dq in `dq`.
  void run_chunk(const Task& t, int64_t hk, int64_t first, int64_t last, C* dq) const {
    for (int64_t i = 0; i < group; ++i)
      for (int64_t block = 0; block < blocks; ++block)
        Base::pack_queries(t.queries[i], hk * group + i, block, block);
    memset(dq, 0, static_cast<size_t>(dq_size()) * sizeof(C));
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t count = p.keys - tile * BN < BN ? p.keys - tile * BN : BN;
      const int64_t even = (count + 1) / 2 * 2;  // products come in pairs of keys
      memset(t.dk, 0, static_cast<size_t>(even * d_padded) * sizeof(C));
      memset(t.dv, 0, static_cast<size_t>(even * dv_padded) * sizeof(C));
      Base::pack_keys(t.keys, hk, tile);
      for (int64_t i = 0; i < group; ++i) {
        for (int64_t block = 0; block < blocks; ++block) {
          const Span span = Base::span_of(block, tile);
          if (span.count == 0) continue;
          Base::weights(t.tile, t.queries[i], t.keys, hk * group + i, block, block, tile, span);
          add_products(t, t.queries[i], block, span, dq + (i * rows + block * BM) * d_padded);
        }
      }
      for (int64_t n = 0; n < count; ++n) {
        write_scaled(row_of(g.dk, g.dk_stride, hk, tile * BN + n), t.dk + n * d_padded, p.d,
                     static_cast<C>(p.scale));
        write_scaled(row_of(g.dv, g.dv_stride, hk, tile * BN + n), t.dv + n * dv_padded, p.dv,
                     C(1));
      }
    }
  }

  // dq of one block of rows = the sum of its chunks, `stride` elements apart, in order.
  void write_dq(C* chunk, int64_t count, int64_t stride, int64_t h, int64_t block) const {
    C* const sum = chunk + (h % group * rows + block * BM) * d_padded;
    const int64_t left = p.queries - block * BM, present = left < BM ? left : BM;
    for (int64_t i = 1; i < count; ++i)
      for (int64_t j = 0; j < present * d_padded; j += W)
        store(sum + j, load(sum + j) + load(sum + i * stride + j));
    for (int64_t i = 0; i < present; ++i)
      write_scaled(row_of(g.dq, g.dq_stride, h, block * BM + i), sum + i * d_padded, p.d,
                   static_cast<C>(p.scale));
  }

 private:
  static T* row_of(void* base, const int64_t (&stride)[3], int64_t h, int64_t row) {
    return static_cast<T*>(base) + h * stride[1] + row * stride[2];
  }

  void add_products(const Task& t, const Queries& x, int64_t block, Span span, C* dq) const {
    const Weights<Path>& w = t.tile.weights;
    const int64_t queries = Base::rows_of(block), row = block * BM;
    const Packed *q = x.q_values + row * d_padded, *d_o = x.do_values + row * dv_padded;
    const Packed* k = t.keys.k_values + span.from * d_padded;
    C *const dk_of_span = t.dk + span.from * d_padded, *const dv_of_span =
                                                           t.dv + span.from * dv_padded;
    if (span.general && (x.not_finite[block] != C(0) || *t.keys.not_finite != C(0))) {
      return add_products_visible(t, q, d_o, k, queries, span.count, dk_of_span, dv_of_span, dq);
    }
    for (int64_t n = 0; n < span.count;) {
      const bool six = span.count - n >= MR;  // else two, the second perhaps past the last: zero
      const Packed *pw = w.p_of_keys() + n * w.key_row, *dsw = w.ds_of_keys() + n * w.key_row;
      C *dv = dv_of_span + n * dv_padded, *dk = dk_of_span + n * d_padded;
      if (six) {
        accumulate_columns<Path, MR>(pw, w.key_row, w.key_step, d_o, dv_padded, queries, nullptr,
                                     dv);
        accumulate_columns<Path, MR>(dsw, w.key_row, w.key_step, q, d_padded, queries, nullptr, dk);
      } else {
        accumulate_columns<Path, 2>(pw, w.key_row, w.key_step, d_o, dv_padded, queries, nullptr,
                                    dv);
        accumulate_columns<Path, 2>(dsw, w.key_row, w.key_step, q, d_padded, queries, nullptr, dk);
      }
      n += six ? MR : 2;
    }
    for (int64_t i = 0; i < queries; i += MR)
      accumulate_columns<Path, MR>(w.ds_of_queries() + i * w.query_row, w.query_row, w.query_step,
                                   k, d_padded, span.count, nullptr, dq + i * d_padded);
  }

  // The same where q, k or dO holds a NaN or infinity and some pairs are hidden: 0·NaN must not
  // count.
  void add_products_visible(const Task& t, const Packed* q, const Packed* d_o, const Packed* k,
                            int64_t queries, int64_t count, C* dk, C* dv, C* dq) const {
    const Weights<Path>& w = t.tile.weights;
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t n = 0; n < count; ++n) {
        const C weight = w.p_at(i, n), ds = w.ds_at(i, n);
        for (int64_t j = 0; weight != C(0) && j < p.dv; ++j)
          dv[n * dv_padded + j] += weight * Path::value(d_o, dv_padded, i, j);
        if (ds == C(0)) continue;
        for (int64_t j = 0; j < p.d; ++j) {
          dk[n * d_padded + j] += ds * Path::value(q, d_padded, i, j);
          dq[i * d_padded + j] += ds * Path::value(k, d_padded, n, j);
        }
      }
    }
  }
};

template <class T, class Path>
void run(const AttentionGradientParams& g) {
  typedef Gradient<T, Path> Sequence;
  typedef typename Path::Compute C;
  const AttentionParams& p = g.call;
  const int64_t heads = p.batch * p.heads_k;
  if (heads == 0) return;
  const Sequence longest(g);
  const int64_t most_chunks = longest.chunks(heads);
  const int64_t dq_bytes = Workspace::round_up(longest.dq_size() * static_cast<int64_t>(sizeof(C)));
  const auto chunks_of = [&](const Sequence& s) {
    const int64_t count = s.chunks(heads);
    return count < most_chunks ? count : most_chunks;
  };
  int64_t wave = MEMORY / (most_chunks * dq_bytes + 1);  // key heads at a time
  wave = wave < 1 ? 1 : wave < heads ? wave : heads;
  Carver task_size(nullptr);
  longest.take_task(task_size, false);
  Workspace memory(p.threads * task_size.used() + wave * most_chunks * dq_bytes);
  char* const slots = memory.data() + p.threads * task_size.used();
  const auto slot = [&](int64_t unit, int64_t chunk) {
    return reinterpret_cast<C*>(slots + (unit * most_chunks + chunk) * dq_bytes);
  };
  for (int64_t first = 0; first < heads; first += wave) {
    const int64_t units = heads - first < wave ? heads - first : wave;
    // The first chunks come first: with a causal mask they see most queries.
    parallel_for(units * most_chunks, p.threads, [&](int64_t i, int thread) {
      const int64_t unit = i % units, chunk = i / units, head = first + unit;
      const Sequence s(sequence_of(g, head / p.heads_k));
      const int64_t chunks = chunks_of(s);
      if (chunk >= chunks) return;
      Carver carver(memory.data() + thread * task_size.used());
      s.run_chunk(s.take_task(carver, true), head % p.heads_k, s.tiles * chunk / chunks,
                  s.tiles * (chunk + 1) / chunks, slot(unit, chunk));
    });
    const int64_t per_unit = longest.group * longest.blocks;
    parallel_for(units * per_unit, p.threads, [&](int64_t i, int) {
      const int64_t unit = i / per_unit, head = first + unit;
      const Sequence s(sequence_of(g, head / p.heads_k));
      const int64_t block = i % longest.blocks;
      if (block >= s.blocks) return;
      const int64_t h = head % p.heads_k * s.group + i % per_unit / longest.blocks;
      s.write_dq(slot(unit, 0), chunks_of(s), dq_bytes / static_cast<int64_t>(sizeof(C)), h, block);
    });
  }
}

}  // namespace

void attention_gradient(const AttentionGradientParams& g) {
  with_types(g.call.dtype, "attention_gradient: dtype", [&](auto types) {
    run<typename decltype(types)::Stored, typename decltype(types)::Path>(g);
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
