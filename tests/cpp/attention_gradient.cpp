// Attention backward against the derivative of the formula in double.
#include <cmath>

#include "attention_case.h"
#include "cpu/isa.h"

namespace pyfuse::test {
namespace {

// A gradient as it should be, and the sum of its absolute terms, which errors are in proportion to.
struct Sums {
  explicit Sums(int64_t count) : exact(static_cast<size_t>(count)), size(exact.size()) {}
  void add(int64_t i, double term, double term_size) {
    exact[static_cast<size_t>(i)] += term;
    size[static_cast<size_t>(i)] += std::fabs(term_size);
  }
  std::vector<double> exact, size;
};

// What one call of the kernels gives.
struct Gradients {
  Gradients(const AttentionInputs& in, const Tensor& d_o, const Array& d_lse, int threads)
      : dq(in.like_queries(in.q.array.dtype, in.c.d)),
        dk(in.like_keys(in.q.array.dtype, in.c.d)),
        dv(in.like_keys(in.q.array.dtype, in.c.dv)),
        d_mask(in.c.mask_dtype, in.c.mask == MaskKind::additive ? mask_count(in) : 0),
        d_sinks(DType::f64, in.c.sinks ? in.c.heads_q : 0),
        d_slopes(DType::f64, in.c.alibi ? in.c.heads_q : 0) {
    Tensor o = in.like_queries(in.q.array.dtype, in.c.dv);
    const Array lse(DType::f64, in.lse_count());
    AttentionGradientParams g{};
    g.call = in.params();
    g.call.threads = threads;
    g.call.o = o.array.data(), o.copy_strides(g.call.o_stride);
    g.call.lse = lse.data(), g.call.lse_dtype = DType::f64, in.set_lse_stride(g.call.lse_stride);
    g.d_o = d_o.array.data(), d_o.copy_strides(g.do_stride);
    g.d_lse = d_lse.data(), in.set_lse_stride(g.dlse_stride);
    g.dq = dq.array.data(), dq.copy_strides(g.dq_stride);
    g.dk = dk.array.data(), dk.copy_strides(g.dk_stride);
    g.dv = dv.array.data(), dv.copy_strides(g.dv_stride);
    if (in.c.packed())
      for (int64_t* stride : {g.call.o_stride, g.do_stride, g.dq_stride, g.dk_stride, g.dv_stride})
        stride[0] = 0;
    if (d_mask.count > 0) g.d_mask = d_mask.data();
    for (int i = 0; i < 4; ++i) g.mask_size[i] = in.mask_layout.size[i];
    if (in.c.sinks) g.d_sinks = static_cast<double*>(d_sinks.data());
    if (in.c.alibi) g.d_alibi_slopes = static_cast<double*>(d_slopes.data());
    cpu::kernels().attention(g.call);
    cpu::kernels().attention_gradient(g);
    cpu::kernels().attention_score_gradient(g);
    dq.check_gaps(), dk.check_gaps(), dv.check_gaps();
  }
  static int64_t mask_count(const AttentionInputs& in) {
    const int64_t* size = in.mask_layout.size;
    return size[0] * size[1] * size[2] * size[3];
  }
  bool same(const Gradients& other) const {
    return same_bytes(dq.array, other.dq.array) && same_bytes(dk.array, other.dk.array) &&
           same_bytes(dv.array, other.dv.array) && same_bytes(d_mask, other.d_mask) &&
           same_bytes(d_sinks, other.d_sinks) && same_bytes(d_slopes, other.d_slopes);
  }
  Tensor dq, dk, dv;
  Array d_mask, d_sinks, d_slopes;
};

class Checked {
 public:
  Checked(const AttentionCase& given, DType dtype)
      : in(given, dtype),
        c(in.c),
        d_o(in.like_queries(dtype, c.dv)),
        d_lse(dtype == DType::f64 ? DType::f64 : DType::f32, in.lse_count()),
        dq(elements(in.q)),
        dk(elements(in.k)),
        dv(elements(in.v)),
        d_mask(Gradients::mask_count(in)),
        d_sinks(c.heads_q),
        d_slopes(c.heads_q) {
    d_o.fill_random(), d_lse.fill_random();
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t h = 0; h < c.heads_q; ++h)
        for (int64_t m = 0; m < in.queries(b); ++m) differentiate(b, h, m);
    const Gradients one(in, d_o, d_lse, 1), three(in, d_o, d_lse, 3);
    CHECK(one.same(three), "%s %s: other bits on 3 threads", c.name.c_str(), name_of(dtype));
    check(one);
  }

 private:
  static int64_t elements(const Tensor& t) { return t.batch * t.heads * t.rows * t.d; }
  int64_t row(const Tensor& t, int64_t b, int64_t h, int64_t i) const {
    const std::vector<int64_t>& first = &t == &in.q ? in.first_query : in.first_key;
    return c.packed() ? h * t.rows + first[static_cast<size_t>(b)] + i
                      : (b * t.heads + h) * t.rows + i;
  }

  // With p of query m: dp = kept·(do·v), delta = Σ p·dp - dlse, ds = p·(dp - delta).
  void differentiate(int64_t b, int64_t h, int64_t m) {
    const AttentionInputs::Softmax s = in.softmax(b, h, m);
    const int64_t hk = in.key_head(h), count = in.keys(b);
    const double wide = accumulator(in.q.array.dtype);
    // Relative to itself, what p may be wrong by, in units of a rounding.
    const double of_p = 2 * (4 + std::sqrt(static_cast<double>(c.d))) * (1 + s.score_size);
    std::vector<double> dp(s.probability.size()), dp_size(dp.size());
    double delta = s.lse > -INFINITY ? -d_lse.get(in.lse_at(b, h, m)) : 0;
    double delta_size = std::fabs(delta);
    for (int64_t n = 0; n < count; ++n) {
      const auto i = static_cast<size_t>(n);
      if (s.probability[i] == 0) continue;
      const double kept = in.kept(b, h, m, n);
      for (int64_t j = 0; j < c.dv; ++j) {
        const double upstream = in.of_query(d_o, b, h, m, j);
        const double term = kept * upstream * in.of_key(in.v, b, hk, n, j);
        dp[i] += term, dp_size[i] += std::fabs(term);
        const double weight = s.probability[i] * kept * upstream;
        dv.add(row(in.k, b, hk, n) * c.dv + j, weight, weight * of_p);
      }
      delta += s.probability[i] * dp[i], delta_size += s.probability[i] * dp_size[i];
    }
    const double p_sink = s.lse > -INFINITY ? std::exp(in.sink(h) - s.lse) : 0;
    d_sinks.add(h, -p_sink * delta, p_sink * delta_size * of_p);
    for (int64_t n = 0; n < count; ++n) {
      const auto i = static_cast<size_t>(n);
      const double ds = s.probability[i] * (dp[i] - delta);
      const double size = s.probability[i] * (dp_size[i] + delta_size) * of_p;
      if (c.mask == MaskKind::additive) d_mask.add(mask_at(b, h, m, n), ds, size);
      const double distance = std::fabs(in.distance(b, m, n));
      d_slopes.add(h, -distance * ds, distance * size);
      if (s.probability[i] == 0) continue;
      // 1 - t² of softcap is as wrong as t is, whatever its own size.
      const double raw = ds * s.cap_slope[i] * c.scale;
      const double raw_size = size * (s.cap_slope[i] + (c.softcap > 0 ? 4 * wide : 0)) * c.scale;
      for (int64_t j = 0; j < c.d; ++j) {
        const double key = in.of_key(in.k, b, hk, n, j), query = in.of_query(in.q, b, h, m, j);
        dq.add(row(in.q, b, h, m) * c.d + j, raw * key, raw_size * key);
        dk.add(row(in.k, b, hk, n) * c.d + j, raw * query, raw_size * query);
      }
    }
  }

  int64_t mask_at(int64_t b, int64_t h, int64_t m, int64_t n) const {
    const int64_t* size = in.mask_layout.size;
    const int64_t index[] = {b, h, m, n};
    int64_t at = 0;
    for (int i = 0; i < 4; ++i) at = at * size[i] + (size[i] == 1 ? 0 : index[i]);
    return at;
  }

  // Half types round o (which delta is made of), and where they multiply in pairs also p and ds.
  void check_value(double actual, const Sums& sums, int64_t i, DType own, const char* what) const {
    const DType dtype = in.q.array.dtype;
    const double exact = sums.exact[static_cast<size_t>(i)];
    const double unit = accumulator(dtype) + (is_half(dtype) ? 0.2 * epsilon(dtype) : 0);
    const double tolerance = unit * sums.size[static_cast<size_t>(i)] +
                             0.51 * epsilon(own) * std::fabs(exact) + (is_half(own) ? 0x1p-24 : 0);
    CHECK(close(actual, exact, tolerance), "%s %s: %s, %d: %.9g, needs %.9g +- %.1g",
          c.name.c_str(), name_of(dtype), what, int(i), actual, exact, tolerance);
  }

  void check(const Gradients& g) const {
    const DType dtype = in.q.array.dtype;
    for (int64_t b = 0; b < c.batch; ++b) {
      for (int64_t h = 0; h < c.heads_q; ++h)
        for (int64_t i = 0; i < in.queries(b) * c.d; ++i)
          check_value(in.of_query(g.dq, b, h, i / c.d, i % c.d), dq,
                      row(in.q, b, h, i / c.d) * c.d + i % c.d, dtype, "dq");
      for (int64_t h = 0; h < c.heads_k; ++h) {
        for (int64_t i = 0; i < in.keys(b) * c.d; ++i)
          check_value(in.of_key(g.dk, b, h, i / c.d, i % c.d), dk,
                      row(in.k, b, h, i / c.d) * c.d + i % c.d, dtype, "dk");
        for (int64_t i = 0; i < in.keys(b) * c.dv; ++i)
          check_value(in.of_key(g.dv, b, h, i / c.dv, i % c.dv), dv,
                      row(in.k, b, h, i / c.dv) * c.dv + i % c.dv, dtype, "dv");
      }
    }
    for (int64_t i = 0; i < g.d_mask.count; ++i)
      check_value(g.d_mask.get(i), d_mask, i, c.mask_dtype, "dmask");
    for (int64_t h = 0; h < g.d_sinks.count; ++h)
      check_value(g.d_sinks.get(h), d_sinks, h, DType::f64, "dsink");
    for (int64_t h = 0; h < g.d_slopes.count; ++h)
      check_value(g.d_slopes.get(h), d_slopes, h, DType::f64, "dslope");
  }

  const AttentionInputs in;
  const AttentionCase& c;
  Tensor d_o;
  Array d_lse;
  Sums dq, dk, dv, d_mask, d_sinks, d_slopes;
};

TEST(backward) {
  for (const AttentionCase& c : attention_cases())
    for (const DType dtype : dtypes) const Checked checked(c, dtype);
}

}  // namespace
}  // namespace pyfuse::test
