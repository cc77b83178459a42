// The parameters' gradients from the sums that norm_bwd.cu's blocks have left: out[i] is the sum
// over blocks of sums[block, i], always in the same order.
#include "norm_row.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int WARPS = 32;

template <typename T>
DEVICE void put(void* to, int i, float x) {
  static_cast<T*>(to)[i] = T(x);
}

}  // namespace

/// A block has 32 columns, and each of its warps a share of the blocks. Grid: columns / 32, 2.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    add_blocks(const __grid_constant__ NormSums p) {
  __shared__ float parts[WARPS][32];
  const NormRows& out = p.out[blockIdx.y];
  if (out.data == nullptr) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  const float* from = p.sums[blockIdx.y] + column;
  float sum = 0;
  for (int block = warp; column < p.d && block < p.blocks; block += WARPS)
    sum += from[int64_t(block) * p.d];
  parts[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= p.d) return;
  sum = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += parts[w][lane];
  with_dtype<1>(out.dtype, [&](auto zero) { put<decltype(zero)>(out.data, column, sum); });
}

}  // namespace pyfuse::cuda
