// The gradients of LayerNorm and RMSNorm, for sm_80 and later. With n and rstd as in norm.cu,
// g = dy · weight (or 1 + weight) and means over the d columns:
//
//   dz' = rstd · (g - mean(g) - n · mean(g · n)) + dz,    dresidual = dz', dx = dropout(dz')
//   dweight = sum over rows of dy · n,   dbias = sum over rows of dy      (RMSNorm: no mean(g))
//
// Rows are shared by threads as in norm.cu. A thread has the same columns of all rows of its block,
// so that it adds up the parameters' gradients in registers; each block writes one row of sums, and
// norm_sums.cu adds those. Rows of more than LARGEST columns go twice through a block for dx; a
// kernel of its own goes down their columns.
//
// Compiled once for each NEIGHBOURS, the UNIT of norm_row.cuh: 8, 4 and 1.
#include "norm_terms.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int UNIT = NEIGHBOURS;

template <int N>
DEVICE void read_weight(float (&weight)[N][UNIT], const NormBackward& p, const Part<UNIT>& part,
                        int first = 0) {
  read<UNIT, N>(weight, p.weight, p.kind == NORM_GEMMA ? 0.0f : 1.0f, part, first);
  if (p.kind == NORM_GEMMA) for_each<UNIT, N>(weight, [](float w, int, int) { return 1.0f + w; });
}

/// The weight, for all rows: in registers, or where these are few in shared memory, each thread's
/// its own, 16 bytes side by side with those of its neighbours.
template <int ELEMENTS>
class Weight {
  static constexpr int N = ELEMENTS / UNIT;
  static constexpr bool KEPT = ELEMENTS <= 8;

 public:
  DEVICE void load(const NormBackward& p, const Part<UNIT>& part) {
    read_weight<N>(kept_, p, part);
    if constexpr (!KEPT) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i += 4)
        keep_words<4>(place(i), reinterpret_cast<float (&)[4]>(kept_[i / UNIT][i % UNIT]));
    }
  }

  DEVICE void multiply(float (&g)[N][UNIT]) const {
    if constexpr (KEPT) {
      for_each<UNIT, N>(g, [&](float x, int c, int i) { return x * kept_[c][i]; });
    } else {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i += 4) {
        const float4 w = *reinterpret_cast<const float4*>(place(i));
        float* const x = &g[i / UNIT][i % UNIT];
        x[0] *= w.x, x[1] *= w.y, x[2] *= w.z, x[3] *= w.w;
      }
    }
  }

 private:
  static DEVICE float* place(int i) {
    extern __shared__ float4 shared[];
    return reinterpret_cast<float*>(shared + i / 4 * blockDim.x + threadIdx.x);
  }

  float kept_[N][UNIT];
};

/// Rows of up to ELEMENTS columns a thread.
template <int ELEMENTS>
struct OnePass {
  static constexpr int N = ELEMENTS / UNIT;

  const NormBackward& p;
  const Part<UNIT> part;
  RowSum<2> sum;
  Raw<UNIT> x[N] = {}, dy[N] = {};
  float mean = 0, rstd = 0;  // of the row that is on its way
  ParameterSums<UNIT, N> sums;
  Weight<ELEMENTS> weight;

  DEVICE explicit OnePass(const NormBackward& p) : p(p), part(p), sum(p.lanes) {}

  DEVICE void fetch_row(int64_t row) {
    if (row >= p.rows) {
      for (auto& words : dy) words = {};  // adds nothing
      mean = rstd = 0;
      for (auto& words : x) words = {};
      return;
    }
    fetch<UNIT, N>(x, p.x, row, part);
    fetch<UNIT, N>(dy, p.dy, row, part);
    if (p.mean != nullptr) mean = p.mean[row];
    rstd = p.rstd[row];
  }

  DEVICE void run() {
    const int together = blockDim.x / p.lanes;  // rows of a block
    const int64_t step = int64_t(gridDim.x) * together;
    int64_t first = int64_t(blockIdx.x) * together, row = first + threadIdx.x / p.lanes;
    const bool rows_too = p.dx.data != nullptr || p.dresidual.data != nullptr;
    weight.load(p, part);
    fetch_row(row);
    for (; first < p.rows; first += step, row += step) {
      const bool mine = row < p.rows;
      Raw<UNIT> residual[N] = {}, dz[N] = {};
      if (mine && p.residual.data != nullptr) fetch<UNIT, N>(residual, p.residual, row, part);
      Terms<UNIT, N> t;
      const float scale = rstd;
      t.make(p, x, residual, dy, mean, rstd, row, part);
      if (mine && p.dz.data != nullptr) fetch<UNIT, N>(dz, p.dz, row, part);
      fetch_row(row + step);
      sums.add(t);
      if (!rows_too) continue;
      weight.multiply(t.g);
      float s[2] = {};
      t.add_to(s);
      sum.add(s);
      const float offset = p.kind == NORM_LAYER ? s[1] * p.inverse : 0.0f;
      t.finish(p, dz, s[0] * p.inverse, offset, scale, row, mine, part);
    }
    sums.store(p, part);
  }
};

/// Longer rows: dx and dresidual.
struct TwoPasses {
  static constexpr int N = (UNIT == 1 ? 8 : 16) / UNIT;

  const NormBackward& p;
  const Part<UNIT> part;
  RowSum<2> sum;
  float mean = 0, rstd = 0;
  Terms<UNIT, N> t;

  DEVICE explicit TwoPasses(const NormBackward& p) : p(p), part(p), sum(p.lanes) {}

  /// The terms of a stretch, dy times the weight.
  DEVICE void read_terms(int64_t row, int chunk) {
    Raw<UNIT> x[N] = {}, residual[N] = {}, dy[N] = {};
    fetch<UNIT, N>(x, p.x, row, part, chunk);
    fetch<UNIT, N>(dy, p.dy, row, part, chunk);
    if (p.residual.data != nullptr) fetch<UNIT, N>(residual, p.residual, row, part, chunk);
    t.make(p, x, residual, dy, mean, rstd, row, part, chunk);
    float weight[N][UNIT];
    read_weight<N>(weight, p, part, chunk);
    for_each<UNIT, N>(t.g, [&](float g, int c, int i) { return g * weight[c][i]; });
  }

  DEVICE void run() {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
      if (p.mean != nullptr) mean = p.mean[row];
      rstd = p.rstd[row];
      float s[2] = {};
      for (int chunk = 0; chunk * p.lanes * UNIT < p.d; chunk += N) {
        read_terms(row, chunk);
        t.add_to(s);
      }
      sum.add(s);
      const float offset = p.kind == NORM_LAYER ? s[1] * p.inverse : 0.0f;
      for (int chunk = 0; chunk * p.lanes * UNIT < p.d; chunk += N) {
        Raw<UNIT> dz[N] = {};
        if (p.dz.data != nullptr) fetch<UNIT, N>(dz, p.dz, row, part, chunk);
        read_terms(row, chunk);
        t.finish(p, dz, s[0] * p.inverse, offset, rstd, row, true, part, chunk);
      }
    }
  }
};

/// Longer rows: the parameters' sums. A lane has N chunks of columns, and the block's warps take
/// turns at the rows.
struct Columns {
  static constexpr int N = UNIT == 1 ? 4 : 1;

  const NormBackward& p;
  const Part<UNIT> part;
  ParameterSums<UNIT, N> sums;

  DEVICE explicit Columns(const NormBackward& p) : p(p), part(p) {}

  DEVICE void run() {
    const int chunk = blockIdx.y * N, warps = blockDim.x / 32;
    const int64_t step = int64_t(gridDim.x) * warps;
    for (int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / 32; row < p.rows; row += step) {
      Raw<UNIT> x[N] = {}, residual[N] = {}, dy[N] = {};
      fetch<UNIT, N>(dy, p.dy, row, part, chunk);
      fetch<UNIT, N>(x, p.x, row, part, chunk);
      if (p.residual.data != nullptr) fetch<UNIT, N>(residual, p.residual, row, part, chunk);
      Terms<UNIT, N> t;
      t.make(p, x, residual, dy, p.mean == nullptr ? 0.0f : p.mean[row], p.rstd[row], row, part,
             chunk);
      sums.add(t);
    }
    sums.store(p, part, chunk);
  }
};

}  // namespace

// Elements of a row in each thread. Grid: as many blocks as rows of sums.

#if NEIGHBOURS == 1  // the addresses of columns one by one take registers, too
extern "C" __global__ void __launch_bounds__(512)
    elements4(const __grid_constant__ NormBackward p) {
  OnePass<4>(p).run();
}
#else
extern "C" __global__ void __launch_bounds__(512)
    elements8(const __grid_constant__ NormBackward p) {
  OnePass<8>(p).run();
}
#endif

#if NEIGHBOURS == 8
extern "C" __global__ void __launch_bounds__(512)
    elements16(const __grid_constant__ NormBackward p) {
  OnePass<16>(p).run();
}
#endif

extern "C" __global__ void __launch_bounds__(512)
    stretches(const __grid_constant__ NormBackward p) {
  TwoPasses(p).run();
}

/// p.lanes is 32. Grid: as many blocks as rows of sums, and stretches of 32 lanes' columns.
extern "C" __global__ void __launch_bounds__(256) columns(const __grid_constant__ NormBackward p) {
  Columns(p).run();
}

}  // namespace pyfuse::cuda
