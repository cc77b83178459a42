// Few tokens out of many, without a sort: those above a bound are found by the maxima of short
// stretches, and an edge among them digit by digit.
#pragma once
#include "cpu/sample_row.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Tokens that may be drawn, in rising order of their ids.
struct Candidates {
  int32_t* id;
  float* x;
  int64_t* weight;
  int64_t count;
};

inline int64_t weigh(Candidates& c, float largest) {
  vulong total{};
  PYFUSE_UNROLL for (int i = 0; i < lane_count; ++i) c.x[c.count + i] = minus_infinity;
  for (int64_t i = 0; i < c.count; i += lane_count) {
    const LaneWeights w = weigh(load(c.x + i), largest);
    store_weights(c.weight + i, w);
    total += w.even + w.odd;
  }
  return sum(total);
}

PYFUSE_INLINE uint32_t bits_of(vint mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < lane_count; ++i)
    if (mask[i]) bits |= 1u << i;
  return bits;
#endif
}

// Those with a logit of `least` or more, and their logits divided.
inline void gather(const LogitRow& row, const float* maxima, float least, Candidates& c) {
  constexpr uint32_t all_lanes = (1u << lane_count) - 1;
  const vint lane_numbers = __builtin_convertvector(iota<float>(), vint);
  c.count = 0;
  for (int64_t s = 0; s < row.stretches(); ++s) {
    if (bits_of(load(maxima + s * lane_count) >= least) == 0) continue;
    for_logits(row, s * stretch, row.end(s), [&](vfloat l, int64_t i, int) PYFUSE_INLINE_BODY {
      uint32_t bits = bits_of(l >= least);
      if (bits == all_lanes && i + lane_count <= row.size) {
        store(c.x + c.count, l);
        const vint id = lane_numbers + static_cast<int32_t>(i);
        memcpy(c.id + c.count, &id, sizeof id);
        c.count += lane_count;
        return;
      }
      for (; bits != 0; bits &= bits - 1) {
        const int64_t id = i + __builtin_ctz(bits);
        if (id >= row.size) return;  // where least is -inf
        c.id[c.count] = static_cast<int32_t>(id);
        c.x[c.count++] = row.logits[id];
      }
    });
  }
  if (row.divisor == 1.f) return;
  PYFUSE_UNROLL for (int i = 0; i < lane_count; ++i) c.x[c.count + i] = 0.f;
  for (int64_t i = 0; i < c.count; i += lane_count) store(c.x + i, load(c.x + i) / row.divisor);
}

// The largest x such that all that are no smaller weigh `limit` or more together, and what those
// above it weigh.
struct Edge {
  float x;
  int64_t above;
};

// Integers in the order of floats; -0 is 0.
PYFUSE_INLINE vuint keys_of(vfloat x) {
  const vint bits = (vint)(x + 0.f);
  return (vuint)(bits ^ (bits >> 31 | INT32_MIN));
}
PYFUSE_INLINE float of_key(uint32_t key) {
  return bits_to_float(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// Without weights all weigh 1. All together weigh `limit` at least.
inline Edge find_edge(const float* x, const int64_t* weight, int64_t count, int64_t limit) {
  constexpr int bits = 11;       // of a digit: three of them, or less where keys are close together
  uint32_t low = 0, span = ~0u;  // keys that are left: low to low + span
  for (int64_t above = 0;;) {
    const int shift = span >> bits == 0 ? 0 : 32 - bits - __builtin_clz(span);
    int64_t table[1 << bits] = {};
    for (int64_t i = 0; i < count; i += lane_count) {
      const vuint up = keys_of(load(x + i)) - low;
      uint32_t hits = bits_of((vint)(up <= span));
      if (count - i < lane_count) hits &= (1u << (count - i)) - 1;
      if (hits == 0) continue;
      const vuint digits = up >> shift;
      uint32_t digit[lane_count];
      memcpy(digit, &digits, sizeof digit);
      for (; hits != 0; hits &= hits - 1) {
        const int lane = __builtin_ctz(hits);
        table[digit[lane]] += weight == nullptr ? 1 : weight[i + lane];
      }
    }
    uint32_t digit = span >> shift;
    for (; digit > 0 && above + table[digit] < limit; --digit) above += table[digit];
    low += digit << shift;
    if (shift == 0) return {of_key(low), above};
    span = (1u << shift) - 1;
  }
}

// Keeps those for which keeps(i) is true.
template <class Keeps>
PYFUSE_INLINE void filter(Candidates& c, const Keeps& keeps) {
  int64_t count = 0;
  for (int64_t i = 0; i < c.count; ++i) {  // without a branch, which would often be mispredicted
    const bool kept = keeps(i);
    c.id[count] = c.id[i], c.x[count] = c.x[i], c.weight[count] = c.weight[i];
    count += kept;
  }
  c.count = count;
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
