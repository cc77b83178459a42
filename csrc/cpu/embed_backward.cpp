// Gradient of an embedding, up to the sum of a token's rows: through dropout and the norm. What
// each row of a table gets of it is row_sums' work.
#include "cpu/embed_rows.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t block_elements = 16384;  // of y to a task,
constexpr int64_t most_tasks = 256;        // each of which sums the norm's gradients up on its own
constexpr int64_t column_block = 256;
constexpr int together = 4;  // tokens of a group

// What R tokens' gradients come from and where they go.
template <int R, class T>
struct Gradients {
  typedef compute_t<T> C;
  const T* dy[R];
  const C* factor[R];          // of dropout; null: none
  C* dsum[R];                  // null: not wanted
  C *norm_weight, *norm_bias;  // sums over the task's tokens; null: not wanted
  C* normalised[R];            // scratch

  template <class At>
  PYFUSE_INLINE vec_t<T> arriving(int r, const At& at) const {
    return factor[r] == nullptr ? at(dy[r]) : at(dy[r]) * at(factor[r]);
  }
};

// The tokens of a group share the additions to the norm's gradients: a quarter of the memory
// traffic and of the rounding.
template <int R, class T, class P>
PYFUSE_INLINE void through_norm(const EmbedParams& p, int64_t token, const Gradients<R, T>& to) {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  constexpr int parts = R == 1 ? accumulators : 1;
  const C* weight = static_cast<const C*>(p.norm_weight);
  const C* statistics = static_cast<const C*>(p.statistics) + 2 * token;
  Summands<T, P> rows[R];
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) rows[r] = find_summands<T, P>(p, token + r);
  V sums[R][parts] = {}, products[R][parts] = {};
  for_vectors<C, parts>(p.d, [&](auto at, int part) PYFUSE_INLINE_BODY {
    V g[R], gn[R];
    PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
      const V n = (rows[r].sum(at) - statistics[2 * r]) * statistics[2 * r + 1];
      g[r] = to.arriving(r, at);
      gn[r] = g[r] * n;
      if (to.dsum[r] != nullptr) {
        const V w = at(weight);
        at.put(to.dsum[r], g[r] * w);
        at.put(to.normalised[r], n);
        sums[r][part] += g[r] * w;
        products[r][part] += gn[r] * w;
      }
    }
    if (to.norm_weight != nullptr) {
      at.put(to.norm_weight, at(to.norm_weight) + combine(gn));
      at.put(to.norm_bias, at(to.norm_bias) + combine(g));
    }
  });
  if (to.dsum[0] == nullptr) return;
  // What moves the mean and the deviation changes nothing in y.
  const C count = static_cast<C>(p.d);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) {
    const C mean = reduce_add(combine(sums[r])) / count;
    const C product = reduce_add(combine(products[r])) / count, rstd = statistics[2 * r + 1];
    for_vectors<C>(p.d, [&](auto at, int) PYFUSE_INLINE_BODY {
      at.put(to.dsum[r], (at(to.dsum[r]) - mean - at(to.normalised[r]) * product) * rstd);
    });
  }
}

// A task's sums over its tokens, and scratch for the rows of a group.
template <class C>
struct Task {
  C *norm_weight, *norm_bias;
  C *normalised, *factor;
  int64_t row;  // elements of a row of the scratch
};

template <int R, class T, class P>
void backward_group(const EmbedBackwardParams& all, const DropoutRule& rule, int64_t token,
                    const Task<compute_t<T>>& task) {
  typedef compute_t<T> C;
  const EmbedParams& p = all.forward;
  Gradients<R, T> to;
  to.norm_weight = task.norm_weight, to.norm_bias = task.norm_bias;
  for (int r = 0; r < R; ++r) {
    to.dy[r] = static_cast<const T*>(all.dy) + (token + r) * all.dy_stride;
    to.dsum[r] = all.dsum == nullptr ? nullptr : static_cast<C*>(all.dsum) + (token + r) * p.d;
    to.normalised[r] = task.normalised + r * task.row;
    to.factor[r] = nullptr;
    if (p.dropout_seed == nullptr) continue;
    C* factor = task.factor + r * task.row;
    dropout_row<C>(rule, 0, 0, static_cast<uint32_t>(token + r), 0, p.d, factor);
    to.factor[r] = factor;
  }
  if (p.norm_weight != nullptr) return through_norm<R, T, P>(p, token, to);
  PYFUSE_UNROLL for (int r = 0; r < R; ++r) for_vectors<C>(
      p.d, [&](auto at, int) PYFUSE_INLINE_BODY { at.put(to.dsum[r], to.arriving(r, at)); });
}

template <class T, class P>
void embed_backward_tokens(const EmbedBackwardParams& all) {
  typedef compute_t<T> C;
  const EmbedParams& p = all.forward;
  const bool drops = p.dropout_seed != nullptr;
  const DropoutRule rule = drops ? dropout_rule(p.dropout_seed, p.dropout_p) : DropoutRule{};
  const int64_t share = (p.tokens + most_tasks - 1) / most_tasks;
  const int64_t block = share > block_elements / p.d + 1 ? share : block_elements / p.d + 1;
  const int64_t tasks = (p.tokens + block - 1) / block;
  const int64_t row = Workspace::round_up(p.d + Vec<C>::width);  // dropout_row fills whole vectors
  const int64_t scratch = 2 * together * row;
  const int64_t sums = all.dnorm == nullptr ? 0 : 2 * p.d;
  Workspace workspace(scratch * p.threads * sizeof(C)), partial(tasks * sums * sizeof(C));
  C* const partials = reinterpret_cast<C*>(partial.data());
  parallel_for(tasks, p.threads, [&](int64_t index, int thread) {
    Task<C> task{};
    task.row = row;
    task.normalised = reinterpret_cast<C*>(workspace.data()) + thread * scratch;
    task.factor = task.normalised + together * row;
    if (sums != 0) {
      task.norm_weight = partials + index * sums, task.norm_bias = task.norm_weight + p.d;
      memset(task.norm_weight, 0, static_cast<size_t>(sums) * sizeof(C));
    }
    const int64_t end = (index + 1) * block < p.tokens ? (index + 1) * block : p.tokens;
    int64_t token = index * block;
    for (; token + together <= end; token += together)
      backward_group<together, T, P>(all, rule, token, task);
    for (; token < end; ++token) backward_group<1, T, P>(all, rule, token, task);
  });
  if (sums == 0) return;
  C* const dnorm = static_cast<C*>(all.dnorm);
  parallel_for((sums + column_block - 1) / column_block, p.threads, [&](int64_t block, int) {
    const int64_t first = block * column_block;
    const int64_t columns = sums - first < column_block ? sums - first : column_block;
    for_vectors<C>(columns, [&](auto at, int) PYFUSE_INLINE_BODY {
      vec_t<T> total{};
      for (int64_t task = 0; task < tasks; ++task) total += at(partials + task * sums + first);
      at.put(dnorm + first, total);
    });
  });
}

}  // namespace

void embed_backward(const EmbedBackwardParams& p) {
  with_embed_types(p.forward.dtype, p.forward.position_dtype, [&](auto type, auto position_type) {
    embed_backward_tokens<decltype(type), decltype(position_type)>(p);
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
