// Embedding: a token's rows are added up, normalised and dropped out while they are in the first
// cache level; memory is read once and written once.
#include "cpu/embed_rows.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t block_elements = 16384;  // of the result to a task

template <class C>
struct Scratch {
  C* sum;     // of one token, before the norm
  C* factor;  // of dropout
};

// Statistics of a row in two passes: E[x²] - mean² would cancel where the mean is large.
template <class C>
PYFUSE_INLINE C reciprocal_deviation(const C* row, int64_t d, C mean, double eps) {
  typedef typename Vec<C>::type V;
  V squares[accumulators] = {};
  const V lane = iota<C>();
  for_vectors<C>(d, [&](auto at, int a) PYFUSE_INLINE_BODY {
    V off = at(row) - mean;
    if (at.count < Vec<C>::width) off = lane < static_cast<C>(at.count) ? off : V{};
    squares[a] += off * off;
  });
  const C variance = reduce_add(combine(squares)) / static_cast<C>(d) + static_cast<C>(eps);
  if constexpr (sizeof(C) == 8) return 1.0 / __builtin_sqrt(variance);
  return 1.0f / __builtin_sqrtf(variance);
}

template <class T, class P>
PYFUSE_INLINE void plain_row(const Summands<T, P>& rows, const compute_t<T>* factor, T* y,
                             int64_t d) {
  if (factor == nullptr && rows.position == nullptr && rows.segment == nullptr && rows.scale == 1) {
    for (int64_t i = 0; i < d; i += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(rows.next + i);
    memcpy(y, rows.token, static_cast<size_t>(d) * sizeof(T));
  } else if (factor == nullptr)
    for_vectors<compute_t<T>>(d, [&](auto at, int) PYFUSE_INLINE_BODY { at.put(y, rows.sum(at)); });
  else
    for_vectors<compute_t<T>>(d, [&](auto at, int) PYFUSE_INLINE_BODY {
      at.put(y, apply_dropout(rows.sum(at), at(factor)));
    });
}

template <class T, class P>
PYFUSE_INLINE void normalised_row(const EmbedParams& p, const Summands<T, P>& rows,
                                  const Scratch<compute_t<T>>& scratch, const compute_t<T>* factor,
                                  T* y, compute_t<T>* statistics) {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  const C *weight = static_cast<const C*>(p.norm_weight),
          *bias = static_cast<const C*>(p.norm_bias);
  V sums[accumulators] = {};
  for_vectors<C>(p.d, [&](auto at, int a) PYFUSE_INLINE_BODY {
    const V v = rows.sum(at);
    at.put(scratch.sum, v);
    sums[a] += v;
  });
  const C mean = reduce_add(combine(sums)) / static_cast<C>(p.d);
  const C rstd = reciprocal_deviation(scratch.sum, p.d, mean, p.eps);
  for_vectors<C>(p.d, [&](auto at, int) PYFUSE_INLINE_BODY {
    V v = (at(scratch.sum) - mean) * rstd * at(weight);
    if (bias != nullptr) v += at(bias);
    if (factor != nullptr) v = apply_dropout(v, at(factor));
    at.put(y, v);
  });
  if (statistics != nullptr) statistics[0] = mean, statistics[1] = rstd;
}

template <class T, class P>
void embed_tokens(const EmbedParams& p) {
  typedef compute_t<T> C;
  const bool drops = p.dropout_seed != nullptr;
  const DropoutRule rule = drops ? dropout_rule(p.dropout_seed, p.dropout_p) : DropoutRule{};
  const int64_t row = p.d + Vec<C>::width;  // dropout_row fills whole vectors
  const int64_t row_bytes = Workspace::round_up(row * static_cast<int64_t>(sizeof(C)));
  Workspace workspace(2 * row_bytes * p.threads);
  const int64_t block = block_elements / p.d + 1;
  parallel_for((p.tokens + block - 1) / block, p.threads, [&](int64_t task, int thread) {
    Carver carver(workspace.data() + 2 * row_bytes * thread);
    Scratch<C> scratch;
    scratch.sum = carver.take<C>(row);
    scratch.factor = carver.take<C>(row);
    const C* factor = drops ? scratch.factor : nullptr;
    const int64_t end = (task + 1) * block < p.tokens ? (task + 1) * block : p.tokens;
    for (int64_t token = task * block; token < end; ++token) {
      const Summands<T, P> rows = find_summands<T, P>(p, token);
      T* y = static_cast<T*>(p.y) + token * p.d;
      if (drops) dropout_row<C>(rule, 0, 0, static_cast<uint32_t>(token), 0, p.d, scratch.factor);
      C* statistics = p.statistics == nullptr ? nullptr : static_cast<C*>(p.statistics) + 2 * token;
      if (p.norm_weight != nullptr)
        normalised_row(p, rows, scratch, factor, y, statistics);
      else
        plain_row(rows, factor, y, p.d);
    }
  });
}

}  // namespace

void embed(const EmbedParams& p) {
  with_embed_types(p.dtype, p.position_dtype, [&](auto type, auto position_type) {
    embed_tokens<decltype(type), decltype(position_type)>(p);
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
