// Sums over the threads that share a row.
#pragma once

#include "primitives.cuh"

namespace pyfuse::cuda {

constexpr int MOST_WARPS = 16;

/// Sums over the threads of a row, the same number in each of them and always in the same order.
/// Within a warp by exchange; warps leave theirs in one of two places, so that one barrier for each
/// sum suffices: whoever writes a place again has seen a barrier after all had read it.
template <int K>
class RowSum {
 public:
  DEVICE explicit RowSum(int lanes)
      : lanes_(lanes), first_(lanes > 32 ? threadIdx.x / lanes * (lanes / 32) : 0) {}

  DEVICE void add(float (&sum)[K]) {
    __shared__ float places[2][K][MOST_WARPS];
    exchange<16>(sum, lanes_);
    if (lanes_ <= 32) return;
    auto& place = places[turn_];
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) place[k][threadIdx.x / 32] = sum[k];
    }
    __syncthreads();
    const int warp = threadIdx.x % MOST_WARPS;
#pragma unroll
    for (int k = 0; k < K; ++k) sum[k] = warp * 32 < lanes_ ? place[k][first_ + warp] : 0.0f;
    exchange<MOST_WARPS / 2>(sum, MOST_WARPS);
    turn_ ^= 1;
  }

 private:
  /// Add those of neighbours, as far as these share the row: all of `lanes` get the same sum.
  template <int STEP>
  static DEVICE void exchange(float (&sum)[K], int lanes) {
#pragma unroll
    for (int step = STEP; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const float other = __shfl_xor_sync(~0u, sum[k], step);
        if (step < lanes) sum[k] += other;
      }
    }
  }

  int lanes_, first_, turn_ = 0;  // first_: the first warp of the row's
};

}  // namespace pyfuse::cuda
