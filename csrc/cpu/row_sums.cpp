// The gradient of a table of which rows were looked up: each row gets the sum of what its
// occurrences got. One thread sums a row (or some columns of it) in the order of its occurrences,
// so that the result does not depend on the number of threads; and every row of y is written once.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t block_elements = 65536;  // read and written by a task
constexpr int64_t many = 512;              // occurrences of a row, which then is shared out
constexpr int64_t run = 128;               // occurrences added up before they join the total
constexpr int64_t streamed_bytes = 16384;  // of zeros on end, at least, if they pass the caches
constexpr int strip = 8;                   // vectors of a row that are summed at a time

// Where each row of the table occurs.
struct Occurrences {
  int64_t* end;    // of table row v's occurrences in `token`; they begin where those of v - 1 end
  int64_t* token;  // in the order of rows, then of tokens
  int64_t* often;  // the rows that occur `many` times or more
  int64_t often_count;

  int64_t begin(int64_t v) const { return v == 0 ? 0 : end[v - 1]; }
  int64_t count(int64_t v) const { return end[v] - begin(v); }
};

// A counting sort. It is not shared out: it looks at the ids alone, and rows are much longer.
void sort(const RowSumsParams& p, Occurrences& found) {
  const auto id = [&](int64_t i) {
    const int64_t at = i % p.id_count;
    return p.ids != nullptr ? p.ids[at] : at;
  };
  memset(found.end, 0, static_cast<size_t>(p.table_rows) * sizeof(int64_t));
  for (int64_t i = 0; i < p.count; ++i) ++found.end[id(i)];
  int64_t begin = 0;
  found.often_count = 0;
  for (int64_t v = 0; v < p.table_rows; ++v) {
    const int64_t count = found.end[v];
    if (count >= many) found.often[found.often_count++] = v;
    found.end[v] = begin;
    begin += count;
  }
  for (int64_t i = 0; i < p.count; ++i) found.token[found.end[id(i)]++] = i;
}

// The columns [first, first + S · width) of one row of y; of `count` only, where S is 1.
template <class R, class T, int S>
PYFUSE_INLINE void sum_strip(const RowSumsParams& p, const int64_t* token, int64_t occurrences,
                             int64_t first, int64_t count, T* y) {
  constexpr int64_t w = width<T>;
  const R* rows = static_cast<const R*>(p.rows) + first;
  vec_t<T> total[S] = {};
  for (int64_t begin = 0; begin < occurrences; begin += run) {
    const int64_t end = begin + run < occurrences ? begin + run : occurrences;
    vec_t<T> sum[S] = {};
    for (int64_t i = begin; i < end; ++i) {
      const R* row = rows + token[i] * p.row_stride;
      if (count < w)
        sum[0] += load(row, count);
      else
        PYFUSE_UNROLL for (int s = 0; s < S; ++s) sum[s] += load(row + s * w);
    }
    PYFUSE_UNROLL for (int s = 0; s < S; ++s) total[s] += sum[s];
  }
  const compute_t<T> scale = static_cast<compute_t<T>>(p.scale);
  if (count < w)
    store(y + first, total[0] * scale, count);
  else
    PYFUSE_UNROLL for (int s = 0; s < S; ++s) store(y + first + s * w, total[s] * scale);
}

template <class R, class T>
void sum_columns(const RowSumsParams& p, const Occurrences& found, int64_t v, int64_t first,
                 int64_t end) {
  constexpr int64_t w = width<T>;
  const int64_t* token = found.token + found.begin(v);
  const int64_t count = found.count(v);
  T* y = static_cast<T*>(p.y) + v * p.d;
  int64_t i = first;
  for (; i + strip * w <= end; i += strip * w) sum_strip<R, T, strip>(p, token, count, i, w, y);
  for (; i + w <= end; i += w) sum_strip<R, T, 1>(p, token, count, i, w, y);
  if (i < end) sum_strip<R, T, 1>(p, token, count, i, end - i, y);
}

// Zeros, past the caches where they are many: most of a vocabulary is never looked up.
void clear(char* to, int64_t bytes) {
#if defined(__x86_64__)
  if (bytes >= streamed_bytes) {
    const int64_t ahead = -reinterpret_cast<intptr_t>(to) & 63;
    memset(to, 0, static_cast<size_t>(ahead));
    for (to += ahead, bytes -= ahead; bytes >= 64; to += 64, bytes -= 64)
      PYFUSE_UNROLL for (int i = 0; i < 64; i += 16)
          _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
    _mm_sfence();
  }
#endif
  memset(to, 0, static_cast<size_t>(bytes));
}

// Rows [first, end) but those that occur often.
template <class R, class T>
void sum_block(const RowSumsParams& p, const Occurrences& found, int64_t first, int64_t end) {
  for (int64_t v = first; v < end; ++v) {
    int64_t next = v;
    while (next < end && found.count(next) == 0) ++next;
    clear(reinterpret_cast<char*>(static_cast<T*>(p.y) + v * p.d),
          (next - v) * p.d * static_cast<int64_t>(sizeof(T)));
    v = next;
    if (v < end && found.count(v) < many) sum_columns<R, T>(p, found, v, 0, p.d);
  }
}

template <class R, class T>
void sum_table(const RowSumsParams& p) {
  constexpr int64_t columns = strip * width<T>;
  Carver sizes(nullptr);
  const auto carve = [&](Carver& carver) {
    return Occurrences{carver.take<int64_t>(p.table_rows), carver.take<int64_t>(p.count),
                       carver.take<int64_t>(p.count / many), 0};
  };
  carve(sizes);
  Workspace workspace(sizes.used());
  Carver carver(workspace.data());
  Occurrences found = carve(carver);
  sort(p, found);
  const int64_t parts = (p.d + columns - 1) / columns;
  const int64_t shared_tasks = found.often_count * parts;
  const int64_t block = block_elements / (p.d * (1 + p.count / p.table_rows)) + 1;
  const int64_t blocks = (p.table_rows + block - 1) / block;
  parallel_for(shared_tasks + blocks, p.threads, [&](int64_t task, int) {
    if (task < shared_tasks) {
      const int64_t first = task % parts * columns;
      const int64_t end = first + columns < p.d ? first + columns : p.d;
      sum_columns<R, T>(p, found, found.often[task / parts], first, end);
    } else {
      const int64_t first = (task - shared_tasks) * block;
      const int64_t end = first + block < p.table_rows ? first + block : p.table_rows;
      sum_block<R, T>(p, found, first, end);
    }
  });
}

}  // namespace

// csrc/api/embed.cpp has checked the ids, and that rows are of y's dtype or of the computed one.
void row_sums(const RowSumsParams& p) {
  const bool own = p.rows_dtype == p.dtype;
  switch (p.dtype) {
    case DType::f32:
      return sum_table<float, float>(p);
    case DType::f64:
      return sum_table<double, double>(p);
    case DType::bf16:
      return own ? sum_table<bf16, bf16>(p) : sum_table<float, bf16>(p);
    case DType::f16:
      return own ? sum_table<f16, f16>(p) : sum_table<float, f16>(p);
    default:
      bad_switch_value("dtype", static_cast<int>(p.dtype));
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
