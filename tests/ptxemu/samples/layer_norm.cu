// LayerNorm forward for any arch:   y = (x - mean) * rstd * weight + bias,
// mean = sum x / D, rstd = 1 / sqrt(sum (x - mean)² / D + eps), over each row of x [rows, D].
//
// One block per row. A row is read three times, for the mean, for the deviations from it (whose
// squares do not cancel, as those of x would) and for y; but only the first time from DRAM.
#include "primitives.cuh"

/// Launch with grid rows, a multiple of 32 threads, at most 1024.
struct LayerNormParams {
  const void *x, *weight, *bias;  // weight and bias [D] or null
  void* y;
  float *mean, *rstd;          // [rows] or null
  int64_t x_stride, y_stride;  // of a row, in elements
  int32_t D;
  int32_t
      aligned;  // whether x, weight, bias, y and the strides are multiples of 16 bytes, and D too
  float eps;
};

namespace {

template <typename T, int WIDTH>
struct alignas(sizeof(T) * WIDTH) Pack {
  T item[WIDTH];
};

/// The sum over all threads of a block, in all of them.
DEVICE float block_sum(float x) {
  __shared__ float sums[32];
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads();  // the sums of the call before have been read
  if (lane == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  x = lane < warps ? sums[lane] : 0.0f;
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

/// WIDTH elements at once, a divisor of D.
template <typename T, int WIDTH>
DEVICE void layer_norm(const LayerNormParams& p) {
  using Items = Pack<T, WIDTH>;
  const int64_t row = blockIdx.x;
  const auto* x = reinterpret_cast<const Items*>(static_cast<const T*>(p.x) + row * p.x_stride);
  const auto* weight = static_cast<const Items*>(p.weight);
  const auto* bias = static_cast<const Items*>(p.bias);
  auto* y = reinterpret_cast<Items*>(static_cast<T*>(p.y) + row * p.y_stride);
  const int items = p.D / WIDTH;

  const auto row_mean = [&](auto term) {
    float sum = 0.0f;
    for (int i = threadIdx.x; i < items; i += blockDim.x) {
      const Items in = x[i];
      for (int j = 0; j < WIDTH; ++j) sum += term(static_cast<float>(in.item[j]));
    }
    return block_sum(sum) / p.D;
  };
  const float mean = row_mean([](float value) { return value; });
  const float variance = row_mean([=](float value) { return (value - mean) * (value - mean); });
  const float rstd = rsqrtf(variance + p.eps);

  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const Items in = x[i];
    Items out, scale, shift;
    if (weight) scale = weight[i];
    if (bias) shift = bias[i];
    for (int j = 0; j < WIDTH; ++j) {
      const float value = (static_cast<float>(in.item[j]) - mean) * rstd;
      const float scaled = weight ? value * static_cast<float>(scale.item[j]) : value;
      out.item[j] = static_cast<T>(bias ? scaled + static_cast<float>(shift.item[j]) : scaled);
    }
    y[i] = out;
  }
  if (threadIdx.x == 0) {
    if (p.mean) p.mean[row] = mean;
    if (p.rstd) p.rstd[row] = rstd;
  }
}

}  // namespace

#define LAYER_NORM_ENTRY(NAME, T)                                                           \
  extern "C" __global__ void layer_norm_##NAME(const __grid_constant__ LayerNormParams p) { \
    p.aligned ? layer_norm<T, 16 / sizeof(T)>(p) : layer_norm<T, 1>(p);                     \
  }

LAYER_NORM_ENTRY(bf16, bf16)
LAYER_NORM_ENTRY(fp16, fp16)
LAYER_NORM_ENTRY(fp32, float)
