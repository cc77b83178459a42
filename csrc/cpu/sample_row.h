// A row of logits, and what its tokens weigh: the steps of pyfuse/generation/sampling.py that are
// arithmetic of floats. Each operation is rounded by itself: whatever includes this is compiled
// with -ffp-contract=off.
#pragma once
#include <math.h>

#include "cpu/philox.h"
#include "cpu/row_vectors.h"

namespace pyfuse::cpu::PYFUSE_ISA {

constexpr int lane_count = Vec<float>::width;
constexpr int64_t stretch = 64 * lane_count;  // tokens whose maxima are kept, one for each lane
constexpr float minus_infinity = -INFINITY;
constexpr float least_exponent = -32.f;  // e^-32 · 2^40 is nothing

struct LogitRow {
  const float* logits;
  int64_t size;
  float divisor;

  int64_t stretches() const { return (size + stretch - 1) / stretch; }
  int64_t end(int64_t s) const { return (s + 1) * stretch < size ? (s + 1) * stretch : size; }
};

// body(logits, i, part of an accumulation) for the vectors of tokens [begin, end); -inf beyond.
template <class Body>
PYFUSE_INLINE void for_logits(const LogitRow& row, int64_t begin, int64_t end, const Body& body) {
  const float* from = row.logits + begin;
  for_vectors<float>(end - begin, [&](const auto& at, int part) PYFUSE_INLINE_BODY {
    vfloat l = at(from);
    if (at.count < lane_count)
      l = iota<float>() < static_cast<float>(at.count) ? l : splat(minus_infinity);
    body(l, begin + at.i, part);
  });
}

// a > b ? a : b, which compilers make two instructions of.
PYFUSE_INLINE vfloat larger(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (vfloat)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// The largest logit, NaN if there is one.
inline float find_maxima(const LogitRow& row, float* maxima) {
  vfloat all = splat(minus_infinity);
  vint is_nan{};
  for (int64_t s = 0; s < row.stretches(); ++s) {
    vfloat part[accumulators];
    PYFUSE_UNROLL for (vfloat& m : part) m = splat(minus_infinity);
    for_logits(row, s * stretch, row.end(s), [&](vfloat l, int64_t, int i) PYFUSE_INLINE_BODY {
      part[i] = larger(l, part[i]);
      is_nan |= l != l;
    });
    const vfloat m = larger(larger(part[0], part[1]), larger(part[2], part[3]));
    store(maxima + s * lane_count, m);
    all = larger(m, all);
  }
  PYFUSE_UNROLL for (int i = 0; i < lane_count; ++i) if (is_nan[i]) return NAN;
  return reduce_max(all);
}

// Those of the even and of the odd lanes.
struct LaneWeights {
  vulong even, odd;
};

// 2^40 · e^(x - largest); the constants are those of sampling.py.
PYFUSE_INLINE LaneWeights weigh(vfloat x, float largest) {
  const vfloat d = larger(x - largest, splat(least_exponent));
  const vfloat y = d * 1.442695f;
  const vfloat shifted = y + splat(12582912.f);  // 1.5 · 2^23: n is in its last bits
  const vfloat f = y - (shifted - splat(12582912.f));
  constexpr float unit = 16777216.f;  // 2^24, by which all terms may as well be scaled
  const vfloat high = 0.0013398888f * unit + 0.00015353352f * unit * f;
  const vfloat middle = 0.055503324f * unit + 0.009618438f * unit * f;
  const vfloat low = 0.6931472f * unit + 0.24022648f * unit * f, f2 = f * f;
  const vfloat e = unit + f * (low + f2 * (middle + f2 * high));
  const vulong whole = (vulong) __builtin_convertvector(e, vint);
  const vulong down = (vulong)(0x4B400000 + 16 - (vint)shifted);  // 16 - n
  return {(whole << 32) >> (down & 0xFFFFFFFFu), (whole >> 32 << 32) >> (down >> 32)};
}

PYFUSE_INLINE int64_t sum(vulong v) {
  uint64_t total = 0;
  PYFUSE_UNROLL for (int i = 0; i < philox_lanes; ++i) total += v[i];
  return static_cast<int64_t>(total);
}

PYFUSE_INLINE void store_weights(int64_t* to, const LaneWeights& w) {
  PYFUSE_UNROLL for (int i = 0; i < philox_lanes; ++i) {
    to[2 * i] = static_cast<int64_t>(w.even[i]);
    to[2 * i + 1] = static_cast<int64_t>(w.odd[i]);
  }
}

// Of the whole row; sums gets those up to the end of each stretch.
template <bool divides>
inline int64_t weigh_row(const LogitRow& row, float largest, int64_t* sums) {
  int64_t total = 0;
  for (int64_t s = 0; s < row.stretches(); ++s) {
    vulong part{};
    for_logits(row, s * stretch, row.end(s), [&](vfloat l, int64_t, int) PYFUSE_INLINE_BODY {
      const LaneWeights w = weigh(divides ? l / row.divisor : l, largest);
      part += w.even + w.odd;
    });
    total += sum(part);
    sums[s] = total;
  }
  return total;
}
inline int64_t weigh_row(const LogitRow& row, float largest, int64_t* sums) {
  return row.divisor == 1.f ? weigh_row<false>(row, largest, sums)
                            : weigh_row<true>(row, largest, sums);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
