// Neighbouring elements of a row that a lane reads and writes at once, up to 16 bytes; and rows of
// numbers in shared memory, from which lanes read their neighbours without conflicts.
#pragma once

#include "integers.cuh"
#include "planes.h"
#include "primitives.cuh"

namespace pyfuse::cuda {

template <int BYTES>
struct Raw;
template <>
struct Raw<2> {
  using type = uint16_t;
};
template <>
struct Raw<4> {
  using type = uint32_t;
};
template <>
struct Raw<8> {
  using type = uint2;
};
template <>
struct Raw<16> {
  using type = uint4;
};

DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE float to_float(fp16 x) { return __half2float(x); }
DEVICE float to_float(float x) { return x; }

DEVICE void round_to(bf16& to, float x) { to = __float2bfloat16_rn(x); }
DEVICE void round_to(fp16& to, float x) { to = __float2half_rn(x); }
DEVICE void round_to(float& to, float x) { to = x; }

/// V elements, as they lie in memory; their address is a multiple of their size.
template <typename T, int V>
struct Vector {
  static constexpr int BYTES = V * sizeof(T), WORDS = BYTES < 4 ? 1 : BYTES / 4;
  using Bits = typename Raw<BYTES>::type;
  Bits bits = {};

  DEVICE void load(const T* from) { bits = *reinterpret_cast<const Bits*>(from); }
  /// By name, since an assignment is compiled to V stores where the elements are floats.
  DEVICE void store(T* to) const { __stwb(reinterpret_cast<Bits*>(to), bits); }

  DEVICE uint32_t& word(int i) { return reinterpret_cast<uint32_t*>(&bits)[i]; }
  DEVICE uint32_t word(int i) const { return reinterpret_cast<const uint32_t*>(&bits)[i]; }

  DEVICE void unpack(float (&x)[V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = to_float(reinterpret_cast<const T*>(&bits)[i]);
  }

  DEVICE void pack_from(const float (&x)[V]) {
    if constexpr (sizeof(T) == 2 && V > 1) {
#pragma unroll
      for (int i = 0; i < V / 2; ++i) word(i) = pack(x[2 * i], x[2 * i + 1], T());
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) round_to(reinterpret_cast<T*>(&bits)[i], x[i]);
    }
  }
};

/// Floats in shared memory, of which lanes read P neighbours each, in accesses of 16 bytes at most.
/// With two of them for a lane the first ones and the second ones lie apart: then neither the lanes
/// that read, one after another, nor those that write a float each meet in a bank.
template <int P>
struct Planes {
  static constexpr int PARTS = P > 4 ? P / 4 : 1, EACH = P / PARTS;
  static_assert(P <= 8);

  float* data;
  int plane;  // floats of a part

  DEVICE Planes(float* data, int count) : data(data), plane(size(count) / PARTS) {}

  /// How many floats `count` of them take.
  static DEVICE constexpr int size(int count) { return planes_size(P, count); }

  DEVICE float& at(int i) const {
    return data[PARTS == 1 ? i : i % P / EACH * plane + i / P * EACH + i % EACH];
  }

  /// The P floats from i on, a multiple of P.
  DEVICE void read(float (&to)[P], int i) const {
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
      Vector<float, EACH> v;
      v.load(data + part * plane + i / PARTS);
      float x[EACH];
      v.unpack(x);
#pragma unroll
      for (int j = 0; j < EACH; ++j) to[part * EACH + j] = x[j];
    }
  }
};

}  // namespace pyfuse::cuda
