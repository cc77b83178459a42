// vec.h: loads, stores, tails, conversions, reductions.
#include "cpu/vec.h"

#include <math.h>

#include "../check.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

using test::from_half;
using test::Memory;
using test::to_half;

// Lanes 0 ... n-1 of memory that ends after element n-1.
template <class T>
void check_tail(int n) {
  typedef compute_t<T> C;
  constexpr int W = width<T>;
  const Memory from(n * sizeof(T)), to(n * sizeof(T)), wide(W * sizeof(T));
  T* const p = static_cast<T*>(from.data());
  for (int i = 0; i < n; ++i) from_compute(static_cast<C>(i + 1), p[i]);
  const vec_t<T> v = load(p, n);
  for (int i = 0; i < W; ++i)
    CHECK(v[i] == (i < n ? C(i + 1) : C(0)), "lane %d of %d of %zu bytes", i, n, sizeof(T));
  store(static_cast<T*>(to.data()), v, n);
  CHECK(memcmp(p, to.data(), n * sizeof(T)) == 0, "%d lanes of %zu bytes", n, sizeof(T));
  store(static_cast<T*>(wide.data()), splat(C(1)), n);
  for (size_t i = n * sizeof(T); i < W * sizeof(T); ++i)
    CHECK(static_cast<unsigned char*>(wide.data())[i] == 0xff, "wrote past %d lanes", n);
  if (n < W) return;
  const vec_t<T> whole = load(p);
  for (int i = 0; i < W; ++i) CHECK(whole[i] == v[i], "lane %d", i);
  store(static_cast<T*>(wide.data()), whole);
  CHECK(memcmp(p, wide.data(), W * sizeof(T)) == 0);
}

template <class T>
void check_tails() {
  for (int n = 0; n <= width<T>; ++n) check_tail<T>(n);
}

TEST(tails_end_where_the_memory_ends) {
  check_tails<float>();
  check_tails<double>();
  check_tails<bf16>();
  check_tails<f16>();
}

bool same(double a, double b) { return a == b ? signbit(a) == signbit(b) : isnan(a) && isnan(b); }

template <class T>
void check_every_half(DType dtype) {
  constexpr int W = width<T>;
  for (int base = 0; base < 65536; base += W) {
    T half[W];
    for (int i = 0; i < W; ++i) half[i].bits = static_cast<uint16_t>(base + i);
    const vfloat v = load(half);
    for (int i = 0; i < W; ++i) {
      const double exact = from_half(half[i].bits, dtype);
      CHECK(same(v[i], exact), "%#x: %g, needs %g", half[i].bits, v[i], exact);
      CHECK(same(to_compute(half[i]), exact), "%#x", half[i].bits);
    }
  }
}

TEST(every_half_is_read_exactly) {
  check_every_half<bf16>(DType::bf16);
  check_every_half<f16>(DType::f16);
}

bool acceptable(uint16_t bits, float from, DType dtype) {
  const uint16_t exact = to_half(from, dtype);
  if (isnan(from)) return isnan(from_half(bits, dtype)) && (bits ^ exact) < 0x8000;
#if defined(__AVX512BF16__)  // its conversion takes subnormal numbers for zero
  if (dtype == DType::bf16 && fabsf(from) < 0x1p-126f && (bits & 0x7fff) == 0) return true;
#endif
  return bits == exact;
}

template <class T>
void check_rounded(const float (&x)[16], DType dtype) {
  constexpr int W = width<T>;
  for (int at = 0; at < 16; at += W) {
    T half[W];
    store(half, load(x + at));
    for (int i = 0; i < W; ++i) {
      CHECK(acceptable(half[i].bits, x[at + i], dtype), "%a: %#x, needs %#x", x[at + i],
            half[i].bits, to_half(x[at + i], dtype));
      T scalar;
      from_compute(x[at + i], scalar);
      CHECK(acceptable(scalar.bits, x[at + i], dtype), "%a: %#x (scalar)", x[at + i], scalar.bits);
    }
  }
}

// Rounding is monotonous, so it is right everywhere if it is right at every half, at every tie
// between two of them and at the floats beside each tie.
template <class T>
void check_rounding(DType dtype) {
  float x[16];
  int count = 0;
  const uint16_t infinity = to_half(INFINITY, dtype);
  for (uint16_t bits = 0; bits < infinity; ++bits) {
    const double low = from_half(bits, dtype), gap = bits + 1 < infinity
                                                         ? from_half(bits + 1, dtype) - low
                                                         : low - from_half(bits - 1, dtype);
    const float tie = static_cast<float>(low + gap / 2), at = static_cast<float>(low);
    const float values[] = {at, nextafterf(tie, 0), tie, nextafterf(tie, INFINITY)};
    for (const float value : values) {
      x[count++] = value;
      x[count++] = -value;
    }
    if (count < 16) continue;
    check_rounded<T>(x, dtype);
    count = 0;
  }
}

TEST(rounding_is_to_nearest_even) {
  check_rounding<bf16>(DType::bf16);
  check_rounding<f16>(DType::f16);
}

TEST(nan_and_infinity_survive_rounding) {
  float x[16];  // NaN whose payload lies in the bits that a half drops must not become infinity
  const uint32_t bits[16] = {0x7f800001, 0xff800001, 0x7fc00000, 0xffc00000, 0x7fffffff, 0xffffffff,
                             0x7f800000, 0xff800000, 0x7f7fffff, 0xff7fffff, 0x00000001, 0x80000001,
                             0x477fefff, 0x477ff000, 0x007fffff, 0x7f808000};
  for (int i = 0; i < 16; ++i) x[i] = bits_to_float(bits[i]);
  check_rounded<bf16>(x, DType::bf16);
  check_rounded<f16>(x, DType::f16);
}

template <class C>
void check_lanes() {
  constexpr int W = Vec<C>::width;
  const typename Vec<C>::type index = iota<C>();
  for (int i = 0; i < W; ++i) CHECK(index[i] == C(i));
  CHECK(reduce_add(index) == C(W * (W - 1) / 2));
  CHECK(reduce_max(index) == C(W - 1) && reduce_max(-index) == C(0));
  for (int i = 0; i < W; ++i) {
    typename Vec<C>::type v = splat(-static_cast<C>(INFINITY));
    CHECK(reduce_max(v) == -static_cast<C>(INFINITY));
    v[i] = C(-7);
    CHECK(reduce_max(v) == C(-7), "lane %d", i);
    v = splat(C(0));
    v[i] = C(3);
    CHECK(reduce_add(v) == C(3), "lane %d", i);
  }
  const C values[] = {C(-0.0), C(0), C(1.5), static_cast<C>(INFINITY), static_cast<C>(NAN)};
  for (const C x : values) CHECK(same(splat(x)[W - 1], x), "splat(%g)", static_cast<double>(x));
  CHECK(max(splat(C(2)), index + C(1))[0] == C(2) && max(index, splat(C(0)))[W - 1] == C(W - 1));
}

TEST(lanes_and_reductions) {
  check_lanes<float>();
  check_lanes<double>();
}

}  // namespace
}  // namespace pyfuse::cpu::PYFUSE_ISA
