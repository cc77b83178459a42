// The random numbers of dropout: Philox4x32-10, counted as pyfuse/philox.py says. Element
// (b, h, m, n) takes word n & 3 of the four that counter (b, h, m, n >> 2) gives.
#pragma once
#include "cpu/transpose.h"
#include "cpu/vec.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyfuse::cpu::PYFUSE_ISA {

constexpr int philox_rounds = 10;
constexpr uint32_t philox_multiplier0 = 0xD2511F53, philox_multiplier2 = 0xCD9E8D57;

// What one call of dropout applies to every element; made once per kernel call.
struct DropoutRule {
  uint32_t key[philox_rounds][2];  // of each round
  int32_t threshold;               // an element is kept iff (its word >> 8) >= threshold
  double factor;                   // of those kept, 1 / (1 - p)
};

// seed: (seed, offset); 0 <= p < 1.
inline DropoutRule dropout_rule(const int64_t* seed, double p) {
  DropoutRule rule;
  uint32_t k0 = static_cast<uint32_t>(seed[0]), k1 = static_cast<uint32_t>(seed[1]);
  for (int i = 0; i < philox_rounds; ++i) {
    rule.key[i][0] = k0, rule.key[i][1] = k1;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  const double exact = p * (1 << 24);
  rule.threshold = static_cast<int32_t>(exact);
  if (rule.threshold < exact) ++rule.threshold;
  rule.factor = 1.0 / (1.0 - p);
  return rule;
}

// One word of a counter to a lane of 64 bits, in its lower half; the upper half is never read, so
// that a product is its own lower word.
typedef uint64_t vulong __attribute__((vector_size(PYFUSE_VECTOR_BYTES)));
constexpr int philox_lanes = PYFUSE_VECTOR_BYTES / 8;

PYFUSE_INLINE vulong multiply_words(vulong a, uint32_t b) {
#if defined(__AVX512F__)
  return (vulong)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (vulong)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (vulong)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#elif defined(__aarch64__)
  return (vulong)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}
PYFUSE_INLINE vulong xor_words(vulong a, vulong b, uint32_t c) {
#if defined(__AVX512F__)
  return (vulong)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b,
                                           _mm512_set1_epi32(static_cast<int>(c)), 0x96);
#else
  return a ^ b ^ c;
#endif
}

// Of a row (b, h, m) the group n >> 2 alone differs, and in three rounds it reaches every word:
// what does not depend on it before that is computed here, once.
struct PhiloxRow {
  uint32_t round1, round2, round3[2];  // what the words with the group in them are xor-ed with
  uint32_t word1;                      // after round 3
};

PYFUSE_INLINE PhiloxRow philox_row(const DropoutRule& rule, uint32_t b, uint32_t h, uint32_t m) {
  typedef uint64_t Product;
  const auto high = [](Product p) { return static_cast<uint32_t>(p >> 32); };
  const auto low = [](Product p) { return static_cast<uint32_t>(p); };
  PhiloxRow row;
  Product p0 = Product(philox_multiplier0) * b, p2 = Product(philox_multiplier2) * m;
  row.round1 = high(p0) ^ rule.key[0][1];
  row.round2 = low(p2) ^ rule.key[1][0];
  const uint32_t word3 = low(p0);
  p0 = Product(philox_multiplier0) * (high(p2) ^ h ^ rule.key[0][0]);
  p2 = Product(philox_multiplier2) * (high(p0) ^ word3 ^ rule.key[1][1]);
  row.round3[0] = high(p2) ^ rule.key[2][0];
  row.round3[1] = low(p0) ^ rule.key[2][1];
  row.word1 = low(p2);
  return row;
}

// The words of G · philox_lanes groups, counted from `group` on, as 32-bit lanes in the order of
// their elements. G states side by side hide the latency of the multiplications.
template <int G>
PYFUSE_INLINE void philox_words(const DropoutRule& rule, const PhiloxRow& row, uint32_t group,
                                vuint (&out)[2 * G]) {
  vulong c0[G], c1[G], c2[G], c3[G];
  PYFUSE_UNROLL for (int g = 0; g < G; ++g) {
    // Even lanes count the first half of the groups, odd lanes the second: exchange() sorts them.
    vulong counter;
    PYFUSE_UNROLL for (int i = 0; i < philox_lanes; ++i) counter[i] =
        static_cast<uint32_t>(g * philox_lanes + i / 2 + i % 2 * (philox_lanes / 2));
    counter += group;
    const vulong p2 = multiply_words(counter ^ row.round1, philox_multiplier2);
    const vulong p0 = multiply_words((p2 >> 32) ^ row.round2, philox_multiplier0);
    c0[g] = p2 ^ row.round3[0];
    c1[g] = vulong{} + row.word1;
    c2[g] = (p0 >> 32) ^ row.round3[1];
    c3[g] = p0;
  }
  PYFUSE_UNROLL for (int round = 3; round < philox_rounds; ++round) {
    PYFUSE_UNROLL for (int g = 0; g < G; ++g) {
      const vulong p0 = multiply_words(c0[g], philox_multiplier0);
      const vulong p2 = multiply_words(c2[g], philox_multiplier2);
      c0[g] = xor_words(p2 >> 32, c1[g], rule.key[round][0]);
      c1[g] = p2;
      c2[g] = xor_words(p0 >> 32, c3[g], rule.key[round][1]);
      c3[g] = p0;
    }
  }
  PYFUSE_UNROLL for (int g = 0; g < G; ++g) {
    vulong first = (c0[g] & 0xFFFFFFFFu) | (c1[g] << 32);
    vulong second = (c2[g] & 0xFFFFFFFFu) | (c3[g] << 32);
    exchange<1>(first, second, typename LanesOf<philox_lanes>::type{});
    out[2 * g] = (vuint)first, out[2 * g + 1] = (vuint)second;
  }
}

// The factors of as many elements as a vector has words.
PYFUSE_INLINE void store_factors(float* to, vint kept, double factor, int64_t) {
  store(to, kept ? splat(static_cast<float>(factor)) : vfloat{});
}
PYFUSE_INLINE void store_factors(double* to, vint kept, double factor, int64_t count) {
  constexpr int w = Vec<double>::width;
  vdouble part[2] = {};
  PYFUSE_UNROLL for (int i = 0; i < 2 * w; ++i) part[i / w][i % w] = kept[i] ? factor : 0.0;
  store(to, part[0]);
  if (count > w) store(to + w, part[1]);
}

template <int G, class C>
PYFUSE_INLINE void dropout_groups(const DropoutRule& rule, const PhiloxRow& row, int64_t n,
                                  int64_t count, C* factor) {
  constexpr int w = Vec<float>::width;
  vuint words[2 * G];
  philox_words<G>(rule, row, static_cast<uint32_t>(n >> 2), words);
  PYFUSE_UNROLL for (int i = 0; i < 2 * G; ++i) {
    if (i * w >= count) break;
    const vint kept = (vint)(words[i] >> 8) >= rule.threshold;
    store_factors(factor + i * w, kept, rule.factor, count - i * w);
  }
}

// factor[i] = 1 / (1 - p) where dropout keeps element (b, h, m, n + i), else 0, for i < count.
// n is a multiple of 4. Whole vectors are written: up to count rounded up to a multiple of
// Vec<C>::width. About one cycle per element with AVX-512.
template <class C>
inline void dropout_row(const DropoutRule& rule, uint32_t b, uint32_t h, uint32_t m, int64_t n,
                        int64_t count, C* factor) {
  constexpr int64_t step = 4 * philox_lanes;
  const PhiloxRow row = philox_row(rule, b, h, m);
  int64_t i = 0;
  for (; i + step < count; i += 2 * step)
    dropout_groups<2>(rule, row, n + i, count - i, factor + i);
  if (i < count) dropout_groups<1>(rule, row, n + i, count - i, factor + i);
}

// v where it is kept, scaled; 0 where it is dropped, even if v is not finite.
template <class V>
PYFUSE_INLINE V apply_dropout(V v, V factor) {
  return factor > V{} ? v * factor : V{};
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
