// Embedding: the sum of table rows, its norm and dropout, and the gradients, against the formula in
// double; the gradient of a table against the sum over its occurrences.
#include <string.h>

#include <cmath>

#include "array.h"
#include "cpu/isa.h"
#include "random_factor.h"

namespace pyfuse::test {
namespace {

struct Case {
  DType dtype = DType::f32, position_dtype = DType::f32;
  int64_t tokens = 0, d = 0;
  bool position = false, segment = false, norm = false, norm_bias = false;
  double scale = 1, dropout = 0;

  DType computed() const { return dtype == DType::f64 ? DType::f64 : DType::f32; }
  std::string name() const {
    return std::string(name_of(dtype)) + ", positions " + name_of(position_dtype) + ", " +
           std::to_string(tokens) + " tokens, d " + std::to_string(d) + (norm ? ", norm" : "") +
           (dropout > 0 ? ", dropout" : "");
  }
};

// Token i takes row ids[i % count].
class Ids {
 public:
  Ids(int64_t count, int64_t rows) : count(count), memory_(count * bytes_each) {
    for (int64_t i = 0; i < count; ++i)
      data()[i] = static_cast<int64_t>((random_unit() + 1) / 2 * static_cast<double>(rows));
  }
  int64_t* data() const { return static_cast<int64_t*>(memory_.data()); }
  int64_t row_of(int64_t token) const { return data()[token % count]; }
  const int64_t count;

 private:
  static constexpr int64_t bytes_each = sizeof(int64_t);
  Memory memory_;
};

constexpr double eps = 1e-5;

class Inputs {
 public:
  explicit Inputs(const Case& c)
      : c(c),
        token(c.dtype, 13, c.d),
        position(c.position_dtype, c.position ? positions_of(c) : 0, c.d, 1),
        segment(c.dtype, c.segment ? 2 : 0, c.d, 2),
        token_ids(c.tokens, token.rows),
        segment_ids(c.segment ? c.tokens : 0, 2),
        weight(c.computed(), c.norm ? c.d : 0),
        bias(c.computed(), c.norm_bias ? c.d : 0),
        seed_(sizeof dropout_seed) {
    weight.fill_random(), bias.fill_random();
    memcpy(seed_.data(), dropout_seed, sizeof dropout_seed);
  }

  EmbedParams params() const {
    EmbedParams p{};
    p.token = {token.array.data(), token.stride, token.rows, token_ids.data(), c.tokens};
    if (c.position)  // row i % rows, as every sequence of a batch begins at position 0
      p.position = {position.array.data(), position.stride, position.rows, nullptr, position.rows};
    if (c.segment)
      p.segment = {segment.array.data(), segment.stride, 2, segment_ids.data(), c.tokens};
    p.tokens = c.tokens, p.d = c.d;
    p.dtype = c.dtype, p.position_dtype = c.position_dtype;
    p.scale = c.scale;
    if (c.norm) p.norm_weight = weight.data();
    if (c.norm_bias) p.norm_bias = bias.data();
    p.eps = eps;
    if (c.dropout > 0) p.dropout_seed = static_cast<const int64_t*>(seed_.data());
    p.dropout_p = c.dropout;
    p.threads = 1;
    return p;
  }

  double kept(int64_t i, int64_t j) const { return dropout_factor(c.dropout, 0, 0, i, j); }

  struct Sum {                     // of one token
    std::vector<double> x, n;      // before the norm, after it (without weight and bias)
    double mean = 0, rstd = 1;     // no norm: these
    double size = 0, of_norm = 1;  // the largest sum of absolute terms; n's error in roundings
  };
  Sum sum(int64_t i) const {
    Sum s;
    const auto count = static_cast<double>(c.d);
    for (int64_t j = 0; j < c.d; ++j) {
      const double a = c.scale * token.get(token_ids.row_of(i), j);
      const double b = c.position ? position.get(i % position.rows, j) : 0;
      const double e = c.segment ? segment.get(segment_ids.row_of(i), j) : 0;
      s.x.push_back(a + b + e);
      s.size = std::fmax(s.size, std::fabs(a) + std::fabs(b) + std::fabs(e));
    }
    if (c.norm) {
      double square = 0;
      for (const double x : s.x) s.mean += x / count;
      for (const double x : s.x) square += (x - s.mean) * (x - s.mean) / count;
      s.rstd = 1 / std::sqrt(square + eps);
      s.of_norm = (4 + std::sqrt(count)) * (1 + s.size * s.rstd);
    }
    for (const double x : s.x) s.n.push_back((x - s.mean) * s.rstd);
    return s;
  }

  const Case c;
  const Rows token, position, segment;
  const Ids token_ids, segment_ids;
  Array weight, bias;

 private:
  static int64_t positions_of(const Case& c) { return c.tokens > 7 ? 7 : c.tokens; }
  Memory seed_;
};

struct Outputs {
  Outputs(const Inputs& in, int threads)
      : y(in.c.dtype, in.c.tokens * in.c.d),
        statistics(in.c.computed(), in.c.norm ? 2 * in.c.tokens : 0) {
    EmbedParams p = in.params();
    p.y = y.data();
    if (in.c.norm) p.statistics = statistics.data();
    p.threads = threads;
    cpu::kernels().embed(p);
  }
  Array y, statistics;
};

struct Gradients {
  Gradients(const Inputs& in, const Array& statistics, const Rows& dy, int threads)
      : dsum(in.c.computed(), in.c.tokens * in.c.d),
        dnorm(in.c.computed(), in.c.norm ? 2 * in.c.d : 0) {
    EmbedGradientParams p{};
    p.forward = in.params();
    p.forward.threads = threads;
    if (in.c.norm) p.forward.statistics = statistics.data();
    p.dy = dy.array.data(), p.dy_stride = dy.stride;
    p.dsum = dsum.data();
    if (in.c.norm) p.dnorm = dnorm.data();
    cpu::kernels().embed_gradient(p);
  }
  Array dsum, dnorm;
};

class Checked {
 public:
  explicit Checked(const Case& c)
      : c(c),
        in(c),
        dy(c.dtype, c.tokens, c.d, 1),
        weights(static_cast<size_t>(c.norm ? c.d : 0)),
        biases(weights.size()) {
    const Outputs out(in, 1), by_two(in, 2);
    CHECK(same_bytes(out.y, by_two.y) && same_bytes(out.statistics, by_two.statistics),
          "%s: other bits on 2 threads", c.name().c_str());
    const Gradients g(in, out.statistics, dy, 1), g_by_two(in, out.statistics, dy, 2);
    CHECK(same_bytes(g.dsum, g_by_two.dsum) && same_bytes(g.dnorm, g_by_two.dnorm),
          "%s: other bits of gradients on 2 threads", c.name().c_str());
    for (int64_t i = 0; i < c.tokens; ++i) {
      const Inputs::Sum sum = in.sum(i);
      check_values(out, sum, i);
      differentiate(g, sum, i);
    }
    for (size_t j = 0; j < weights.size(); ++j) {
      check(g.dnorm.get(static_cast<int64_t>(j)), weights[j], c.computed(), "dweight");
      check(g.dnorm.get(c.d + static_cast<int64_t>(j)), biases[j], c.computed(), "dbias");
    }
  }

 private:
  struct Expected {
    double exact = 0, size = 0;  // the size counts in roundings of a number of size 1
  };

  double weight(int64_t j) const { return c.norm ? in.weight.get(j) : 1; }

  void check_values(const Outputs& out, const Inputs::Sum& sum, int64_t i) const {
    if (c.norm) {
      const double of_mean = sum.of_norm / sum.rstd;
      check(out.statistics.get(2 * i), {sum.mean, of_mean}, c.computed(), "mean");
      check(out.statistics.get(2 * i + 1), {sum.rstd, sum.of_norm * sum.rstd}, c.computed(),
            "rstd");
    }
    for (int64_t j = 0; j < c.d; ++j) {
      const double n = sum.n[static_cast<size_t>(j)], b = c.norm_bias ? in.bias.get(j) : 0;
      const double kept = in.kept(i, j), exact = kept * (n * weight(j) + b);
      const double terms = c.norm ? sum.of_norm * (1 + std::fabs(n)) : 3 * sum.size;
      const double size = kept * (terms * std::fabs(weight(j)) + 2 * std::fabs(b));
      check(out.y.get(i * c.d + j), {exact, size + std::fabs(exact)}, c.dtype, "y");
    }
  }

  // g = dy · kept; dweight += g · n, dbias += g,
  // dsum = rstd · (g · weight - mean(g · weight) - n · mean(g · weight · n)).
  void differentiate(const Gradients& g, const Inputs::Sum& sum, int64_t i) {
    const auto count = static_cast<double>(c.d);
    double mean = 0, mean_n = 0, size = 0;
    for (int64_t j = 0; j < c.d && c.norm; ++j) {
      const double n = sum.n[static_cast<size_t>(j)], upstream = dy.get(i, j) * in.kept(i, j);
      mean += upstream * weight(j) / count, mean_n += upstream * weight(j) * n / count;
      size += std::fabs(upstream * weight(j)) * (1 + std::fabs(n)) / count;
      Expected &to_weight = weights[static_cast<size_t>(j)],
               &to_bias = biases[static_cast<size_t>(j)];
      to_weight.exact += upstream * n;
      to_weight.size += sum.of_norm * std::fabs(upstream) * (1 + std::fabs(n));
      to_bias.exact += upstream, to_bias.size += 8 * std::fabs(upstream);
    }
    for (int64_t j = 0; j < c.d; ++j) {
      const double n = sum.n[static_cast<size_t>(j)];
      const double arriving = dy.get(i, j) * in.kept(i, j) * weight(j);
      const double exact = sum.rstd * (arriving - mean - (c.norm ? n * mean_n : 0));
      const double terms = std::fabs(arriving) + (1 + std::fabs(n)) * size;
      check(g.dsum.get(i * c.d + j), {exact, 2 * sum.of_norm * sum.rstd * terms}, c.computed(),
            "dsum");
    }
  }

  void check(double actual, const Expected& e, DType own, const char* what) const {
    const double tolerance = accumulator(c.dtype) * e.size +
                             0.51 * epsilon(own) * std::fabs(e.exact) +
                             (is_half(own) ? 0x1p-24 : 0);
    CHECK(close(actual, e.exact, tolerance), "%s: %s: %.9g, needs %.9g +- %.1g", c.name().c_str(),
          what, actual, e.exact, tolerance);
  }

  const Case c;
  const Inputs in;
  const Rows dy;
  std::vector<Expected> weights, biases;
};

void check_sizes(Case c) {
  const int64_t sizes[][2] = {{1, 1},   {5, 2},   {3, 15},  {9, 16},  {2, 17}, {8, 63},
                              {11, 65}, {4, 111}, {3, 197}, {50, 768}};  // the last is shared out
  for (const DType dtype : dtypes) {
    c.dtype = c.position_dtype = dtype;
    for (const auto& size : sizes) {
      c.tokens = size[0], c.d = size[1];
      const Checked checked(c);
      if (!is_half(dtype) || !c.position) continue;
      c.position_dtype = DType::f32;  // sinusoids
      const Checked wide(c);
      c.position_dtype = dtype;
    }
  }
}

TEST(lookup) {
  Case c;
  check_sizes(c);
  c.scale = 3, c.dropout = 0.3;
  check_sizes(c);
}

TEST(sum_of_tables) {
  Case c;
  c.position = c.segment = true;
  check_sizes(c);
  c.segment = false, c.scale = 0.7, c.dropout = 0.1;
  check_sizes(c);
}

TEST(with_norm) {
  Case c;
  c.position = c.norm = true;
  check_sizes(c);
  c.segment = c.norm_bias = true, c.dropout = 0.3;
  check_sizes(c);
}

// A table's gradient. Rows that are never looked up, so many on end that their zeros are streamed;
// one that is, so often that its columns are shared out.
struct TableCase {
  DType dtype, rows_dtype;
  int64_t table_rows, count, d, id_count;
  bool ids, often;
};

void check_table(const TableCase& c) {
  const Rows rows(c.rows_dtype, c.count, c.d, 1);
  const Ids ids(c.ids ? c.id_count : 0, c.table_rows);
  for (int64_t i = 0; i < ids.count && c.often; i += 2) ids.data()[i] = c.table_rows / 2;
  const Array y(c.dtype, c.table_rows * c.d), by_three(c.dtype, y.count);
  for (const Array* out : {&y, &by_three}) {
    RowSumsParams p{};
    if (c.count > 0) p.rows = rows.array.data();  // as csrc/api does
    if (c.ids && c.count > 0) p.ids = ids.data();
    p.row_stride = rows.stride, p.count = c.count, p.d = c.d, p.id_count = c.id_count;
    p.y = out->data();
    p.table_rows = c.table_rows;
    p.rows_dtype = c.rows_dtype, p.dtype = c.dtype;
    p.scale = 0.7;
    p.threads = out == &y ? 1 : 3;
    cpu::kernels().row_sums(p);
  }
  CHECK(same_bytes(y, by_three), "table of %d rows: other bits on 3 threads", int(c.table_rows));
  std::vector<double> exact(static_cast<size_t>(y.count)), size(exact.size());
  for (int64_t i = 0; i < c.count; ++i)
    for (int64_t j = 0; j < c.d; ++j) {
      const int64_t row = c.ids ? ids.row_of(i) : i % c.id_count;
      const auto at = static_cast<size_t>(row * c.d + j);
      exact[at] += 0.7 * rows.get(i, j), size[at] += 0.7 * std::fabs(rows.get(i, j));
    }
  for (int64_t i = 0; i < y.count; ++i) {
    const auto at = static_cast<size_t>(i);
    const double tolerance = 20 * accumulator(c.dtype) * size[at] +
                             0.51 * epsilon(c.dtype) * std::fabs(exact[at]) +
                             (is_half(c.dtype) ? 0x1p-24 : 0);
    CHECK(close(y.get(i), exact[at], tolerance), "%s, table of %d rows, d %d: %.9g, needs %.9g",
          name_of(c.dtype), int(c.table_rows), int(c.d), y.get(i), exact[at]);
  }
}

TEST(gradient_of_a_table) {
  for (const DType dtype : dtypes) {
    for (const DType rows_dtype : {dtype, dtype == DType::f64 ? dtype : DType::f32}) {
      for (const int64_t d : {1, 3, 16, 17, 65, 197}) {
        check_table({dtype, rows_dtype, 5, 23, d, 23, true, false});
        check_table({dtype, rows_dtype, 9, 40, d, 8, true, false});
        check_table({dtype, rows_dtype, 7, 21, d, 7, false, false});
        check_table({dtype, rows_dtype, 3, 0, d, 1, true, false});
      }
      check_table({dtype, rows_dtype, 700, 30, 63, 30, true, false});
      check_table({dtype, rows_dtype, 4, 1500, 150, 1500, true, true});
    }
  }
}

}  // namespace
}  // namespace pyfuse::test
