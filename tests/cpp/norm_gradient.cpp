// The gradients of LayerNorm and RMSNorm against the derivative of their formulas in double.
#include <cmath>

#include "cpu/isa.h"
#include "norm_case.h"

namespace pyfuse::test {
namespace {

// How a call comes: none of it may change a bit.
struct How {
  int threads = 1;
  bool stream = false, row_by_row = false;
};

struct Wanted {
  bool dz = false;  // z was a result too, and a gradient arrives there
  bool keep_z = false;
  bool inputs = true, parameters = true;
};

struct Gradients {
  Gradients(const NormInputs& in, const Wanted& wanted, const Array& z, const Rows& dy,
            const Rows& dz, const How& how)
      : dx(in.c.dtype, wanted.inputs ? in.c.rows * in.c.d : 0),
        dresidual(in.c.z_dtype, in.c.residual ? dx.count : 0),
        dweight(in.c.weight_dtype, wanted.parameters && in.c.affine ? in.c.d : 0),
        dbias(in.c.weight_dtype, in.c.rms() ? 0 : dweight.count) {
    NormGradientParams p{};
    static_cast<NormArguments&>(p) = in.arguments();
    if (wanted.keep_z && in.c.rows > 0) p.z = z.data(), p.z_stride = in.c.d;
    if (in.c.rows > 0) p.dy = dy.array.data();
    if (wanted.dz && in.c.rows > 0) p.dz = dz.array.data();
    p.dy_stride = dy.stride, p.dz_stride = dz.stride;
    p.bias_dtype = in.c.weight_dtype;
    if (dx.count > 0) p.dx = dx.data();
    if (dresidual.count > 0) p.dresidual = dresidual.data();
    if (dweight.count > 0) p.dweight = dweight.data();
    if (dbias.count > 0) p.dbias = dbias.data();
    p.threads = how.threads, p.stream = how.stream, p.row_by_row = how.row_by_row;
    cpu::kernels().norm_gradient(p);
  }
  bool same(const Gradients& other) const {
    return same_bytes(dx, other.dx) && same_bytes(dresidual, other.dresidual) &&
           same_bytes(dweight, other.dweight) && same_bytes(dbias, other.dbias);
  }
  Array dx, dresidual, dweight, dbias;
};

class Checked {
 public:
  Checked(const NormCase& c, const Wanted& wanted)
      : c(c),
        wanted(wanted),
        in(c),
        dy(c.y_dtype(), c.rows, c.d, 1),
        dz(c.z_dtype, c.rows, c.d, 2),
        z(c.z_dtype, c.rows * c.d),
        weights(static_cast<size_t>(c.d)),
        biases(weights.size()) {
    std::vector<NormRow> rows;
    for (int64_t r = 0; r < c.rows; ++r) {
      rows.push_back(in.row(r));
      for (int64_t j = 0; j < c.d; ++j) z.set(r * c.d + j, rows.back().z[static_cast<size_t>(j)]);
    }
    const Gradients g = run({});
    CHECK(g.same(run({3, false, false})), "%s: other bits on 3 threads", c.name().c_str());
    CHECK(g.same(run({1, false, true})), "%s: other bits row by row", c.name().c_str());
    CHECK(!c.streams() || g.same(run({3, true, true})), "%s: other bits past the caches",
          c.name().c_str());
    for (int64_t r = 0; r < c.rows; ++r) check_row(g, rows[static_cast<size_t>(r)], r);
    for (int64_t j = 0; j < g.dweight.count; ++j)
      check_value(g.dweight.get(j), weights[static_cast<size_t>(j)], c.weight_dtype, "dweight");
    for (int64_t j = 0; j < g.dbias.count; ++j)
      check_value(g.dbias.get(j), biases[static_cast<size_t>(j)], c.weight_dtype, "dbias");
  }

 private:
  struct Sum {
    double exact = 0, size = 0;  // the size counts in roundings of a number of size 1
  };

  Gradients run(const How& how) const { return Gradients(in, wanted, z, dy, dz, how); }

  void check_row(const Gradients& g, const NormRow& row, int64_t r) {
    const auto count = static_cast<double>(c.d);
    std::vector<double> n;
    double largest = 0, mean_g = 0, mean_gn = 0, size_g = 0, size_gn = 0;
    for (int64_t j = 0; j < c.d; ++j) {
      const double z_j = row.z[static_cast<size_t>(j)], arriving = dy.get(r, j) * in.weight_at(j);
      largest = std::fmax(largest, std::fabs(z_j));
      n.push_back((z_j - row.mean) * row.rstd);
      mean_g += c.rms() ? 0 : arriving / count;
      mean_gn += arriving * n.back() / count;
      size_g += std::fabs(arriving) / count;
      size_gn += std::fabs(arriving * n.back()) / count;
    }
    // What n may be wrong by, in roundings: as much as z and the mean are against the deviation.
    const double of_n = (4 + std::sqrt(count)) * (1 + largest * row.rstd);
    for (int64_t j = 0; j < c.d; ++j) {
      const double n_j = n[static_cast<size_t>(j)], upstream = dy.get(r, j);
      const double arriving = upstream * in.weight_at(j), also = wanted.dz ? dz.get(r, j) : 0;
      const double exact = row.rstd * (arriving - mean_g - n_j * mean_gn) + also;
      const double terms = std::fabs(arriving) + (1 + std::fabs(n_j)) * (size_g + size_gn);
      const double size = of_n * row.rstd * terms + std::fabs(also), kept = in.kept(r, j);
      if (g.dx.count > 0)
        check_value(g.dx.get(r * c.d + j), {kept * exact, kept * size}, c.dtype, "dx");
      if (g.dresidual.count > 0)
        check_value(g.dresidual.get(r * c.d + j), {exact, size}, c.z_dtype, "dresidual");
      Sum &weight = weights[static_cast<size_t>(j)], &bias = biases[static_cast<size_t>(j)];
      weight.exact += upstream * n_j;
      weight.size += of_n * std::fabs(upstream) * (1 + std::fabs(n_j));
      bias.exact += upstream, bias.size += 8 * std::fabs(upstream);
    }
  }

  void check_value(double actual, const Sum& sum, DType own, const char* what) const {
    const double tolerance = accumulator(c.dtype) * sum.size +
                             0.51 * epsilon(own) * std::fabs(sum.exact) +
                             (is_half(own) ? 0x1p-24 : 0);
    CHECK(close(actual, sum.exact, tolerance), "%s: %s: %.9g, needs %.9g +- %.1g", c.name().c_str(),
          what, actual, sum.exact, tolerance);
  }

  const NormCase c;
  const Wanted wanted;
  const NormInputs in;
  const Rows dy, dz;
  Array z;
  std::vector<Sum> weights, biases;
};

void check(const NormCase& c, const Wanted& wanted) {
  for_norm_dtypes(c, [&](const NormCase& typed) {
    // One row; some, that go in twos; leaves of one block; blocks; none.
    const int64_t sizes[][2] = {{1, 1},  {1, 3},  {2, 15},  {3, 16},   {5, 17},   {4, 63},
                                {5, 64}, {3, 65}, {2, 111}, {195, 33}, {50, 768}, {0, 19}};
    NormCase sized = typed;
    for (const auto& size : sizes) {
      sized.rows = size[0], sized.d = size[1];
      const Checked checked(sized, wanted);
    }
  });
}

TEST(layer_norm) {
  NormCase c;
  check(c, {});
  check(c, {false, false, true, false});
  c.residual = true;
  check(c, {true, true, true, true});
  c.dropout = 0.5;
  check(c, {false, false, true, true});
}

TEST(rms_norm) {
  NormCase c;
  c.kind = NormKind::llama;
  check(c, {});
  check(c, {false, false, false, true});
  c.kind = NormKind::gemma, c.residual = true;
  check(c, {true, false, true, true});
  c.kind = NormKind::torch, c.dropout = 0.5;
  check(c, {true, true, true, true});
  c.residual = c.affine = false;
  check(c, {});
}

}  // namespace
}  // namespace pyfuse::test
