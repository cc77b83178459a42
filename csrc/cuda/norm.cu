// LayerNorm and RMSNorm forward, for sm_80 and later.
//   (Ba et al., arXiv:1607.06450; Zhang and Sennrich, arXiv:1910.07467)
//
//   z = dropout(x) + residual,  n = (z - mean(z)) · rstd,  rstd = (mean((z - mean)²) + eps)^-1/2,
//   y = n · weight + bias       (RMSNorm: mean is 0, no bias; NormKind says where n is rounded)
//
// p.lanes threads share a row and keep it in registers from the statistics to y: a part of a warp
// or a warp for short rows, a block for long ones. Blocks stay for many rows: weight and bias are
// read once, and while a row is computed the next one is on its way. Rows of more than LARGEST
// columns go twice through a block, in stretches; the second time they come from the L2 cache.
//
// Compiled once for each NEIGHBOURS, the UNIT of norm_row.cuh: 8, 4 and 1.
#include "norm_row.cuh"
#include "norm_statistics.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int UNIT = NEIGHBOURS;

/// n, and y made of it. x's dtype is that to which "llama" rounds n before the weight.
template <int N>
DEVICE void scale_row(float (&v)[N][UNIT], const NormForward& p, float rstd,
                      const float (&weight)[N][UNIT], const float (&bias)[N][UNIT]) {
  if (p.kind == NORM_LLAMA) {
    with_dtype<UNIT>(p.x.dtype, [&](auto zero) {
      for_each<UNIT, N>(
          v, [&](float x, int c, int i) { return rounded(x * rstd, zero) * weight[c][i]; });
    });
  } else {
    for_each<UNIT, N>(
        v, [&](float x, int c, int i) { return fmaf(x * rstd, weight[c][i], bias[c][i]); });
  }
}

template <int N>
DEVICE void read_parameters(float (&weight)[N][UNIT], float (&bias)[N][UNIT], const NormForward& p,
                            const Part<UNIT>& part, int first = 0) {
  read<UNIT, N>(weight, p.weight, p.kind == NORM_GEMMA ? 0.0f : 1.0f, part, first);
  if (p.kind == NORM_GEMMA) for_each<UNIT, N>(weight, [](float w, int, int) { return 1.0f + w; });
  read<UNIT, N>(bias, p.bias, 0.0f, part, first);
}

DEVICE void store_statistics(const NormForward& p, int64_t row, float mean, float rstd) {
  if (p.mean != nullptr) p.mean[row] = mean;
  if (p.rstd != nullptr) p.rstd[row] = rstd;
}

/// Rows of up to ELEMENTS columns a thread. HOLD: parameters stay in registers, too.
template <int ELEMENTS, bool HOLD>
struct OnePass {
  static constexpr int N = ELEMENTS / UNIT;

  const NormForward& p;
  const Part<UNIT> part;
  RowSum<1> sum;
  Raw<UNIT> x[N] = {}, residual[N] = {};
  float v[N][UNIT], weight[N][UNIT], bias[N][UNIT];

  DEVICE explicit OnePass(const NormForward& p) : p(p), part(p), sum(p.lanes) {}

  DEVICE void fetch_row(int64_t row) {
    if (row >= p.rows) return;
    fetch<UNIT, N>(x, p.x, row, part);
    if (p.residual.data != nullptr) fetch<UNIT, N>(residual, p.residual, row, part);
  }

  DEVICE float total(float of_thread) {
    float s[1] = {of_thread};
    sum.add(s);
    return s[0];
  }

  /// Subtract the mean, where there is one to subtract.
  DEVICE float centre() {
    if (p.kind != NORM_LAYER) return 0;
    float s = 0;
    for_each<UNIT, N>(v, [&](float x, int, int) { return s += x, x; });
    const float mean = mean_of(total(s), p);
    for_each<UNIT, N>(v, [&](float x, int, int) { return x - mean; });
    return mean;
  }

  /// Of this thread's columns.
  DEVICE float squares() const {
    float s = 0;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      float q = 0;
#pragma unroll
      for (int i = 0; i < UNIT; ++i) q = fmaf(v[c][i], v[c][i], q);
      s += part.has(c) ? q : 0.0f;
    }
    return s;
  }

  DEVICE void scale(float rstd) {
    if constexpr (HOLD) {
      scale_row<N>(v, p, rstd, weight, bias);
    } else {
#pragma unroll
      for (int c = 0; c < N; ++c) {  // a few parameters at a time
        float w[1][UNIT], b[1][UNIT];
        read_parameters<1>(w, b, p, part, c);
        scale_row<1>(reinterpret_cast<float (&)[1][UNIT]>(v[c]), p, rstd, w, b);
      }
    }
  }

  DEVICE void run() {
    const int together = blockDim.x / p.lanes;  // rows of a block
    const int64_t step = int64_t(gridDim.x) * together;
    int64_t first = int64_t(blockIdx.x) * together, row = first + threadIdx.x / p.lanes;
    if (HOLD && p.y.data != nullptr) read_parameters<N>(weight, bias, p, part);
    fetch_row(row);
    for (; first < p.rows; first += step, row += step) {
      make_z<UNIT, N>(v, p, x, residual, p.threshold != 0, row, part);
      fetch_row(row + step);
      const bool mine = row < p.rows;
      if (mine && p.z.data != nullptr) write<UNIT, N>(p.z, row, v, part);
      const float mean = centre();
      const float rstd = rsqrt_of(fmaf(total(squares()), p.inverse, p.eps));
      if (mine && part.lane == 0) store_statistics(p, row, mean, rstd);
      if (p.y.data == nullptr) continue;
      scale(rstd);
      if (mine) write<UNIT, N>(p.y, row, v, part);
    }
  }
};

/// Longer rows: each thread joins mean and squares of its stretches as Chan, Golub and LeVeque do.
struct TwoPasses {
  static constexpr int N = 16 / UNIT;

  const NormForward& p;
  const Part<UNIT> part;
  RowSum<1> sum;
  float v[N][UNIT], weight[N][UNIT], bias[N][UNIT];

  DEVICE explicit TwoPasses(const NormForward& p) : p(p), part(p), sum(p.lanes) {}

  DEVICE void read_z(int64_t row, int chunk) {
    Raw<UNIT> x[N] = {}, residual[N] = {};
    fetch<UNIT, N>(x, p.x, row, part, chunk);
    if (p.residual.data != nullptr) fetch<UNIT, N>(residual, p.residual, row, part, chunk);
    make_z<UNIT, N>(v, p, x, residual, p.threshold != 0, row, part, chunk);
  }

  /// rstd, and the mean of LayerNorm. z is written on the way.
  DEVICE float statistics(int64_t row, float& mean) {
    float count = 0, middle = 0, squares = 0;
    for (int chunk = 0; chunk * p.lanes * UNIT < p.d; chunk += N) {
      read_z(row, chunk);
      if (p.z.data != nullptr) write<UNIT, N>(p.z, row, v, part, chunk);
      float here = 0, s = 0, local = 0, q = 0;
#pragma unroll
      for (int c = 0; c < N; ++c) here += part.has(chunk + c) ? float(UNIT) : 0.0f;
      if (here == 0) continue;
      if (p.kind == NORM_LAYER) {
        for_each<UNIT, N>(v, [&](float x, int, int) { return s += x, x; });
        local = s / here;
      }
      for_each<UNIT, N>(v, [&](float x, int c, int) {
        const float t = part.has(chunk + c) ? x - local : 0.0f;
        return q = fmaf(t, t, q), x;
      });
      const float share = here / (count + here), step = local - middle;
      squares += q + step * step * (count * share);
      middle = fmaf(step, share, middle);
      count += here;
    }
    float s[1] = {middle * count};
    mean = 0;
    if (p.kind == NORM_LAYER) {
      sum.add(s);
      mean = mean_of(s[0], p);
    }
    s[0] = fmaf((middle - mean) * (middle - mean), count, squares);
    sum.add(s);
    return rsqrt_of(fmaf(s[0], p.inverse, p.eps));
  }

  DEVICE void run() {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
      float mean;
      const float rstd = statistics(row, mean);
      if (threadIdx.x == 0) store_statistics(p, row, mean, rstd);
      if (p.y.data == nullptr) continue;
      for (int chunk = 0; chunk * p.lanes * UNIT < p.d; chunk += N) {
        if (p.z.data == nullptr) {
          read_z(row, chunk);
        } else {  // this thread has written these columns
          Raw<UNIT> z[N] = {};
          fetch<UNIT, N>(z, p.z, row, part, chunk);
          unpack<UNIT, N>(v, z, p.z.dtype);
        }
        for_each<UNIT, N>(v, [&](float x, int, int) { return x - mean; });
        read_parameters<N>(weight, bias, p, part, chunk);
        scale_row<N>(v, p, rstd, weight, bias);
        write<UNIT, N>(p.y, row, v, part, chunk);
      }
    }
  }
};

}  // namespace

// Elements of a row in each thread. Grid: any number of blocks.

extern "C" __global__ void __launch_bounds__(256) elements8(const __grid_constant__ NormForward p) {
  OnePass<8, true>(p).run();
}

#if NEIGHBOURS > 1
extern "C" __global__ void __launch_bounds__(512)
    elements16(const __grid_constant__ NormForward p) {
  OnePass<16, true>(p).run();
}
#endif

#if NEIGHBOURS == 8
extern "C" __global__ void __launch_bounds__(512)
    elements32(const __grid_constant__ NormForward p) {
  OnePass<32, false>(p).run();
}
#endif

extern "C" __global__ void __launch_bounds__(512, 1)
    stretches(const __grid_constant__ NormForward p) {
  TwoPasses(p).run();
}

}  // namespace pyfuse::cuda
