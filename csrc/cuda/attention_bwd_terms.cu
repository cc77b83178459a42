// The terms of each row that attention's backward needs, from o and lse of its forward.
//
//   lse2 = lse log2(e);   delta = sum_d o do - dlse;   a query that saw no key: lse2 = inf, delta =
//   0
//
// A few lanes share a row and read 16 bytes of it at a time. Compiled for each ELEMENT: bf16, f16.
#include "attention_gradient.cuh"
#include "tile.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int THREADS = 128, PER_CHUNK = 16 / sizeof(ELEMENT);

DEVICE float product_of_chunks(const ELEMENT* x, const ELEMENT* y) {
  const uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(y);
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.0f;
  for (int i = 0; i < 4; ++i) {
    const float2 u = unpack(left[i], ELEMENT()), w = unpack(right[i], ELEMENT());
    sum = fmaf(u.x, w.x, fmaf(u.y, w.y, sum));
  }
  return sum;
}

}  // namespace

/// Grid: blocks of rows of each sequence (of all of them where they are packed), heads.
extern "C" __global__ void __launch_bounds__(THREADS)
    row_terms(const __grid_constant__ AttentionGradient p) {
  const int chunks = (p.dv + PER_CHUNK - 1) / PER_CHUNK;
  const int lanes = p.row_lanes;
  const int rows = THREADS / lanes, blocks = (p.M + rows - 1) / rows;
  const int row = blockIdx.x % blocks * rows + threadIdx.x / lanes, lane = threadIdx.x % lanes;
  const int h = blockIdx.y, batch = blockIdx.x / blocks;
  const bool there = row < p.M;
  float sum = 0.0f;
  if (there) {
    const auto at = [&](const void* x, const int64_t (&stride)[3]) {
      return reinterpret_cast<const ELEMENT*>(row_of<ELEMENT>(x, stride, batch, h, row));
    };
    const ELEMENT *o = at(p.o, p.o_stride), *d_o = at(p.d_o, p.do_stride);
    if (p.aligned) {
      for (int c = lane; c < chunks; c += lanes)
        sum += product_of_chunks(o + c * PER_CHUNK, d_o + c * PER_CHUNK);
    } else {
      for (int i = lane; i < p.dv; i += lanes) sum = fmaf(float(o[i]), float(d_o[i]), sum);
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!there || lane != 0) return;
  const int64_t place = batch * p.terms.stride[0] + h * p.terms.stride[1] + row;
  const float lse = p.terms.lse[place];
  if (p.d_lse != nullptr)
    sum -= p.d_lse[batch * p.dlse_stride[0] + h * p.dlse_stride[1] + row * p.dlse_stride[2]];
  const bool blind = lse == -INFINITY;
  p.terms.lse2[place] = blind ? INFINITY : lse * LOG2E;
  p.terms.delta[place] = blind ? 0.0f : sum;
}

}  // namespace pyfuse::cuda
