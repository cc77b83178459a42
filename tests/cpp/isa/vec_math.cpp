// vec_math.h: the errors that its comments promise, in units of the last place of the exact result.
#include "cpu/vec_math.h"

#include <stdlib.h>

#include "../check.h"
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr double smallest_normal = 0x1p-126, overflow = 0x1p128;

// Floats in the order of their values, as integers.
int64_t rank(float x) {
  const uint32_t bits = float_to_bits(x);
  const int64_t magnitude = bits & 0x7fffffff;
  return bits >> 31 ? -magnitude : magnitude;
}
float float_of(int64_t rank) {
  return rank < 0 ? -bits_to_float(static_cast<uint32_t>(-rank))
                  : bits_to_float(static_cast<uint32_t>(rank));
}

struct Worst {
  double error;
  float at;
};

void take_worse(Worst& worst, double error, float at) {
  if (!(error <= worst.error)) worst = {error, at};  // NaN is worse than everything
}

// The worst error(y, x) of y = f(x) over the vectors of x(i), i < count.
template <class F, class X, class Error>
Worst sweep(int64_t count, const F& f, const X& x, const Error& error) {
  constexpr int64_t W = Vec<float>::width, piece = 1 << 14;
  const int64_t pieces = (count + piece - 1) / piece;
  Worst* const found = static_cast<Worst*>(calloc(static_cast<size_t>(pieces), sizeof(Worst)));
  parallel_for(pieces, 2, [&](int64_t task, int) {
    Worst worst = {0, 0};
    for (int64_t i = task * piece; i < (task + 1) * piece && i < count; i += W) {
      float from[W], to[W];
      for (int64_t j = 0; j < W; ++j) from[j] = x(i + j < count ? i + j : count - 1);
      store(to, f(load(from)));
      for (int64_t j = 0; j < W; ++j) take_worse(worst, error(to[j], from[j]), from[j]);
    }
    found[task] = worst;
  });
  Worst worst = {0, 0};
  for (int64_t i = 0; i < pieces; ++i) take_worse(worst, found[i].error, found[i].at);
  free(found);
  return worst;
}

// Over [low, high]: every 8191st float, or each of them (--slow), and a million points at equal
// distances, since most floats are tiny.
template <class F, class Error>
Worst sweep_range(float low, float high, const F& f, const Error& error) {
  const int64_t first = rank(low), floats = rank(high) - first + 1, step = test::slow() ? 1 : 8191;
  Worst worst = sweep((floats + step - 1) / step, f,
                      [=](int64_t i) { return float_of(first + i * step); }, error);
  const double spacing = (double(high) - low) / 1e6;
  const Worst even = sweep(
      1000001, f, [=](int64_t i) { return static_cast<float>(low + spacing * double(i)); }, error);
  take_worse(worst, even.error, even.at);
  return worst;
}

// Of a float result. What overflows counts as 2^128; results below the normal range may be zero.
double ulps(float y, double exact) {
  const double result = y > 0 && isinf(y) ? overflow : y;
  if (exact < smallest_normal) return y >= 0 && y <= smallest_normal ? 0 : INFINITY;
  if (exact > overflow) exact = overflow;
  return fabs(result - exact) / test::ulp(exact);
}
double exp_error(float y, float x) { return ulps(y, ::exp(double(x))); }
double exp2_error(float y, float x) { return ulps(y, ::exp2(double(x))); }
double tanh_error(float y, float x) {
  const double exact = ::tanh(double(x));
  return fabs(y - exact) / test::ulp(exact);
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr double exp2_bound = 1.0;
#else
constexpr double exp2_bound = 1.3;
#endif

TEST(exp2_bounded_error) {
  const Worst worst =
      sweep_range(-150.f, 128.f, [](vfloat x) { return exp2_bounded(x); }, exp2_error);
  CHECK(worst.error <= exp2_bound, "%.3f ulp at %a", worst.error, worst.at);
}

TEST(exp2_error_everywhere) {
  const Worst worst = sweep_range(-300.f, 300.f, [](vfloat x) { return exp2(x); }, exp2_error);
  CHECK(worst.error <= exp2_bound, "%.3f ulp at %a", worst.error, worst.at);
}

TEST(exp_error_in_ulps) {
  const Worst worst = sweep_range(-104.f, 89.f, [](vfloat x) { return exp(x); }, exp_error);
  CHECK(worst.error <= 2.0, "%.3f ulp at %a", worst.error, worst.at);
}

TEST(tanh_error_in_ulps) {
  const Worst worst = sweep_range(-20.f, 20.f, [](vfloat x) { return tanh(x); }, tanh_error);
  CHECK(worst.error <= 1.5, "%.3f ulp at %a", worst.error, worst.at);
}

TEST(gelu_absolute_error) {
  const auto error = [](float y, float x) {
    return fabs(y - 0.5 * x * ::erfc(-x * 0.70710678118654752440));
  };
  const Worst worst = sweep_range(-10.f, 10.f, [](vfloat x) { return gelu(x); }, error);
  CHECK(worst.error <= 1.4e-6, "%.3g at %a", worst.error, worst.at);
}

TEST(edges) {
  const float inf = INFINITY;
  CHECK(exp(splat(-inf))[0] == 0 && exp2(splat(-inf))[0] == 0 && exp2_bounded(splat(-inf))[0] == 0);
  CHECK(exp(splat(inf))[0] == inf && exp2(splat(inf))[0] == inf);
  CHECK(exp(splat(1e38f))[0] == inf && exp2(splat(1e38f))[0] == inf);
  CHECK(exp(splat(-1e38f))[0] == 0 && exp2(splat(-1e38f))[0] == 0);
  CHECK(exp(splat(0.f))[0] == 1 && exp2(splat(-0.f))[0] == 1 && exp2_bounded(splat(0.f))[0] == 1);
  CHECK(tanh(splat(inf))[0] == 1 && tanh(splat(-inf))[0] == -1 && tanh(splat(0.f))[0] == 0);
  for (int i = 0; i < Vec<float>::width; ++i) {  // NaN stays in its lane
    vfloat x = splat(1.f);
    x[i] = NAN;
    const vfloat results[] = {exp(x), exp2(x), exp2_bounded(x), tanh(x), gelu(x)};
    for (const vfloat y : results)
      for (int j = 0; j < Vec<float>::width; ++j) CHECK(isnan(y[j]) == (i == j), "lane %d", j);
  }
}

TEST(whole_powers_are_exact) {
  for (int n = -126; n <= 127; ++n)
    CHECK(exp2_bounded(splat(float(n)))[0] == ldexpf(1, n), "2^%d", n);
}

TEST(doubles) {
  for (double x = -20; x < 20; x += 0.37) {
    CHECK(exp(splat(x))[1] == ::exp(x) && exp2(splat(x))[1] == ::exp2(x));
    CHECK(tanh(splat(x))[1] == ::tanh(x));
  }
}

}  // namespace
}  // namespace pyfuse::cpu::PYFUSE_ISA
