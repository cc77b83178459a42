// Products of tiles on the tensor cores, from shared memory into registers.
//
// A warp multiplies 16 rows at a time. Of the result [16, 8 PARTS] a lane holds, with g = lane / 4
// and t = lane % 4, in part n: (g, 8n + 2t) (g, 8n + 2t + 1) (g + 8, 8n + 2t) (g + 8, 8n + 2t + 1).
// fp16 and bf16 multiply as they are; float32 as 3xTF32: x = high + low, each in tf32, and xy =
// low·high + high·low + high·high, which leaves an error of 2^-22. Tensor cores cut their sums off
// toward zero, so that a long chain of them drifts: in float32 each step is added outside, rounded
// to nearest. (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
// surpassing the FP32 theoretical peak performance", 2022)
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace pyfuse::cuda {

/// The left operand of an mma: 16 rows, 32 bytes of each; and its product with a right one.
template <typename T>
struct Operand {
  uint32_t x[4];

  Operand() = default;
  DEVICE explicit Operand(const uint32_t (&raw)[4]) : x{raw[0], raw[1], raw[2], raw[3]} {}
  DEVICE void multiply(float (&c)[4], uint32_t b0, uint32_t b1) const { mma(c, x, b0, b1, T()); }
};

DEVICE void split(uint32_t raw, uint32_t& high, uint32_t& low) {
  high = to_tf32_or_nan(__uint_as_float(raw));
  low = to_tf32(__uint_as_float(raw) - __uint_as_float(high));
}

template <>
struct Operand<float> {
  uint32_t high[4], low[4];

  Operand() = default;
  DEVICE explicit Operand(const uint32_t (&raw)[4]) {
    for (int i = 0; i < 4; ++i) split(raw[i], high[i], low[i]);
  }
  DEVICE void multiply(float (&c)[4], uint32_t b0, uint32_t b1) const {
    uint32_t b0_high, b0_low, b1_high, b1_low;
    split(b0, b0_high, b0_low);
    split(b1, b1_high, b1_low);
    float step[4] = {};
    mma(step, low, b0_high, b1_high, float());  // the small terms first: they round less
    mma(step, high, b0_low, b1_low, float());
    mma(step, high, b0_high, b1_high, float());
    for (int i = 0; i < 4; ++i) c[i] += step[i];
  }
};

/// Where a lane reads 16 rows of a tile for ldmatrix: lanes 0 to 15 the first 16 bytes of each row,
/// the others the next 16. Tiles start at multiples of 1024 bytes, so that one such address serves
/// them all: what lies between them is added last, as a constant.
template <class Tile>
DEVICE uint32_t lane_address(uint32_t shared) {
  const int lane = threadIdx.x % 32;
  return shared + Tile::at(lane % 16, lane / 16);
}

/// The same for tiles whose rows are columns of the result: lane 16i + 8j + r reads chunk j of row
/// 8i + r, so that words 2i and 2i + 1, a pair of registers, are one right operand.
template <class Tile>
DEVICE uint32_t lane_address_of_rows(uint32_t shared) {
  const int lane = threadIdx.x % 32;
  return shared + Tile::at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

/// The left operand of 16 rows, the step-th 32 bytes of each; `offset` bytes from `lane`.
template <typename T, class Tile>
DEVICE Operand<T> left_operand(uint32_t lane, int offset, int step) {
  uint32_t raw[4];
  ldmatrix(raw, Tile::ahead(lane, step) + offset);
  return Operand<T>(raw);
}

/// c [16 MT, 8 PARTS] += a bᵀ of one step, b being the rows of the tile `offset` bytes from `lane`
/// (of lane_address_of_rows).
template <typename T, class Tile, int MT, int PARTS>
DEVICE void multiply_rows(float (&c)[MT][PARTS][4], const Operand<T> (&a)[MT], uint32_t lane,
                          int offset, int step) {
  const uint32_t from = Tile::ahead(lane, step) + offset;
#pragma unroll
  for (int n = 0; n < PARTS / 2; ++n) {
    uint32_t b[4];
    ldmatrix(b, from + n * 16 * Tile::ROW);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      a[i].multiply(c[i][2 * n], b[0], b[1]);
      a[i].multiply(c[i][2 * n + 1], b[2], b[3]);
    }
  }
}

/// Which rows of a tile of up to 64 take part in a product: bit n of `bits` for row n. The others
/// may hold NaN, which a factor of 0 would not stop.
struct KeptRows {
  uint64_t bits;
  DEVICE bool operator[](int row) const { return bits >> row & 1; }
};
struct AllRows {};

/// c [16 MT, D] += a b for 16-bit elements, where a's columns (b's rows) are the parts that a
/// product left in registers: it leaves them in the very layout that a left operand has.
/// b [8 PARTS, D] is the tile `offset` bytes from `lane`.
template <typename T, class Tile, int MT, int PARTS, int OUT, class Kept>
DEVICE void multiply_columns(float (&c)[MT][OUT][4], const float (&a)[MT][PARTS][4], uint32_t lane,
                             int offset, const Kept& kept) {
#pragma unroll
  for (int j = 0; j < PARTS / 2; ++j) {
    Operand<T> left[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const auto &x = a[i][2 * j], &y = a[i][2 * j + 1];
      left[i] = Operand<T>({pack(x[0], x[1], T()), pack(x[2], x[3], T()), pack(y[0], y[1], T()),
                            pack(y[2], y[3], T())});
    }
    [[maybe_unused]] uint32_t mask[2] = {~0u, ~0u};
    if constexpr (!std::is_same_v<Kept, AllRows>) {
      const int row = 16 * j + threadIdx.x % 4 * 2;
      for (int i = 0; i < 2; ++i)
        mask[i] = (kept[row + 8 * i] ? 0xffffu : 0u) | (kept[row + 8 * i + 1] ? 0xffff0000u : 0u);
    }
#pragma unroll
    for (int n = 0; n < OUT / 2; ++n) {
      uint32_t b[4];
      ldmatrix_transposed(b, Tile::ahead(lane, n) + offset + j * 16 * Tile::ROW);
      if constexpr (!std::is_same_v<Kept, AllRows>) {
        for (int i = 0; i < 4; ++i) b[i] &= mask[i % 2];
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        left[i].multiply(c[i][2 * n], b[0], b[1]);
        left[i].multiply(c[i][2 * n + 1], b[2], b[3]);
      }
    }
  }
}

/// The same for float32, where a lane has columns 2t and 2t + 1 but the operand wants t and t + 4:
/// a sum may be taken in any order, so b's rows are read in that order. In the same way a lane
/// reads elements 2g and 2g + 1 of each 16 at once, for two mma: part n of c then holds, of columns
/// 16 (n / 2) + 4t + 0..3, the first and third (n even) or the others (n odd).
template <class Tile, int MT, int PARTS, int OUT, class Kept>
DEVICE void multiply_columns_f32(float (&c)[MT][OUT][4], const float (&a)[MT][PARTS][4],
                                 uint32_t shared, int offset, const Kept& kept) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint32_t even = shared + Tile::at(2 * t, g / 2) + g % 2 * 8;
  const uint32_t odd = shared + Tile::at(2 * t + 1, g / 2) + g % 2 * 8;
#pragma unroll
  for (int j = 0; j < PARTS; ++j) {
    Operand<float> left[MT];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const auto& x = a[i][j];
      left[i] = Operand<float>({__float_as_uint(x[0]), __float_as_uint(x[2]), __float_as_uint(x[1]),
                                __float_as_uint(x[3])});
    }
#pragma unroll
    for (int n = 0; n < OUT / 2; ++n) {
      uint2 x = load_shared8(Tile::ahead(even, 2 * n) + offset + j * 8 * Tile::ROW);
      uint2 y = load_shared8(Tile::ahead(odd, 2 * n) + offset + j * 8 * Tile::ROW);
      if constexpr (!std::is_same_v<Kept, AllRows>) {
        const int row = 8 * j + threadIdx.x % 4 * 2;
        if (!kept[row]) x = {0, 0};
        if (!kept[row + 1]) y = {0, 0};
      }
#pragma unroll
      for (int i = 0; i < MT; ++i) {
        left[i].multiply(c[i][2 * n], x.x, y.x);
        left[i].multiply(c[i][2 * n + 1], x.y, y.y);
      }
    }
  }
}

/// Put a product [16, D] (of float32 by multiply_columns_f32) into the rows of a tile from `row`
/// on, a multiple of 16. Of float32 a lane has 16 bytes together; lanes of odd rows write every
/// other 64 bytes first, so that no two of them want the same banks.
template <typename T, class Tile, int OUT>
DEVICE void store_product(char* tile, int row, const float (&c)[OUT][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int line = row + g + 8 * i;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int n = 0; n < OUT; ++n) {
        *reinterpret_cast<uint32_t*>(tile + Tile::at(line, n) + t * 4) =
            pack(c[n][2 * i], c[n][2 * i + 1], T());
      }
    } else {
#pragma unroll
      for (int n = 0; n < OUT; n += 2) {
        const bool odd = g & 1;
        const auto pick = [&](int part, int j) { return odd ? c[part ^ 2][j] : c[part][j]; };
        *reinterpret_cast<float4*>(tile + Tile::at(line, 2 * (odd ? n ^ 2 : n) + t)) = {
            pick(n, 2 * i), pick(n + 1, 2 * i), pick(n, 2 * i + 1), pick(n + 1, 2 * i + 1)};
      }
    }
  }
}

}  // namespace pyfuse::cuda
