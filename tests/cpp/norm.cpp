// LayerNorm and RMSNorm against their formulas in double.
#include <cmath>

#include "array.h"
#include "cpu/isa.h"

namespace pyfuse::test {
namespace {

struct Case {
  DType dtype, weight_dtype;
  int64_t rows, d;
  bool rms, affine, residual, keep_z, round_first;
  double weight_plus;

  NormKind kind() const {
    if (!rms) return NormKind::layer;
    return round_first ? NormKind::llama : weight_plus != 0 ? NormKind::gemma : NormKind::torch;
  }
  // Llama's casting promotes: a float weight times the rounded row.
  DType y_dtype() const { return kind() == NormKind::llama && affine ? weight_dtype : dtype; }
};

struct Rows {  // [rows, d], with elements of NaN between the rows
  Rows(DType dtype, int64_t rows, int64_t d) : stride(d + 3), array(dtype, rows * stride - 3) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < d; ++j) array.set(r * stride + j, 1 + 2 * random_unit());
  }
  const int64_t stride;
  Array array;
};

struct Outputs {
  Outputs(const Case& c, NormParams p, int threads)
      : y(c.y_dtype(), c.rows * c.d), z(c.dtype, c.keep_z ? c.rows * c.d : 0) {
    p.y = y.data();
    if (c.keep_z) p.z = z.data();
    p.threads = threads;
    cpu::kernels().norm(p);
  }
  Array y, z;
};

class Checked {
 public:
  explicit Checked(const Case& c)
      : c(c),
        x(c.dtype, c.rows, c.d),
        residual(c.dtype, c.rows, c.d),
        weight(c.weight_dtype, c.affine ? c.d : 0),
        bias(c.weight_dtype, c.affine && !c.rms ? c.d : 0) {
    weight.fill_random(), bias.fill_random();
    const Outputs out(c, params(), 1), by_two(c, params(), 2);
    CHECK(same_bytes(out.y, by_two.y) && same_bytes(out.z, by_two.z), "other bits on 2 threads");
    for (int64_t r = 0; r < c.rows; ++r) check_row(out, r);
  }

 private:
  NormParams params() const {
    NormParams p{};
    p.x = x.array.data(), p.x_stride = x.stride;
    if (c.residual) p.residual = residual.array.data(), p.residual_stride = residual.stride;
    if (c.affine) p.weight = weight.data();
    if (c.affine && !c.rms) p.bias = bias.data();
    p.rows = c.rows, p.d = c.d;
    p.dtype = p.z_dtype = c.dtype, p.y_dtype = c.y_dtype();
    p.weight_dtype = p.bias_dtype = c.weight_dtype;
    p.eps = 1e-5;
    p.kind = c.kind();
    return p;
  }

  void check_row(const Outputs& out, int64_t r) const {
    std::vector<double> z;
    double mean = 0, square = 0;
    for (int64_t j = 0; j < c.d; ++j) {
      const double x_j = x.array.get(r * x.stride + j);
      z.push_back(c.residual ? rounded(x_j + residual.array.get(r * residual.stride + j), c.dtype)
                             : x_j);
      if (c.keep_z) CHECK(out.z.get(r * c.d + j) == z.back(), "z of row %d, %d", int(r), int(j));
      if (!c.rms) mean += z.back() / static_cast<double>(c.d);
    }
    for (const double z_j : z) square += (z_j - mean) * (z_j - mean) / static_cast<double>(c.d);
    const double rstd = 1 / std::sqrt(square + 1e-5);
    for (int64_t j = 0; j < c.d; ++j)
      check_value(out.y.get(r * c.d + j), z[static_cast<size_t>(j)], mean, rstd, j);
  }

  // What may be lost: in the mean and where it is subtracted, in rstd, and to the roundings to the
  // dtype, of which round_first has one more.
  void check_value(double y, double z, double mean, double rstd, int64_t j) const {
    const double w = (c.affine ? weight.get(j) : 1) + c.weight_plus,
                 b = bias.count ? bias.get(j) : 0;
    const double n = (z - mean) * rstd, exact = n * w + b;
    const double wide = accumulator(c.dtype), own = epsilon(c.dtype);
    const double terms = 4 + std::sqrt(static_cast<double>(c.d));
    const double tolerance =
        terms * wide * (std::fabs(n) + (std::fabs(mean) + 1) * rstd) * std::fabs(w) +
        wide * std::fabs(b) + own * (0.51 * std::fabs(exact) + c.round_first * std::fabs(n * w)) +
        (is_half(c.dtype) ? 0x1p-24 : 0);
    CHECK(close(y, exact, tolerance), "%s, weights %s, %s, d %d: %.9g, needs %.9g +- %.1g",
          name_of(c.dtype), name_of(c.weight_dtype), c.rms ? "rms" : "layer", int(c.d), y, exact,
          tolerance);
  }

  const Case c;
  const Rows x, residual;
  Array weight, bias;
};

void check_sizes(Case c) {
  for (const int64_t d : {1, 2, 3, 15, 16, 17, 63, 64, 65, 111, 197, 768}) {
    c.d = d, c.rows = d == 768 ? 50 : 5;  // 50 rows are shared out
    const Checked checked(c);
  }
}

void check_dtypes(Case c) {
  for (const DType dtype : dtypes) {
    c.dtype = c.weight_dtype = dtype;
    check_sizes(c);
    if (!is_half(dtype)) continue;
    c.weight_dtype = DType::f32;
    check_sizes(c);
  }
}

TEST(layer_norm) {
  check_dtypes({DType::f32, DType::f32, 0, 0, false, true, false, false, false, 0});
  check_dtypes({DType::f32, DType::f32, 0, 0, false, false, true, false, false, 0});
  check_dtypes({DType::f32, DType::f32, 0, 0, false, true, true, true, false, 0});
}

TEST(rms_norm) {
  check_dtypes({DType::f32, DType::f32, 0, 0, true, true, false, false, true, 0});  // Llama
  check_dtypes({DType::f32, DType::f32, 0, 0, true, true, true, true, false, 1});   // Gemma
  check_dtypes({DType::f32, DType::f32, 0, 0, true, false, true, false, false, 0});
}

}  // namespace
}  // namespace pyfuse::test
