// Activation and dropout, and their gradient, against their formulas in double.
#include <cmath>

#include "array.h"
#include "cpu/isa.h"
#include "random_factor.h"

namespace pyfuse::test {
namespace {

constexpr Activation activations[] = {Activation::none, Activation::relu, Activation::gelu,
                                      Activation::gelu_tanh, Activation::silu};
constexpr double root_of_2 = 1.41421356237309504880, two_u = 1.59576912160573071176;

struct Case {
  DType dtype;
  Activation activation;
  double p;
  int64_t rows, d;
};

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::relu:
      return x > 0 ? x : 0;
    case Activation::gelu:
      return 0.5 * x * std::erfc(-x / root_of_2);
    case Activation::gelu_tanh:
      return x * logistic(two_u * (x + 0.044715 * x * x * x));
    case Activation::silu:
      return x * logistic(x);
    default:
      return x;
  }
}

double slope(Activation activation, double x) {
  const double s = logistic(x), t = logistic(two_u * (x + 0.044715 * x * x * x));
  switch (activation) {
    case Activation::relu:
      return x > 0 ? 1 : 0;
    case Activation::gelu:
      return 0.5 * std::erfc(-x / root_of_2) + x * 0.39894228040143267794 * std::exp(-x * x / 2);
    case Activation::gelu_tanh:
      return t + x * t * (1 - t) * two_u * (1 + 0.134145 * x * x);
    case Activation::silu:
      return s + x * s * (1 - s);
    default:
      return 1;
  }
}

class Checked {
 public:
  explicit Checked(const Case& c)
      : c(c),
        x(c.dtype, c.rows, c.d, 3, 0, 3),
        flow(c.dtype, c.rows, c.d, 7),
        y(c.dtype, c.rows * c.d) {
    run(false, 1, false, y);
    for (const bool backward : {false, true}) {
      Array out(c.dtype, y.count), again(c.dtype, y.count), streamed(c.dtype, y.count);
      run(backward, 1, false, out), run(backward, 2, false, again);
      CHECK(same_bytes(out, again), "other bits on 2 threads");
      if (c.d * size_of(c.dtype) % 64 == 0) {
        run(backward, 2, true, streamed);
        CHECK(same_bytes(out, streamed), "other bits past the caches");
      }
      for (int64_t i = 0; i < c.rows * c.d; ++i) check(out.get(i), backward, i / c.d, i % c.d);
    }
  }

 private:
  // backward: for relu its y in the place of x, and without an activation nothing.
  void run(bool backward, int threads, bool stream, Array& out) const {
    const bool by_result = backward && c.activation == Activation::relu;
    const bool unread = backward && c.activation == Activation::none;
    DropoutParams p{};
    p.x = unread ? nullptr : by_result ? y.data() : x.array.data();
    p.x_stride = by_result ? c.d : x.stride;
    if (backward) p.flow = flow.array.data(), p.flow_stride = flow.stride;
    p.y = out.data();
    p.rows = c.rows, p.d = c.d;
    p.dtype = c.dtype, p.activation = c.activation;
    if (c.p > 0) p.seed = dropout_seed, p.p = c.p;
    p.stream = stream, p.threads = threads;
    cpu::kernels().dropout(p);
  }

  void check(double actual, bool backward, int64_t r, int64_t j) const {
    const double factor = dropout_factor(c.p, 0, 0, r, j);
    const double wide = backward ? flow.get(r, j) * slope(c.activation, x.get(r, j))
                                 : activated(c.activation, x.get(r, j));
    const double exact = factor > 0 ? factor * wide : 0;
    const bool curved = c.activation != Activation::none && c.activation != Activation::relu;
    const double tolerance = 0.51 * epsilon(c.dtype) * std::fabs(exact) +
                             accumulator(c.dtype) * (1 + (curved ? 16 : 0)) * (factor + 1) +
                             (is_half(c.dtype) ? 0x1p-24 : 0);
    CHECK(close(actual, exact, tolerance),
          "%s, act %d, p %g, %d x %d, %s: %.9g, needs %.9g +- %.1g", name_of(c.dtype),
          int(c.activation), c.p, int(c.rows), int(c.d), backward ? "gradient" : "forward", actual,
          exact, tolerance);
  }

  const Case c;
  const Rows x, flow;
  Array y;
};

TEST(every_activation_and_dtype) {
  const int64_t sizes[][2] = {{1, 1}, {3, 3}, {5, 17}, {2, 64}, {3, 111}, {40, 1023}, {3, 2112}};
  for (const Activation activation : activations)
    for (const DType dtype : dtypes)
      for (const auto& size : sizes)
        for (const double p : {0.0, 0.1, 0.5})
          const Checked checked({dtype, activation, p, size[0], size[1]});
}

TEST(what_is_dropped_is_zero_even_if_it_is_nan) {
  const int64_t d = 97;
  for (const Activation activation : activations) {
    Array x(DType::f32, d), out(DType::f32, d);  // both NaN
    DropoutParams p{};
    p.x = p.flow = x.data(), p.y = out.data();
    p.rows = 1, p.d = d, p.dtype = DType::f32, p.activation = activation;
    p.seed = dropout_seed, p.p = 0.5, p.threads = 1;
    for (const bool backward : {false, true}) {
      if (backward && activation == Activation::relu) continue;  // takes y, which is 0 there
      p.flow = backward ? x.data() : nullptr;
      cpu::kernels().dropout(p);
      for (int64_t j = 0; j < d; ++j)
        CHECK(std::isnan(out.get(j)) == (dropout_factor(0.5, 0, 0, 0, j) > 0) &&
                  (std::isnan(out.get(j)) || out.get(j) == 0),
              "element %d of act %d: %g", int(j), int(activation), out.get(j));
    }
  }
}

}  // namespace
}  // namespace pyfuse::test
