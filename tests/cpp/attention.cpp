// Attention forward, the kernels for many and for few queries, against the formula in double; a
// paged cache against the same cache in one piece.
#include <cmath>
#include <functional>

#include "attention_case.h"
#include "cpu/isa.h"

namespace pyfuse::test {
namespace {

typedef std::function<void(const AttentionParams&)> Kernel;

struct Outputs {
  Outputs(const AttentionInputs& in, const Kernel& kernel, int threads)
      : o(in.like_queries(in.q.array.dtype, in.c.dv)),
        lse(in.q.array.dtype == DType::f64 ? DType::f64 : DType::f32, in.lse_count()) {
    AttentionParams p = in.params();
    p.o = o.array.data();
    o.copy_strides(p.o_stride);
    if (in.c.packed()) p.o_stride[0] = 0;
    p.lse = lse.data(), p.lse_dtype = lse.dtype;
    in.set_lse_stride(p.lse_stride);
    p.threads = threads;
    kernel(p);
    o.check_gaps();
  }
  Tensor o;
  Array lse;
};

// Rounding errors that a right kernel may make: of a score, in proportion to the size of its terms
// (a sum of D of them), which p has relative to itself; of p rounded to bf16 for the dot product
// of pairs; of the sum over keys; and of the result's own dtype.
void check_row(const AttentionInputs& in, const Outputs& out, int64_t b, int64_t h, int64_t m) {
  const DType dtype = in.q.array.dtype;
  const char* const name = in.c.name.c_str();
  const AttentionInputs::Softmax s = in.softmax(b, h, m);
  const double wide = accumulator(dtype);
  const double of_score = (4 + std::sqrt(static_cast<double>(in.c.d))) * wide * (1 + s.score_size);
  const double of_p = dtype == DType::bf16 ? 0.51 * epsilon(dtype) : 0;
  const double lse = out.lse.get(in.lse_at(b, h, m));
  CHECK(close(lse, s.lse, of_score + 2 * wide * std::fabs(s.lse)),
        "%s %s: lse of %d, %d, %d: %.9g, needs %.9g", name, name_of(dtype), int(b), int(h), int(m),
        lse, s.lse);
  for (int64_t j = 0; j < in.c.dv; ++j) {
    double exact = 0, size = 0;
    for (size_t i = 0; i < s.probability.size(); ++i) {
      const auto n = static_cast<int64_t>(i);
      if (s.probability[i] == 0) continue;
      const double p = s.probability[i] * in.kept(b, h, m, n);
      const double term = p * in.of_key(in.v, b, in.key_head(h), n, j);
      exact += term, size += std::fabs(term);
    }
    const double tolerance = size * (2 * of_score + of_p + 8 * wide) +
                             0.51 * epsilon(dtype) * std::fabs(exact) +
                             (dtype == DType::f16 ? 0x1p-25 : 0);  // subnormal results
    const double o = in.of_query(out.o, b, h, m, j);
    CHECK(close(o, exact, tolerance), "%s %s: o of %d, %d, %d, %d: %.9g, needs %.9g +- %.1g", name,
          name_of(dtype), int(b), int(h), int(m), int(j), o, exact, tolerance);
  }
}

void check_case(const AttentionCase& c, DType dtype, const Kernel& kernel) {
  const AttentionInputs in(c, dtype);
  const Outputs out(in, kernel, 1), by_three(in, kernel, 3);
  CHECK(same_bytes(out.o.array, by_three.o.array) && same_bytes(out.lse, by_three.lse),
        "%s %s: other bits on 3 threads", c.name.c_str(), name_of(dtype));
  for (int64_t b = 0; b < in.c.batch; ++b)
    for (int64_t h = 0; h < c.heads_q; ++h)
      for (int64_t m = 0; m < in.queries(b); ++m) check_row(in, out, b, h, m);
  for (int64_t h = 0; h < c.heads_q && c.packed(); ++h)
    CHECK(std::isnan(out.o.get(0, h, 0, 0)) && std::isnan(out.o.get(0, h, in.q.rows - 1, 0)),
          "%s: wrote to a row of no sequence", c.name.c_str());
}

TEST(many_queries) {
  for (const AttentionCase& c : attention_cases())
    for (const DType dtype : dtypes) check_case(c, dtype, cpu::kernels().attention);
}

void decode(const AttentionParams& p) {
  DecodeParams d;
  static_cast<AttentionParams&>(d) = p;
  cpu::kernels().attention_decode(d);
}

bool decodable(const AttentionCase& c) { return !c.packed() && c.dropout == 0; }

TEST(few_queries) {
  for (const AttentionCase& c : attention_cases())
    for (const DType dtype : dtypes)
      if (decodable(c)) check_case(c, dtype, decode);
}

// The keys and values of `in`, in pages that lie in memory in the opposite order. Where a sequence
// has ended its pages hold NaN and the table holds nothing that could be read.
template <class Entry>
class Pages {
 public:
  Pages(const AttentionInputs& in, int64_t size)
      : size_(size),
        each_((in.c.keys + size - 1) / size),
        table_(in.c.batch * each_ * static_cast<int64_t>(sizeof(Entry))),
        k_(in.q.array.dtype, in.c.batch * each_, in.c.heads_k, size, in.c.d, in.c.heads_first),
        v_(in.q.array.dtype, in.c.batch * each_, in.c.heads_k, size, in.c.dv, in.c.heads_first) {
    for (int64_t b = 0; b < in.c.batch; ++b) {
      const int64_t length =
          in.c.seqlens.empty() ? in.c.keys : in.c.seqlens[static_cast<size_t>(b)];
      for (int64_t n = 0; n < length; ++n) {
        const int64_t at = b * each_ + n / size, page = in.c.batch * each_ - 1 - at;
        static_cast<Entry*>(table_.data())[at] = static_cast<Entry>(page);
        for (int64_t hk = 0; hk < in.c.heads_k; ++hk) {
          for (int64_t j = 0; j < in.c.d; ++j) k_.set(page, hk, n % size, j, in.k.get(b, hk, n, j));
          for (int64_t j = 0; j < in.c.dv; ++j)
            v_.set(page, hk, n % size, j, in.v.get(b, hk, n, j));
        }
      }
    }
  }

  void decode(const AttentionParams& p) const {
    DecodeParams d;
    static_cast<AttentionParams&>(d) = p;
    d.k = k_.array.data(), d.v = v_.array.data();
    k_.copy_strides(d.k_stride), v_.copy_strides(d.v_stride);
    d.block_table = table_.data(), d.table_is_64_bit = sizeof(Entry) == 8;
    d.table_stride[0] = each_, d.table_stride[1] = 1;
    d.page_size = size_, d.pages = k_.batch;
    cpu::kernels().attention_decode(d);
  }

 private:
  const int64_t size_, each_;
  Memory table_;
  Tensor k_, v_;
};

template <class Entry>
void check_pages(const AttentionCase& c, DType dtype, int64_t size) {
  const AttentionInputs in(c, dtype);
  const Pages<Entry> pages(in, size);
  const auto paged = [&](const AttentionParams& p) { pages.decode(p); };
  const Outputs expected(in, decode, 1), out(in, paged, 1), by_three(in, paged, 3);
  CHECK(same_bytes(out.o.array, expected.o.array) && same_bytes(out.lse, expected.lse) &&
            same_bytes(by_three.o.array, expected.o.array),
        "%s %s: other bits in pages of %d", c.name.c_str(), name_of(dtype), int(size));
}

TEST(paged_cache) {
  for (const AttentionCase& c : attention_cases()) {
    for (const DType dtype : dtypes) {
      if (!decodable(c) || c.keys == 0) continue;
      check_pages<int32_t>(c, dtype, 16);
      check_pages<int64_t>(c, dtype, 7);
    }
  }
}

}  // namespace
}  // namespace pyfuse::test
