// Attention forward for few queries (decoding): bound by reading K and V, which happens once.
//
// All rows that share a key head (its group of query heads, times the few queries) are handled
// together. The keys that they see are split into chunks of a fixed length; each chunk gives a
// partial maximum, sum and output per row. Whoever finishes a head's last chunk merges them, in
// order. The split depends on the sizes alone, so the result does not depend on the threads.
#pragma once
#include <math.h>

#include "cpu/attention_scores.h"
#include "cpu/decode_scores.h"
#include "cpu/decode_values.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t CHUNK = 512;          // keys of a task: 128 KiB of K at D = 64 in float
constexpr int64_t MOST_ROWS = 64;       // that one pass over the keys serves
constexpr int64_t AHEAD_BYTES = 10240;  // of rows being fetched while others are computed with
constexpr int64_t MOST_AHEAD = 256;
constexpr int64_t SERIAL_BYTES =
    64 * 1024;  // below this, waking a thread costs more than it brings

template <class T>
class Decode {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  typedef typename Products<T>::Q Q;
  static constexpr int W = width<T>;

  const DecodeParams& p;
  const int64_t first, queries;  // of this pass
  const int64_t group = p.heads_q / p.heads_k;
  const int64_t rows = group * queries;  // sharing one key head: row = g·queries + m - first
  const int64_t d_padded = (p.d + Products<T>::STEP - 1) / Products<T>::STEP * Products<T>::STEP;
  const int64_t dv_padded = Values<T>::padded(p.dv);
  const int64_t ahead = rows_ahead(p.d > p.dv ? p.d : p.dv);
  const C c = exponent_scale<C>(p);

  struct Partial {  // of one batch, key head and chunk; `rows` of each
    C *max, *sum, *o;
  };
  struct Scratch {  // of a thread
    Q* q;
    C *wide, *scores, *mask;
    const T** table;
  };
  Partial take_partial(Carver& carver) const {
    return {carver.take<C>(rows), carver.take<C>(rows), carver.take<C>(rows * dv_padded)};
  }
  Scratch take_scratch(Carver& carver) const {
    return {carver.take<Q>(rows * d_padded), carver.take<C>(W * d_padded),
            carver.take<C>(rows * CHUNK), carver.take<C>(CHUNK),
            carver.take<const T*>(2 * CHUNK + W + MOST_AHEAD)};
  }

  static int64_t rows_ahead(int64_t d) {
    const int64_t count = AHEAD_BYTES / (d * static_cast<int64_t>(sizeof(T)));
    return count < 4 ? 4 : count > MOST_AHEAD ? MOST_AHEAD : count;
  }

  int64_t head(int64_t hk, int64_t row) const { return hk * group + row / queries; }
  int64_t query(int64_t row) const { return first + row % queries; }

  // Keys that some row of this pass sees: nothing else is read.
  KeyRange seen_keys(int64_t b) const {
    const int64_t lo = visible_keys(p, b, first).lo,
                  hi = visible_keys(p, b, first + queries - 1).hi;
    return {lo, hi > lo ? hi : lo};
  }
  int64_t chunks(int64_t b) const {
    const KeyRange seen = seen_keys(b);
    return seen.hi > seen.lo ? (seen.hi - seen.lo + CHUNK - 1) / CHUNK : 1;
  }

  void read_queries(int64_t b, int64_t hk, Q* q) const {
    for (int64_t r = 0; r < rows; ++r) {
      read_query(static_cast<const T*>(p.q) + b * p.q_stride[0] + head(hk, r) * p.q_stride[1] +
                     query(r) * p.q_stride[2],
                 p.d, d_padded, q + r * d_padded);
    }
  }

  // table: the rows of K (the last one again until the vector is full), those of V, and the first
  // ones of the next chunk's K, so that asking for a row further on always asks for what is next.
  const T** find_chunk(int64_t b, int64_t hk, int64_t lo, int64_t count, int64_t width,
                       int64_t next, const T** table) const {
    find_rows(p, p.k, p.k_stride, b, hk, lo, count, table);
    for (int64_t n = count; n < width; ++n) table[n] = table[count - 1];
    const T** const v = table + width;
    find_rows(p, p.v, p.v_stride, b, hk, lo, count, v);
    next = next < ahead ? next : ahead;
    find_rows(p, p.k, p.k_stride, b, hk, lo + count, next, v + count);
    for (int64_t n = next; n < ahead; ++n) v[count + n] = v[count - 1];
    return v;
  }

  // scores [rows][CHUNK] -> probabilities in place, with each row's maximum and sum.
  void softmax(C* scores, int64_t width, const Partial& out) const {
    for (int64_t r = 0; r < rows; ++r) {
      C* s = scores + r * CHUNK;
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

  void no_keys(const Partial& out) const {
    for (int64_t r = 0; r < rows; ++r) out.max[r] = -static_cast<C>(INFINITY), out.sum[r] = 0;
    memset(out.o, 0, static_cast<size_t>(rows * dv_padded) * sizeof(C));
  }

  void run_chunk(const Scratch& t, int64_t b, int64_t hk, int64_t chunk, const Partial& out) const {
    const KeyRange seen = seen_keys(b);
    const int64_t lo = seen.lo + chunk * CHUNK, left = seen.hi - lo;
    const int64_t count = left < CHUNK ? left : CHUNK, width = (count + W - 1) / W * W;
    if (count <= 0) return no_keys(out);
    read_queries(b, hk, t.q);
    const T* const* v = find_chunk(b, hk, lo, count, width, left - count, t.table);
    score_keys<T>(t.q, rows, p.d, d_padded, t.table, ahead, width, t.wide, t.scores, CHUNK);
    const bool all_visible = p.mask == nullptr && queries == 1 && width == count;
    if (!all_visible || has_score_terms(p)) {
      for (int64_t r = 0; r < rows; ++r) {
        KeyRange range = visible_keys(p, b, query(r));
        range.hi = range.hi < lo + count ? range.hi : lo + count;  // beyond are copies of the last
        finish_scores(p, b, head(hk, r), query(r), range, lo, width, t.scores + r * CHUNK, t.mask);
      }
    }
    softmax(t.scores, width, out);
    Values<T>::multiply(t.scores, CHUNK, rows, v, ahead, count, p.dv, out.o);
  }

  // Adds up the chunks of one row, in order, and writes it. The first chunk's memory is reused.
  template <class PartialOf>
  void merge_row(int64_t b, int64_t hk, int64_t r, int64_t count,
                 const PartialOf& partial_of) const {
    C top = partial_of(0).max[r];
    for (int64_t i = 1; i < count; ++i) {
      const C other = partial_of(i).max[r];
      top = other > top ? other : top;
    }
    const C pivot = top == -static_cast<C>(INFINITY) ? C(0) : top;
    C sum = 0;
    C* acc = partial_of(0).o + r * dv_padded;
    for (int64_t i = 0; i < count; ++i) {
      const Partial part = partial_of(i);
      const V weight = exp2(splat((part.max[r] - pivot) * c));
      sum += part.sum[r] * weight[0];
      for (int64_t j = 0; j < dv_padded; j += W) {
        const V x = load(part.o + r * dv_padded + j) * weight;
        store(acc + j, i == 0 ? x : load(acc + j) + x);
      }
    }
    Values<T>::put_in_order(acc, p.dv);
    write_row<T>(p, b, head(hk, r), query(r), top, sum, acc);
  }

 public:
  Decode(const DecodeParams& params, int64_t first_query, int64_t count)
      : p(params), first(first_query), queries(count) {}

  // Queries of a pass.
  static int64_t most_queries(const AttentionParams& p) {
    const int64_t most = MOST_ROWS / (p.heads_q / p.heads_k);
    return most > 1 ? most : 1;
  }

  int64_t tasks() const {
    int64_t count = 0;
    for (int64_t b = 0; b < p.batch; ++b) count += chunks(b) * p.heads_k;
    return count;
  }

  int threads() const {
    int64_t keys = 0;
    for (int64_t b = 0; b < p.batch; ++b) keys += seen_keys(b).hi - seen_keys(b).lo;
    const int64_t bytes = keys * p.heads_k * (p.d + p.dv) * static_cast<int64_t>(sizeof(T));
    if (bytes < SERIAL_BYTES) return 1;
    const int64_t most = tasks();
    return most < p.threads ? static_cast<int>(most) : p.threads;
  }

  // What the tasks of a call share. After all of them it is again as set_up left it.
  struct Shared {
    int64_t* start;    // [B + 1] tasks of the sequences before
    int64_t* missing;  // [B·Hk] chunks not yet computed
    char *partials, *scratch;
    int64_t partial_size, scratch_size;
  };
  Shared lay_out(char* memory, int count, int64_t* size) const {
    Carver list(memory), partial(nullptr), own(nullptr);
    take_partial(partial), take_scratch(own);
    Shared shared;
    shared.start = list.take<int64_t>(p.batch + 1);
    shared.missing = list.take<int64_t>(p.batch * p.heads_k);
    shared.partial_size = partial.used(), shared.scratch_size = own.used();
    shared.partials = list.take<char>(tasks() * partial.used());
    shared.scratch = list.take<char>(count * own.used());
    *size = list.used();
    return shared;
  }
  int64_t size(int count) const {
    int64_t bytes;
    lay_out(nullptr, count, &bytes);
    return bytes;
  }
  Shared set_up(char* memory, int count) const {
    int64_t bytes;
    const Shared shared = lay_out(memory, count, &bytes);
    shared.start[0] = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      shared.start[b + 1] = shared.start[b] + chunks(b) * p.heads_k;
      for (int64_t hk = 0; hk < p.heads_k; ++hk) shared.missing[b * p.heads_k + hk] = chunks(b);
    }
    return shared;
  }

  // Task i < tasks(), by thread < count.
  void run_task(const Shared& shared, int64_t i, int thread) const {
    const auto partial = [&](int64_t at) {
      Carver carver(shared.partials + at * shared.partial_size);
      return take_partial(carver);
    };
    Carver carver(shared.scratch + thread * shared.scratch_size);
    const int64_t b = sequence_of(shared.start, i), n = chunks(b);
    const int64_t hk = (i - shared.start[b]) / n, chunk = (i - shared.start[b]) % n;
    run_chunk(take_scratch(carver), b, hk, chunk, partial(i));
    int64_t* const missing = &shared.missing[b * p.heads_k + hk];
    if (__atomic_sub_fetch(missing, 1, __ATOMIC_ACQ_REL) > 0) return;
    *missing = n;
    for (int64_t r = 0; r < rows; ++r) {
      merge_row(b, hk, r, n, [&](int64_t other) { return partial(i - chunk + other); });
    }
  }

 private:
  // The sequence whose tasks include i.
  int64_t sequence_of(const int64_t* start, int64_t i) const {
    int64_t lo = 0, hi = p.batch;
    while (hi - lo > 1) {
      const int64_t middle = (lo + hi) / 2;
      (start[middle] <= i ? lo : hi) = middle;
    }
    return lo;
  }
};

}  // namespace
}  // namespace pyfuse::cpu::PYFUSE_ISA
