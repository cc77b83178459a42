// One row of attention over a cache from the sums of the shares of its keys.
//
//   o = sum_s 2^(m_s - m) o_s / l,   l = sum_s 2^(m_s - m) l_s + 2^(sink - m),   m = max_s m_s
//
// (Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023; the merge is that of Milakov and Gimelshein,
// arXiv:1805.02867.) Every warp finds m and l of all shares for itself; then each takes every
// WARPS-th of them, four columns to a lane, and the first adds up what the others found. All sums
// have one order, whatever ran when.
//
// Compiled once for each ELEMENT of o (f32, bf16, f16).
#include "decode.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int WARPS = 4;

/// Maximum and sum of weights of a row, by a whole warp.
DEVICE float2 sums_of_row(const float* maxima, const float* sums, int used) {
  const int lane = threadIdx.x % 32;
  float top = -INFINITY, sum = 0.0f;
  for (int s = lane; s < used; s += 32) top = fmaxf(top, maxima[s]);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  for (int s = lane; s < used; s += 32) sum += sums[s] * weight_of(maxima[s], top);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return {top, sum};
}

}  // namespace

/// Grid: rows of o.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    merge(const __grid_constant__ AttentionDecode p) {
  __shared__ float4 found[WARPS][32];
  const int64_t row = blockIdx.x, rows = gridDim.x;
  const int m = static_cast<int>(row % p.M), h = static_cast<int>(row / p.M % p.heads);
  const int b = static_cast<int>(row / p.M / p.heads);
  const int used = Shares(band_in_cache(p, b), p.splits).used();
  const int columns = (p.dv + 3) / 4 * 4, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* const o = p.partial + row * p.splits * columns;
  const float* const maxima = p.partial + rows * p.splits * columns + row * p.splits;
  const float2 sums = sums_of_row(maxima, maxima + rows * p.splits, used);
  const Finish finish(sums.x, sums.y, sink_of(p, h));
  for (int column = 0; column < columns; column += 128) {
    const int own = column + 4 * lane;
    float4 sum{};
    if (own < columns) {
#pragma unroll 4
      for (int s = warp; s < used; s += WARPS) {
        const float4 x = *reinterpret_cast<const float4*>(o + int64_t(s) * columns + own);
        add_scaled(sum, x, weight_of(maxima[s], sums.x));
      }
    }
    found[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && own < columns) {
#pragma unroll
      for (int i = 1; i < WARPS; ++i) add_scaled(sum, found[i][lane], 1.0f);
      write_four<ELEMENT>(p, b, h, m, own, scaled(sum, finish.factor));
    }
    __syncthreads();
  }
  if (p.lse != nullptr && threadIdx.x == 0) p.lse[row] = finish.lse;
}

}  // namespace pyfuse::cuda
