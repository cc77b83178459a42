// What the kernel that shares out the keys of a cache and the one that merges the shares have in
// common.
#pragma once

#include "attention_decode.h"
#include "mask.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {

/// The keys that sequence b's queries see; the last stands on the last key.
DEVICE Band band_in_cache(const AttentionDecode& p, int b) {
  const int length = static_cast<int>(max(int64_t(0), min(int64_t(p.N), element(p.lengths, b))));
  return {p.M, length, length, p.left, p.right};
}

/// How the keys [low, high) that some query of a sequence sees are shared out. It does not depend
/// on the tiles of rows.
struct Shares {
  int low, high, size;

  DEVICE Shares(const Band& band, int splits)
      : low(0), high(band.last(band.M - 1)), size(LEAST_SHARE) {
    low = min(band.first(0), high) / SHARE_UNIT * SHARE_UNIT;
    const int unit = splits * SHARE_UNIT;
    size = max(size, (high - low + unit - 1) / unit * SHARE_UNIT);
  }
  DEVICE int used() const { return (high - low + size - 1) / size; }
};

/// The part of a share [low, high) that a tile with the queries m0 to m1 needs; all of them see
/// those of [inside, past).
struct Part {
  int low, high, inside, past;

  DEVICE Part(const Band& band, const Shares& shares, int split, int m0, int m1)
      : inside(band.first(m1)), past(band.last(m0)) {
    const int begin = shares.low + split * shares.size;
    low = max(begin, band.first(m0));
    high = min(begin + shares.size, band.last(m1));
  }
  DEVICE bool all_see(int n, int count) const {
    return n >= inside && n + count <= min(past, high);
  }
};

/// 2^(m - top) for a row's maxima; 0 of what saw no key.
DEVICE float weight_of(float m, float top) { return m == -INFINITY ? 0.0f : exp2_approx(m - top); }

DEVICE float sink_of(const AttentionDecode& p, int h) {
  return p.sinks == nullptr ? -INFINITY : p.sinks[h] * LOG2E;
}

DEVICE float4 scaled(float4 x, float y) { return {x.x * y, x.y * y, x.z * y, x.w * y}; }
/// sum += x y
DEVICE void add_scaled(float4& sum, float4 x, float y) {
  sum = {fmaf(x.x, y, sum.x), fmaf(x.y, y, sum.y), fmaf(x.z, y, sum.z), fmaf(x.w, y, sum.w)};
}

/// Four columns of a row of o, from `column` on, as far as they exist.
template <typename T>
DEVICE void write_four(const AttentionDecode& p, int64_t b, int h, int m, int column, float4 x) {
  T* to = static_cast<T*>(p.o) + b * p.o_stride[0] + h * p.o_stride[1] + m * p.o_stride[2] + column;
  if (p.aligned) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(to) = x;
    } else {
      *reinterpret_cast<uint2*>(to) = {pack(x.x, x.y, T()), pack(x.z, x.w, T())};
    }
    return;
  }
  const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < p.dv) to[i] = T(values[i]);
  }
}

}  // namespace pyfuse::cuda
