// Linear layers: the kernel for few rows, several layers in one call, packed weights; against the
// sum in double.
#include <cmath>

#include "array.h"
#include "cpu/isa.h"

namespace pyfuse::test {
namespace {

struct Case {
  DType dtype;
  int64_t rows, n, k;
  Activation activation = Activation::none;
  bool bias = false, multiply = false, residual = false;
};

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::none:
      return x;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu:
      return x / (1 + std::exp(-x));
    case Activation::relu:
      return x > 0 ? x : 0;
  }
  return NAN;
}

class Layer {
 public:
  Layer(const Case& c, const Rows& x)
      : c(c),
        x(x),
        w(c.dtype, c.n, c.k, 3),
        multiply(c.dtype, c.rows, c.n, 2),
        residual(c.dtype, c.rows, c.n, 1),
        bias(c.dtype, c.n) {
    bias.fill_random();
  }

  // Into y of stride n + 3, NaN before.
  LinearParams params(const Array& y, int threads) const {
    LinearParams p{};
    p.x = c.k > 0 ? x.array.data() : nullptr;  // as csrc/api does
    p.w = c.k > 0 ? w.array.data() : nullptr;
    p.y = y.data();
    if (c.bias) p.bias = bias.data();
    if (c.multiply) p.multiply = multiply.array.data(), p.multiply_stride = multiply.stride;
    if (c.residual) p.residual = residual.array.data(), p.residual_stride = residual.stride;
    p.rows = c.rows, p.n = c.n, p.k = c.k;
    p.x_stride = x.stride, p.w_stride = w.stride, p.y_stride = c.n + 3;
    p.dtype = c.dtype;
    p.activation = c.activation;
    p.threads = threads;
    return p;
  }
  int64_t y_count() const { return c.rows * (c.n + 3) - 3; }

  void check(const Array& y, const char* what) const {
    for (int64_t r = 0; r < c.rows; ++r) {
      for (int64_t j = 0; j < c.n; ++j) check_value(y.get(r * (c.n + 3) + j), r, j, what);
      for (int64_t j = c.n; j < c.n + 3 && r + 1 < c.rows; ++j)
        CHECK(std::isnan(y.get(r * (c.n + 3) + j)), "%s wrote after row %d", what, int(r));
    }
  }

 private:
  // The slope of every activation is at most 1.13; gelu has an absolute error besides.
  void check_value(double y, int64_t r, int64_t j, const char* what) const {
    double sum = c.bias ? bias.get(j) : 0, size = std::fabs(sum);
    for (int64_t k = 0; k < c.k; ++k) {
      const double term = x.get(r, k) * w.get(j, k);
      sum += term, size += std::fabs(term);
    }
    const double wide = accumulator(c.dtype), m = c.multiply ? multiply.get(r, j) : 1;
    const double exact = activate(c.activation, sum) * m + (c.residual ? residual.get(r, j) : 0);
    const double of_sum = (4 + std::sqrt(static_cast<double>(c.k))) * wide * size +
                          (c.activation == Activation::gelu && wide > 1e-10 ? 1.4e-6 : 0) +
                          (c.activation == Activation::none ? 0 : 4 * wide * std::fabs(sum));
    const double tolerance = 1.13 * of_sum * std::fabs(m) + 2 * wide * std::fabs(exact) +
                             0.51 * epsilon(c.dtype) * std::fabs(exact) +
                             (is_half(c.dtype) ? 0x1p-25 : 0);
    CHECK(close(y, exact, tolerance),
          "%s %s %dx%dx%d act %d: y of %d, %d: %.9g, needs %.9g +- %.1g", what, name_of(c.dtype),
          int(c.rows), int(c.n), int(c.k), int(c.activation), int(r), int(j), y, exact, tolerance);
  }

  const Case c;
  const Rows& x;
  Rows w, multiply, residual;
  Array bias;
};

void check_few_rows(const Case& c) {
  const Rows x(c.dtype, c.rows, c.k, 2);
  const Layer layer(c, x);
  const Array y(c.dtype, layer.y_count()), by_two(c.dtype, layer.y_count());
  const LinearParams one = layer.params(y, 1), two = layer.params(by_two, 2);
  cpu::kernels().linear(&one, 1);
  cpu::kernels().linear(&two, 1);
  CHECK(same_bytes(y, by_two), "few rows: other bits on 2 threads");
  layer.check(y, "few rows");
}

void check_packed(const Case& c) {
  constexpr int64_t panel = cpu::packed_linear_panel;
  const Rows x(c.dtype, c.rows, c.k, 2);
  const Layer layer(c, x);
  const int64_t length = c.dtype == DType::bf16 ? (c.k + 1) / 2 * 2 : c.k;
  const Array packed(c.dtype, (c.n + panel - 1) / panel * panel * length);
  const Array y(c.dtype, layer.y_count()), by_two(c.dtype, layer.y_count());
  LinearParams pack = layer.params(packed, 2);
  if (c.k > 0) cpu::kernels().pack_linear(pack);
  for (const Array* out : {&y, &by_two}) {
    LinearParams p = layer.params(*out, out == &y ? 1 : 2);
    p.w = packed.data();
    cpu::kernels().linear_packed(p);
  }
  CHECK(same_bytes(y, by_two), "packed: other bits on 2 threads");
  layer.check(y, "packed");
}

// Every size with every dtype; the activations and what follows them in turn.
template <class Check>
void check_all(const Check& check) {
  const int64_t sizes[][3] = {{1, 1, 1},   {1, 65, 33},  {3, 16, 64},   {2, 130, 31}, {7, 63, 65},
                              {13, 64, 8}, {4, 70, 300}, {50, 129, 17}, {5, 3, 0},    {1, 700, 96}};
  int turn = 0;
  for (const auto& size : sizes) {
    for (const DType dtype : dtypes) {
      for (int i = 0; i < 5; ++i, ++turn)
        check({dtype, size[0], size[1], size[2], static_cast<Activation>(i), turn % 2 == 0,
               turn % 3 == 0, turn % 4 == 0});
    }
  }
}

TEST(few_rows) { check_all(check_few_rows); }
TEST(packed) { check_all(check_packed); }

TEST(layers_side_by_side) {
  for (const DType dtype : dtypes) {
    const Rows x(dtype, 2, 70, 2);
    const Layer q({dtype, 2, 700, 70, Activation::none, true}, x), k({dtype, 2, 9, 70}, x),
        v({dtype, 2, 64, 70, Activation::silu}, x);
    const Array a(dtype, q.y_count()), b(dtype, k.y_count()), c(dtype, v.y_count());
    const LinearParams layers[] = {q.params(a, 2), k.params(b, 2), v.params(c, 2)};
    cpu::kernels().linear(layers, 3);
    q.check(a, "first"), k.check(b, "second"), v.check(c, "third");
  }
}

}  // namespace
}  // namespace pyfuse::test
