// A thread's part of a row, the ways of rows between memory and registers, z, and sums over a row.
//
// A row is shared by p.lanes threads. Of its columns a thread has N chunks of UNIT neighbours, what
// it moves in one access: 16 bytes of the widest tensor (UNIT 8: all rows are of 16-bit elements),
// or one element where rows begin anywhere. Neighbouring threads have neighbouring chunks, so every
// access of a warp is coalesced. What dtype a tensor has is asked at run time, once for a row:
// another compiled kernel for each mixture would save a branch.
#pragma once

#include "dropout.cuh"
#include "norm_params.h"

namespace pyfuse::cuda {

constexpr int FLOAT32 = 0, BFLOAT16 = 1;  // of NormRows::dtype

template <int UNIT>
struct Part {
  int lanes, lane, d;

  DEVICE explicit Part(const NormCall& p) : lanes(p.lanes), lane(threadIdx.x % p.lanes), d(p.d) {}

  DEVICE int column(int chunk) const { return (chunk * lanes + lane) * UNIT; }
  DEVICE bool has(int chunk) const { return column(chunk) < d; }
};

/// UNIT elements as they are in memory. UNIT 8 has no float32, the others any dtype.
template <int UNIT>
struct Raw {
  uint32_t word[UNIT == 1 ? 1 : 4];
};

/// Call f with a 0 of this dtype.
template <int UNIT, class F>
DEVICE void with_dtype(int dtype, F f) {
  if (UNIT < 8 && dtype == FLOAT32) {
    f(0.0f);
  } else if (dtype == BFLOAT16) {
    f(bf16());
  } else {
    f(fp16());
  }
}

DEVICE void unpack(float& first, float& second, uint32_t word, bf16) {
  first = __uint_as_float(word << 16), second = __uint_as_float(word & 0xffff0000u);
}
DEVICE void unpack(float& first, float& second, uint32_t word, fp16) {
  const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
  first = pair.x, second = pair.y;
}

DEVICE float rounded(float x, float) { return x; }
DEVICE float rounded(float x, bf16) { return __bfloat162float(__float2bfloat16_rn(x)); }
DEVICE float rounded(float x, fp16) { return __half2float(__float2half_rn(x)); }

template <int UNIT, typename T>
DEVICE void unpack(float (&v)[UNIT], const Raw<UNIT>& raw, T) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < UNIT && i < 4; ++i) v[i] = __uint_as_float(raw.word[i]);
  } else if constexpr (UNIT == 1) {
    float beside;
    unpack(v[0], beside, raw.word[0], T());
  } else {
#pragma unroll
    for (int i = 0; i < UNIT; i += 2) unpack(v[i], v[i + 1], raw.word[i / 2], T());
  }
}

/// UNIT elements of T at an address that is a multiple of as many bytes, or of 16.
template <int UNIT, typename T>
DEVICE void load_unit(Raw<UNIT>& raw, const T* from) {
  constexpr int BYTES = UNIT * sizeof(T);
  if constexpr (BYTES == 2) {
    raw.word[0] = *reinterpret_cast<const uint16_t*>(from);
  } else if constexpr (BYTES == 4) {
    raw.word[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (BYTES == 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    raw.word[0] = x.x, raw.word[1] = x.y;
  } else {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    raw.word[0] = x.x, raw.word[1] = x.y, raw.word[2] = x.z, raw.word[3] = x.w;
  }
}

/// To global memory. As an assignment the compiler may take a vector apart.
template <int UNIT, typename T>
DEVICE void store_unit(T* to, const float (&v)[UNIT]) {
  if constexpr (UNIT == 1) {
    *to = T(v[0]);
  } else if constexpr (sizeof(T) == 4) {
    __stwb(reinterpret_cast<float4*>(to), {v[0], v[1], v[2], v[3]});
  } else if constexpr (UNIT == 4) {
    __stwb(reinterpret_cast<uint2*>(to), {pack(v[0], v[1], T()), pack(v[2], v[3], T())});
  } else {
    __stwb(reinterpret_cast<uint4*>(to), {pack(v[0], v[1], T()), pack(v[2], v[3], T()),
                                          pack(v[4], v[5], T()), pack(v[6], v[7], T())});
  }
}

/// This thread's chunks of a row, from chunk `first` on. Those beyond column d are left as they
/// are: zeros, where the caller has set them so once.
template <int UNIT, int N>
DEVICE void fetch(Raw<UNIT> (&raw)[N], const NormRows& t, int64_t row, const Part<UNIT>& part,
                  int first = 0) {
  with_dtype<UNIT>(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(t.data) + row * t.stride;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      if (part.has(first + c)) load_unit<UNIT>(raw[c], from + part.column(first + c));
    }
  });
}

template <int UNIT, int N>
DEVICE void unpack(float (&v)[N][UNIT], const Raw<UNIT> (&raw)[N], int dtype) {
  with_dtype<UNIT>(dtype, [&](auto zero) {
#pragma unroll
    for (int c = 0; c < N; ++c) unpack<UNIT>(v[c], raw[c], zero);
  });
}

/// Write this thread's chunks of a row, rounded to the tensor's dtype.
template <int UNIT, int N>
DEVICE void write(const NormRows& t, int64_t row, const float (&v)[N][UNIT], const Part<UNIT>& part,
                  int first = 0) {
  with_dtype<UNIT>(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(t.data) + row * t.stride;
#pragma unroll
    for (int c = 0; c < N; ++c) {
      if (part.has(first + c)) store_unit<UNIT>(to + part.column(first + c), v[c]);
    }
  });
}

/// This thread's columns of a parameter; `none` where there is no such parameter.
template <int UNIT, int N>
DEVICE void read(float (&v)[N][UNIT], const NormVector& t, float none, const Part<UNIT>& part,
                 int first = 0) {
#pragma unroll
  for (int c = 0; c < N; ++c) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) v[c][i] = none;
  }
  if (t.data == nullptr) return;
  // float32 beside rows of 16-bit elements: two accesses of 16 bytes.
  constexpr int PIECE = UNIT == 8 ? 4 : UNIT;
  with_dtype<PIECE>(t.dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int WIDTH = sizeof(T) == 4 ? PIECE : UNIT;
    const T* from = static_cast<const T*>(t.data);
#pragma unroll
    for (int c = 0; c < N; ++c) {
      if (!part.has(first + c)) continue;
#pragma unroll
      for (int i = 0; i < UNIT; i += WIDTH) {
        Raw<WIDTH> raw;
        float piece[WIDTH];
        load_unit<WIDTH>(raw, from + part.column(first + c) + i);
        unpack<WIDTH>(piece, raw, zero);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) v[c][i + j] = piece[j];
      }
    }
  });
}

/// Words for chunks `first` to first + 3 of one column each, of a row whose lanes are a multiple of
/// four: four neighbours share a counter. Each computes one of the four, and they exchange.
DEVICE void swap_words(uint32_t (&w)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i | step], step);
      if (upper) {
        w[i] = got;
      } else {
        w[i | step] = got;
      }
    }
  }
}

/// Dropout of a row's chunks, counted by (0, 0, row, column).
template <int UNIT, int N>
DEVICE void drop(float (&v)[N][UNIT], const NormCall& p, int64_t row, const Part<UNIT>& part,
                 int first = 0) {
  const auto words = [&](int column) {
    return philox({0, 0, static_cast<uint32_t>(row), static_cast<uint32_t>(column) / 4}, p.key[0],
                  p.key[1]);
  };
  constexpr int TOGETHER = UNIT == 1 ? 4 : 1;  // chunks
  static_assert(N % TOGETHER == 0);
#pragma unroll
  for (int c = 0; c < N; c += TOGETHER) {
#pragma unroll
    for (int i = 0; i < UNIT; i += 4) {
      const int own = UNIT == 1 ? threadIdx.x % 4 : 0;
      const uint4 drawn = words(part.column(first + c + own) + i);
      uint32_t w[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
      if constexpr (UNIT == 1) swap_words(w);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = UNIT == 1 ? v[(c + j) % N][0] : v[c][(i + j) % UNIT];
        // Not fused with a sum that follows: eager rounds here.
        x = kept(w[j], p.threshold) ? __fmul_rn(x, p.keep_scale) : 0.0f;
      }
    }
  }
}

template <int UNIT, int N, class F>
DEVICE void for_each(float (&v)[N][UNIT], F f) {
#pragma unroll
  for (int c = 0; c < N; ++c) {
#pragma unroll
    for (int i = 0; i < UNIT; ++i) v[c][i] = f(v[c][i], c, i);
  }
}

/// z = dropout(x) + residual rounded to its dtype. x and residual: what fetch() found.
template <int UNIT, int N>
DEVICE void make_z(float (&z)[N][UNIT], const NormCall& p, const Raw<UNIT> (&x)[N],
                   const Raw<UNIT> (&residual)[N], bool dropped, int64_t row,
                   const Part<UNIT>& part, int first = 0) {
  unpack<UNIT, N>(z, x, p.x.dtype);
  if (dropped) drop<UNIT, N>(z, p, row, part, first);
  const bool added = p.residual.data != nullptr;
  if (!added && !dropped) return;
  with_dtype<UNIT>(added ? p.residual.dtype : p.x.dtype, [&](auto zero) {
    if (added) {
#pragma unroll
      for (int c = 0; c < N; ++c) {
        float r[UNIT];
        unpack<UNIT>(r, residual[c], zero);
#pragma unroll
        for (int i = 0; i < UNIT; ++i) z[c][i] += r[i];
      }
    }
    for_each<UNIT, N>(z, [&](float x, int, int) { return rounded(x, zero); });
  });
}

}  // namespace pyfuse::cuda
