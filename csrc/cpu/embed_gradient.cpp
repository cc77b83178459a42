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
constexpr int64_t run = 8;  // tokens whose share is added up before it joins the task's

// What one token's gradients come from and where they go.
template <class T>
struct Gradients {
  typedef compute_t<T> C;
  const T* dy;
  const C* factor;             // of dropout; null: none
  C* dsum;                     // null: not wanted
  C *norm_weight, *norm_bias;  // sums over some tokens; null: not wanted
  C* normalised;               // scratch

  template <class At>
  PYFUSE_INLINE vec_t<T> arriving(const At& at) const {
    return factor == nullptr ? at(dy) : apply_dropout(at(dy), at(factor));
  }
};

template <class T, class P>
PYFUSE_INLINE void through_norm(const EmbedParams& p, int64_t token, const Gradients<T>& to) {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  const Summands<T, P> rows = find_summands<T, P>(p, token);
  const C* weight = static_cast<const C*>(p.norm_weight);
  const C mean = static_cast<const C*>(p.statistics)[2 * token];
  const C rstd = static_cast<const C*>(p.statistics)[2 * token + 1];
  V sums[accumulators] = {}, products[accumulators] = {};
  for_vectors<C>(p.d, [&](auto at, int a) PYFUSE_INLINE_BODY {
    const V g = to.arriving(at), n = (rows.sum(at) - mean) * rstd;
    if (to.norm_weight != nullptr) {
      at.put(to.norm_weight, at(to.norm_weight) + g * n);
      at.put(to.norm_bias, at(to.norm_bias) + g);
    }
    if (to.dsum != nullptr) {
      const V weighted = g * at(weight);
      at.put(to.dsum, weighted);
      at.put(to.normalised, n);
      sums[a] += weighted;
      products[a] += weighted * n;
    }
  });
  if (to.dsum == nullptr) return;
  // What moves the mean and the deviation changes nothing in y.
  const C count = static_cast<C>(p.d);
  const C sum = reduce_add(combine(sums)) / count;
  const C product = reduce_add(combine(products)) / count;
  for_vectors<C>(p.d, [&](auto at, int) PYFUSE_INLINE_BODY {
    at.put(to.dsum, (at(to.dsum) - sum - at(to.normalised) * product) * rstd);
  });
}

// total += part; part = 0.
template <class C>
PYFUSE_INLINE void fold(C* part, C* total, int64_t count) {
  for_vectors<C>(count, [&](auto at, int) PYFUSE_INLINE_BODY {
    at.put(total, at(total) + at(part));
    at.put(part, typename Vec<C>::type{});
  });
}

// The tokens [token, end). to has the scratch; total [2, d] gets the norm's gradients, null: none.
template <class T, class P>
void backward_block(const EmbedGradientParams& all, const DropoutRule& rule, int64_t token,
                    int64_t end, compute_t<T>* factor, Gradients<T> to, compute_t<T>* total) {
  typedef compute_t<T> C;
  const EmbedParams& p = all.forward;
  for (int64_t i = 1; token < end; ++token, ++i) {
    to.dy = static_cast<const T*>(all.dy) + token * all.dy_stride;
    to.dsum = all.dsum == nullptr ? nullptr : static_cast<C*>(all.dsum) + token * p.d;
    if (p.dropout_seed != nullptr) {
      dropout_row<C>(rule, 0, 0, static_cast<uint32_t>(token), 0, p.d, factor);
      to.factor = factor;
    }
    if (p.norm_weight != nullptr)
      through_norm<T, P>(p, token, to);
    else
      for_vectors<C>(p.d,
                     [&](auto at, int) PYFUSE_INLINE_BODY { at.put(to.dsum, to.arriving(at)); });
    if (total != nullptr && (i % run == 0 || token + 1 == end))
      fold(to.norm_weight, total, 2 * p.d);
  }
}

// Threads' scratch: factors, a normalised row, the norm's gradients of a run of tokens.
template <class C>
int64_t scratch_bytes(int64_t d) {
  const int64_t row = d + Vec<C>::width;  // dropout_row fills whole vectors
  Carver sizes(nullptr);
  sizes.take<C>(row), sizes.take<C>(row), sizes.take<C>(2 * d);
  return sizes.used();
}

template <class T, class P>
void embed_gradient_tokens(const EmbedGradientParams& all) {
  typedef compute_t<T> C;
  const EmbedParams& p = all.forward;
  const bool drops = p.dropout_seed != nullptr;
  const DropoutRule rule = drops ? dropout_rule(p.dropout_seed, p.dropout_p) : DropoutRule{};
  const int64_t share = (p.tokens + most_tasks - 1) / most_tasks;
  const int64_t block = share > block_elements / p.d + 1 ? share : block_elements / p.d + 1;
  const int64_t tasks = (p.tokens + block - 1) / block;
  const int64_t sums = all.dnorm == nullptr ? 0 : 2 * p.d;
  const int64_t bytes = scratch_bytes<C>(p.d);
  Workspace workspace(bytes * p.threads), partial(tasks * sums * sizeof(C));
  C* const partials = reinterpret_cast<C*>(partial.data());
  parallel_for(tasks, p.threads, [&](int64_t task, int thread) {
    Carver carver(workspace.data() + bytes * thread);
    C* const factor = carver.take<C>(p.d + Vec<C>::width);
    Gradients<T> to{};
    to.normalised = carver.take<C>(p.d + Vec<C>::width);
    C* total = nullptr;
    if (sums != 0) {
      to.norm_weight = carver.take<C>(sums), to.norm_bias = to.norm_weight + p.d;
      total = partials + task * sums;
      memset(to.norm_weight, 0, static_cast<size_t>(sums) * sizeof(C));
      memset(total, 0, static_cast<size_t>(sums) * sizeof(C));
    }
    const int64_t end = (task + 1) * block < p.tokens ? (task + 1) * block : p.tokens;
    backward_block<T, P>(all, rule, task * block, end, factor, to, total);
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

void embed_gradient(const EmbedGradientParams& p) {
  with_embed_types(p.forward.dtype, p.forward.position_dtype, [&](auto type, auto position_type) {
    embed_gradient_tokens<decltype(type), decltype(position_type)>(p);
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
