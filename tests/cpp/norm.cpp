// LayerNorm and RMSNorm against their formulas in double.
#include <cmath>

#include "cpu/isa.h"
#include "norm_case.h"

namespace pyfuse::test {
namespace {

struct Outputs {
  Outputs(const NormCase& c, const NormInputs& in, int threads, bool stream)
      : y(c.y_dtype(), c.rows * c.d), z(c.z_dtype, c.keep_z ? c.rows * c.d : 0) {
    NormParams p{};
    static_cast<NormArguments&>(p) = in.arguments();
    if (in.bias.count > 0) p.bias = in.bias.data();
    p.bias_dtype = c.weight_dtype;
    p.y = y.data();
    if (c.keep_z) p.z = z.data();
    p.threads = threads, p.stream = stream;
    cpu::kernels().norm(p);
  }
  bool same(const Outputs& other) const { return same_bytes(y, other.y) && same_bytes(z, other.z); }
  Array y, z;
};

class Checked {
 public:
  explicit Checked(const NormCase& c) : c(c), in(c) {
    const Outputs out(c, in, 1, false);
    CHECK(out.same(Outputs(c, in, 2, false)), "other bits on 2 threads");
    CHECK(!c.streams() || out.same(Outputs(c, in, 2, true)), "other bits past the caches");
    for (int64_t r = 0; r < c.rows; ++r) check_row(out, r);
  }

 private:
  void check_row(const Outputs& out, int64_t r) const {
    const NormRow row = in.row(r);
    for (int64_t j = 0; j < c.d; ++j) {
      const double z = row.z[static_cast<size_t>(j)];
      if (c.keep_z) CHECK(out.z.get(r * c.d + j) == z, "z of row %d, %d", int(r), int(j));
      check_value(out.y.get(r * c.d + j), row, z, j);
    }
  }

  // What may be lost: in the mean and where it is subtracted, in rstd, and to the roundings to the
  // dtype, of which Llama's casting has one more.
  void check_value(double y, const NormRow& row, double z, int64_t j) const {
    const double w = in.weight_at(j), b = in.bias.count > 0 ? in.bias.get(j) : 0;
    const double n = (z - row.mean) * row.rstd, exact = n * w + b;
    const double wide = accumulator(c.dtype), own = epsilon(c.dtype);
    const double terms = 4 + std::sqrt(static_cast<double>(c.d));
    const double once_more = c.kind == NormKind::llama ? std::fabs(n * w) : 0;
    const double tolerance =
        terms * wide * (std::fabs(n) + (std::fabs(row.mean) + 1) * row.rstd) * std::fabs(w) +
        wide * std::fabs(b) + own * (0.51 * std::fabs(exact) + once_more) +
        (is_half(c.dtype) ? 0x1p-24 : 0);
    CHECK(close(y, exact, tolerance), "%s: %.9g, needs %.9g +- %.1g", c.name().c_str(), y, exact,
          tolerance);
  }

  const NormCase c;
  const NormInputs in;
};

void check(NormCase c) {
  for_norm_dtypes(c, [](const NormCase& typed) {
    NormCase sized = typed;
    for (const int64_t d : {1, 2, 3, 15, 16, 17, 63, 64, 65, 111, 197, 768}) {
      sized.d = d, sized.rows = d == 768 ? 50 : 5;  // 50 rows are shared out
      const Checked checked(sized);
    }
  });
}

TEST(layer_norm) {
  NormCase c;
  check(c);
  c.residual = c.keep_z = true;
  check(c);
  c.dropout = 0.5, c.affine = false;
  check(c);
}

TEST(rms_norm) {
  NormCase c;
  c.kind = NormKind::llama;
  check(c);
  c.kind = NormKind::gemma, c.residual = c.keep_z = true;
  check(c);
  c.kind = NormKind::torch, c.affine = false;
  check(c);
  c.residual = false, c.dropout = 0.5;
  check(c);
}

}  // namespace
}  // namespace pyfuse::test
