// FlashAttention forward for sm_80 and later.   (Dao, arXiv:2307.08691)
//
//   o[m] = sum_n softmax_n(scale * q[m]·k[n]) v[n],   lse[m] = ln sum_n exp(scale * q[m]·k[n])
//
// over all n < N, or with causal over n <= m + N - M. A row without keys gives o = 0, lse = -inf.
//
// One block of four warps computes BLOCK_M rows of one head, 16 rows a warp, and walks over the
// keys from the last tile to the first: only the first few tiles on that way need a mask, and the
// loop over all others has none. K and V are double-buffered: while one stage is computed with,
// cp.async fills the other. fp16 and bf16 multiply on the tensor cores as they are; fp32 as
// 3xTF32: x = high + low, each in tf32, and xy = low·high + high·low + high·high.
#include "flash_softmax.cuh"

/// The only argument. Launch with grid (ceil(M / 64), H, B), 128 threads and
/// (BLOCK_M + 4 BLOCK_N) D sizeof(T) bytes of dynamic shared memory.
struct FlashParams {
  const void *q, *k, *v;  // [B, H, M|N, D], unit stride in D, rows aligned to 16 bytes
  void* o;                // [B, H, M, D], the same
  float* lse;             // [B, H, M], contiguous
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];  // of B, H and M|N, in elements
  int32_t M, N;
  int32_t causal;
  float scale;  // positive
};

namespace {

constexpr int BLOCK_M = 64;
constexpr int WARPS = BLOCK_M / 16;
constexpr int THREADS = 32 * WARPS;

/// A tile in shared memory: rows of D elements, cut into chunks of 16 bytes. Chunk c of row r lies
/// where chunk c ^ (r mod 8) would, so that eight rows of one column occupy all 32 banks once;
/// rows of 64 bytes, two to a line of banks, take r / 2 mod 4 instead.
template <typename T, int D>
struct Tile {
  static constexpr int BLOCK_N = sizeof(T) == 4 && D >= 64 ? 32 : 64;
  static constexpr int ROW = D * sizeof(T);  // bytes
  static constexpr int CHUNKS = ROW / 16;
  static constexpr int STEPS = ROW / 32;  // an mma takes 32 bytes of each row: 16 halves, 8 floats
  static constexpr int LOADED_ROWS = THREADS / CHUNKS;  // by one copy per thread

  static DEVICE int at(int row, int chunk) {
    return row * ROW + ((chunk ^ (CHUNKS >= 8 ? row & 7 : row >> 1 & 3)) << 4);
  }
};

/// Start copying ROWS rows into a tile; `from` is this thread's chunk of its first row. Where
/// RAGGED, only the first `inside` rows exist, and zeros take the place of the others.
template <class Tile, int ROWS, bool RAGGED>
DEVICE void load_tile(char* tile, const char* from, int64_t stride, int inside = ROWS) {
  const int row = threadIdx.x / Tile::CHUNKS, chunk = threadIdx.x % Tile::CHUNKS;
#pragma unroll
  for (int i = 0; i < ROWS; i += Tile::LOADED_ROWS, from += Tile::LOADED_ROWS * stride) {
    const uint32_t to = shared_address(tile + Tile::at(row + i, chunk));
    if constexpr (RAGGED) {
      cp_async_or_zero(to, from, row + i < inside);
    } else {
      cp_async(to, from);
    }
  }
}

/// The left operand of an mma, and the product with a right one.
template <typename T>
struct Operand {
  uint32_t x[4];

  DEVICE explicit Operand(const uint32_t (&raw)[4]) : x{raw[0], raw[1], raw[2], raw[3]} {}
  DEVICE void multiply(float (&c)[4], uint32_t b0, uint32_t b1) const { mma(c, x, b0, b1, T()); }
};

DEVICE void split(uint32_t raw, uint32_t& high, uint32_t& low) {
  high = to_tf32(__uint_as_float(raw));
  low = to_tf32(__uint_as_float(raw) - __uint_as_float(high));
}

template <>
struct Operand<float> {
  uint32_t high[4], low[4];

  DEVICE explicit Operand(const uint32_t (&raw)[4]) {
    for (int i = 0; i < 4; ++i) split(raw[i], high[i], low[i]);
  }
  DEVICE void multiply(float (&c)[4], uint32_t b0, uint32_t b1) const {
    uint32_t b0_high, b0_low, b1_high, b1_low;
    split(b0, b0_high, b0_low);
    split(b1, b1_high, b1_low);
    float step[4] = {};  // added outside: tensor cores cut off, and a long chain would drift
    mma(step, low, b0_high, b1_high, float());  // the small terms first: they round less
    mma(step, high, b0_low, b1_low, float());
    mma(step, high, b0_high, b1_high, float());
    for (int i = 0; i < 4; ++i) c[i] += step[i];
  }
};

/// s [16, BLOCK_N] = q kᵀ for a warp's rows. Lane 16i + 8j + r fetches chunk j of key 8i + r of
/// each 16 keys, which gives the right operands of two mma.
template <typename T, class Tile>
DEVICE void multiply_keys(float (&s)[Tile::BLOCK_N / 8][4], const uint32_t (&q)[Tile::STEPS][4],
                          const char* keys) {
  const int lane = threadIdx.x % 32;
  const int mine = Tile::at((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
  for (auto& part : s) part[0] = part[1] = part[2] = part[3] = 0.0f;
#pragma unroll
  for (int step = 0; step < Tile::STEPS; ++step) {
    const Operand<T> a(q[step]);
    const uint32_t from = shared_address(keys) + (mine ^ step * 32);  // chunk 2 step + j
#pragma unroll
    for (int n = 0; n < Tile::BLOCK_N / 16; ++n) {
      uint32_t b[4];
      ldmatrix(b, from + n * 16 * Tile::ROW);
      a.multiply(s[2 * n], b[0], b[1]);
      a.multiply(s[2 * n + 1], b[2], b[3]);
    }
  }
}

/// o [16, D] += p v. The scores leave the first product in the very layout that the second one
/// wants of its left operand.
template <typename T, class Tile, int D>
DEVICE void multiply_values(float (&o)[D / 8][4], const float (&p)[Tile::BLOCK_N / 8][4],
                            const char* values) {
  const int lane = threadIdx.x % 32;
  const int mine = Tile::at(lane & 15, lane >> 4);
#pragma unroll
  for (int j = 0; j < Tile::BLOCK_N / 16; ++j) {
    const auto &left = p[2 * j], &right = p[2 * j + 1];
    const Operand<T> a({pack(left[0], left[1], T()), pack(left[2], left[3], T()),
                        pack(right[0], right[1], T()), pack(right[2], right[3], T())});
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t b[4];
      ldmatrix_transposed(b, shared_address(values) + (mine ^ n * 32) + j * 16 * Tile::ROW);
      a.multiply(o[2 * n], b[0], b[1]);
      a.multiply(o[2 * n + 1], b[2], b[3]);
    }
  }
}

/// The same in fp32, where a lane has the scores of keys 2t and 2t + 1 but the operand wants t and
/// t + 4: a sum may be taken in any order, so the values are read in that order of keys. In the
/// same way a lane reads elements 2g and 2g + 1 of each 16 at once, for two mma: part n of o then
/// holds, of elements 16 (n / 2) + 4t + 0..3, the first and third (n even) or the others (n odd).
template <class Tile, int D>
DEVICE void multiply_values_fp32(float (&o)[D / 8][4], const float (&p)[Tile::BLOCK_N / 8][4],
                                 const char* values) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int even = Tile::at(2 * t, g / 2) + g % 2 * 8, odd = Tile::at(2 * t + 1, g / 2) + g % 2 * 8;
#pragma unroll
  for (int j = 0; j < Tile::BLOCK_N / 8; ++j) {
    const Operand<float> a({__float_as_uint(p[j][0]), __float_as_uint(p[j][2]),
                            __float_as_uint(p[j][1]), __float_as_uint(p[j][3])});
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      const char* from = values + j * 8 * Tile::ROW;
      const auto x = *reinterpret_cast<const uint2*>(from + (even ^ n * 64));
      const auto y = *reinterpret_cast<const uint2*>(from + (odd ^ n * 64));
      a.multiply(o[2 * n], x.x, y.x);
      a.multiply(o[2 * n + 1], x.y, y.y);
    }
  }
}

/// Write a warp's 16 rows, of which `inside` exist; `rows` is the place of the first. Each store is
/// one of 16 bytes: fp32 has them in one lane, the halves come together by way of `tile`.
template <typename T, class Tile, int D>
DEVICE void store_rows(char* rows, int64_t stride, int inside, const float (&o)[D / 8][4],
                       char* tile) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) __syncwarp();  // all lanes have read q from there
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
#pragma unroll
    for (int n = 0; n < D / 8; n += sizeof(T) / 2) {
      const float first = o[n][2 * i], second = o[n][2 * i + 1];
      if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<uint32_t*>(tile + Tile::at(row, n) + lane % 4 * 4) =
            pack(first, second, T());
      } else if (row < inside) {
        *reinterpret_cast<float4*>(rows + row * stride + (2 * n + lane % 4) * 16) = {
            first, o[n + 1][2 * i], second, o[n + 1][2 * i + 1]};
      }
    }
  }
  if constexpr (sizeof(T) == 4) return;
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * Tile::CHUNKS; i += 32) {
    const int row = i / Tile::CHUNKS, chunk = i % Tile::CHUNKS;
    if (row < inside) {
      *reinterpret_cast<uint4*>(rows + row * stride + chunk * 16) =
          *reinterpret_cast<const uint4*>(tile + Tile::at(row, chunk));
    }
  }
}

template <typename T>
DEVICE char* place(const void* x, const int64_t (&stride)[3], int64_t row) {
  return static_cast<char*>(const_cast<void*>(x)) +
         (blockIdx.z * stride[0] + blockIdx.y * stride[1] + row * stride[2]) * int64_t(sizeof(T));
}

template <typename T, int D>
DEVICE void flash_forward(const FlashParams& p) {
  using Tile = ::Tile<T, D>;
  constexpr int BLOCK_N = Tile::BLOCK_N, KV_BYTES = BLOCK_N * Tile::ROW;
  extern __shared__ __align__(1024) char shared[];  // q, then k and v of two stages
  char* const own_rows = shared + threadIdx.x / 32 * 16 * Tile::ROW;
  const auto stage = [&](int tile) {
    return shared + BLOCK_M * Tile::ROW + (tile & 1) * 2 * KV_BYTES;
  };

  const int lane = threadIdx.x % 32;
  const int m0 = (gridDim.x - 1 - blockIdx.x) * BLOCK_M;  // where causal, the longest walk first
  const int warp_m = m0 + threadIdx.x / 32 * 16;
  const auto visible = [&](int m) { return visible_keys(m, p.M, p.N, p.causal); };
  const int tiles = (visible(min(m0 + BLOCK_M, p.M) - 1) + BLOCK_N - 1) / BLOCK_N;
  const int unmasked_tiles = visible(m0) / BLOCK_N;  // those that every row sees all of

  const int row = threadIdx.x / Tile::CHUNKS, byte = threadIdx.x % Tile::CHUNKS * 16;
  const int n0 = (tiles - 1) * BLOCK_N;  // of the last tile, the only one that may be ragged
  const int64_t k_row = p.k_stride[2] * sizeof(T), v_row = p.v_stride[2] * sizeof(T);
  const char* k = place<T>(p.k, p.k_stride, n0 + row) + byte;
  const char* v = place<T>(p.v, p.v_stride, n0 + row) + byte;
  load_tile<Tile, BLOCK_M, true>(shared, place<T>(p.q, p.q_stride, m0 + row) + byte,
                                 p.q_stride[2] * sizeof(T), p.M - m0);
  cp_async_commit();
  if (tiles > 0) {
    load_tile<Tile, BLOCK_N, true>(stage(tiles - 1), k, k_row, p.N - n0);
    load_tile<Tile, BLOCK_N, true>(stage(tiles - 1) + KV_BYTES, v, v_row, p.N - n0);
  }
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();

  uint32_t q[Tile::STEPS][4];
  const auto load_queries = [&] {
#pragma unroll
    for (int step = 0; step < Tile::STEPS; ++step) {
      ldmatrix(q[step], shared_address(own_rows + Tile::at(lane & 15, 2 * step + (lane >> 4))));
    }
  };
  if constexpr (sizeof(T) == 2) load_queries();

  float o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {};
  const float scale_log2 = p.scale * 1.44269504f;
  const auto step = [&](auto masked, int tile) {
    constexpr bool MASKED = decltype(masked)::value;
    cp_async_wait<0>();
    __syncthreads();  // this tile is there for all, and nobody uses the other stage any more
    if (tile > 0) {
      k -= BLOCK_N * k_row;
      v -= BLOCK_N * v_row;
      load_tile<Tile, BLOCK_N, false>(stage(tile - 1), k, k_row);
      load_tile<Tile, BLOCK_N, false>(stage(tile - 1) + KV_BYTES, v, v_row);
      cp_async_commit();
    }
    if constexpr (sizeof(T) == 4) load_queries();  // registers are too few to keep their halves
    float s[BLOCK_N / 8][4];
    multiply_keys<T, Tile>(s, q, stage(tile));
    if constexpr (MASKED) {
      const int first = warp_m + lane / 4, n = tile * BLOCK_N;
      mask(s, visible(first) - n, visible(first + 8) - n);
    }
    float correction[2];
    softmax_step<MASKED>(s, correction, m, l, scale_log2);
    scale_rows(o, correction);
    if constexpr (sizeof(T) == 4) {
      multiply_values_fp32<Tile, D>(o, s, stage(tile) + KV_BYTES);
    } else {
      multiply_values<T, Tile, D>(o, s, stage(tile) + KV_BYTES);
    }
  };
  int tile = tiles - 1;
  for (; tile >= unmasked_tiles; --tile) step(std::true_type(), tile);
  for (; tile >= 0; --tile) step(std::false_type(), tile);

  float* lse = p.lse + (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.M + warp_m;
  softmax_end(o, m, l, p.scale, lse, p.M - warp_m);
  store_rows<T, Tile, D>(place<T>(p.o, p.o_stride, warp_m), p.o_stride[2] * sizeof(T), p.M - warp_m,
                         o, own_rows);
}

}  // namespace

#define FLASH_ENTRY(NAME, T, D)                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, 2)             \
      flash_fwd_##NAME##_d##D(const __grid_constant__ FlashParams p) { \
    flash_forward<T, D>(p);                                            \
  }

#define FLASH_ENTRIES(D)     \
  FLASH_ENTRY(bf16, bf16, D) \
  FLASH_ENTRY(fp16, fp16, D) \
  FLASH_ENTRY(fp32, float, D)

FLASH_ENTRIES(32)
FLASH_ENTRIES(64)
FLASH_ENTRIES(128)
