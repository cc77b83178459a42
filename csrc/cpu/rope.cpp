// Rotary embedding. Threads take blocks of tokens; a token's angles are read once for all heads.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t block_elements = 16384;  // of x to a task; less than two tasks: one thread
constexpr int64_t tile = 16;               // tokens whose angles are held at a time,
constexpr int64_t chunk_pairs = 128;       // for this many pairs

// The angles of one token as the rotation wants them. half: one cos and sin for each pair;
// interleaved: each twice, the first of the two sines negated (the second for the inverse).
template <class C>
struct Angles {
  C cos_lane[2 * chunk_pairs], sin_lane[2 * chunk_pairs];
  const C *cos, *sin;
};

template <bool interleaved, class S, class C>
PYFUSE_INLINE void read_angles(const S* cos, const S* sin, int64_t pairs, bool inverse,
                               Angles<C>& angles) {
  angles.cos = angles.cos_lane;
  angles.sin = angles.sin_lane;
  if constexpr (interleaved) {
    for (int64_t i = 0; i < pairs; ++i) {
      angles.cos_lane[2 * i] = angles.cos_lane[2 * i + 1] = to_compute(cos[i]);
      angles.sin_lane[2 * i + !inverse] = to_compute(sin[i]);
      angles.sin_lane[2 * i + inverse] = -to_compute(sin[i]);
    }
  } else {
    for (int64_t i = 0; i < pairs; ++i) {
      angles.cos_lane[i] = to_compute(cos[i]);
      angles.sin_lane[i] = to_compute(sin[i]);
    }
  }
}
// A table of the computed type in this layout is used where it lies.
template <bool interleaved, class C>
PYFUSE_INLINE void use_or_read_angles(const C* cos, const C* sin, int64_t pairs, bool inverse,
                                      Angles<C>& angles) {
  if constexpr (interleaved) return read_angles<interleaved>(cos, sin, pairs, inverse, angles);
  angles.cos = cos;
  angles.sin = sin;
}
template <bool interleaved, class S, class C>
PYFUSE_INLINE void use_or_read_angles(const S* cos, const S* sin, int64_t pairs, bool inverse,
                                      Angles<C>& angles) {
  read_angles<interleaved>(cos, sin, pairs, inverse, angles);
}

// 1 0 3 2 ...
PYFUSE_INLINE vfloat swap_neighbours(vfloat v) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(__AVX2__)
  return (vfloat)_mm256_permute_ps((__m256)v, 0xb1);
#else
  return vfloat{v[1], v[0], v[3], v[2]};
#endif
}
PYFUSE_INLINE vdouble swap_neighbours(vdouble v) {
#if defined(__AVX512F__)
  return (vdouble)_mm512_permute_pd((__m512d)v, 0x55);
#elif defined(__AVX2__)
  return (vdouble)_mm256_permute_pd((__m256d)v, 0x5);
#else
  return vdouble{v[1], v[0]};
#endif
}

// The element i of a row with the one `distance` further; the inverse starts at the second and has
// a negative distance, for a rotation back is the rotation of the two exchanged. x and y may be the
// same: both of a pair are read before either is written.
template <class T>
PYFUSE_INLINE void rotate_halves(const T* x, T* y, int64_t distance, int64_t pairs,
                                 const compute_t<T>* cos, const compute_t<T>* sin) {
  constexpr int64_t w = width<T>;
  int64_t i = 0;
  for (; i + w <= pairs; i += w) {
    const vec_t<T> x1 = load(x + i), x2 = load(x + distance + i);
    const vec_t<T> c = load(cos + i), s = load(sin + i);
    store(y + i, x1 * c - x2 * s);
    store(y + distance + i, x2 * c + x1 * s);
  }
  const int64_t rest = pairs - i;
  if (rest > 0) {
    const vec_t<T> x1 = load(x + i, rest), x2 = load(x + distance + i, rest);
    const vec_t<T> c = load(cos + i, rest), s = load(sin + i, rest);
    store(y + i, x1 * c - x2 * s, rest);
    store(y + distance + i, x2 * c + x1 * s, rest);
  }
}

// x[2i] with x[2i + 1].
template <class T>
PYFUSE_INLINE void rotate_neighbours(const T* x, T* y, int64_t pairs, const compute_t<T>* cos,
                                     const compute_t<T>* sin) {
  constexpr int64_t w = width<T>;
  const int64_t n = 2 * pairs;
  int64_t i = 0;
  for (; i + w <= n; i += w) {
    const vec_t<T> v = load(x + i);
    store(y + i, v * load(cos + i) + swap_neighbours(v) * load(sin + i));
  }
  const int64_t rest = n - i;
  if (rest > 0) {
    const vec_t<T> v = load(x + i, rest);
    const vec_t<T> c = load(cos + i, rest), s = load(sin + i, rest);
    store(y + i, v * c + swap_neighbours(v) * s, rest);
  }
}

// Where a token's heads and its angles lie.
template <class T, class S>
struct Token {
  const T* x;
  T* y;
  const S *cos, *sin;
};

template <class T, class S>
PYFUSE_INLINE Token<T, S> find_token(const RopeParams& p, int64_t index) {
  const int64_t b = index / p.rows, m = index % p.rows;
  int64_t row = b * p.table_stride[0] + m * p.table_stride[1];
  if (p.positions != nullptr)
    row = p.table_stride[1] * p.positions[b * p.position_stride[0] + m * p.position_stride[1]];
  return {static_cast<const T*>(p.x) + b * p.x_stride[0] + m * p.x_stride[2],
          static_cast<T*>(p.y) + b * p.y_stride[0] + m * p.y_stride[2],
          static_cast<const S*>(p.cos) + row, static_cast<const S*>(p.sin) + row};
}

// visit(token, head) for all heads of `count` tokens, in the order in which x lies in memory: any
// other meets the caches' sets and the prefetchers at their worst.
template <class Visit>
PYFUSE_INLINE void in_memory_order(const RopeParams& p, int64_t count, const Visit& visit) {
  if (p.x_stride[1] > p.x_stride[2]) {
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t t = 0; t < count; ++t) visit(t, h);
  } else {
    for (int64_t t = 0; t < count; ++t)
      for (int64_t h = 0; h < p.heads; ++h) visit(t, h);
  }
}

template <class T, class S, bool interleaved>
void rotate_tile(const RopeParams& p, int64_t first_token, int64_t count) {
  const int64_t half = p.r / 2;
  const int64_t start = p.inverse ? half : 0, distance = p.inverse ? -half : half;
  Token<T, S> tokens[tile];
  Angles<compute_t<T>> angles[tile];
  for (int64_t t = 0; t < count; ++t) tokens[t] = find_token<T, S>(p, first_token + t);
  for (int64_t first = 0; first < half; first += chunk_pairs) {
    const int64_t pairs = half - first < chunk_pairs ? half - first : chunk_pairs;
    for (int64_t t = 0; t < count; ++t)
      use_or_read_angles<interleaved>(tokens[t].cos + first, tokens[t].sin + first, pairs,
                                      p.inverse, angles[t]);
    in_memory_order(p, count, [&](int64_t t, int64_t h) {
      const T* from = tokens[t].x + h * p.x_stride[1];
      T* to = tokens[t].y + h * p.y_stride[1];
      if constexpr (interleaved)
        rotate_neighbours(from + 2 * first, to + 2 * first, pairs, angles[t].cos, angles[t].sin);
      else
        rotate_halves(from + start + first, to + start + first, distance, pairs, angles[t].cos,
                      angles[t].sin);
    });
  }
  if (p.r < p.d && p.x != p.y)
    in_memory_order(p, count, [&](int64_t t, int64_t h) {
      memcpy(tokens[t].y + h * p.y_stride[1] + p.r, tokens[t].x + h * p.x_stride[1] + p.r,
             static_cast<size_t>(p.d - p.r) * sizeof(T));
    });
}

template <class T, class S, bool interleaved>
void rope_tokens(const RopeParams& p) {
  const int64_t tokens = p.batch * p.rows;
  const int64_t block = tile * (block_elements / (tile * p.heads * p.d) + 1);
  parallel_for((tokens + block - 1) / block, p.threads, [&](int64_t task, int) {
    const int64_t end = (task + 1) * block < tokens ? (task + 1) * block : tokens;
    for (int64_t t = task * block; t < end; t += tile)
      rotate_tile<T, S, interleaved>(p, t, end - t < tile ? end - t : tile);
  });
}

template <class T, class S>
void rope_layout(const RopeParams& p) {
  p.interleaved ? rope_tokens<T, S, true>(p) : rope_tokens<T, S, false>(p);
}

}  // namespace

// csrc/api/rope.cpp has checked that the tables are of x's dtype or float, and that nothing is
// empty.
void rope(const RopeParams& p) {
  const bool own = p.table_dtype == p.dtype;
  switch (p.dtype) {
    case DType::f32:
      return rope_layout<float, float>(p);
    case DType::f64:
      return own ? rope_layout<double, double>(p) : rope_layout<double, float>(p);
    case DType::bf16:
      return own ? rope_layout<bf16, bf16>(p) : rope_layout<bf16, float>(p);
    case DType::f16:
      return own ? rope_layout<f16, f16>(p) : rope_layout<f16, float>(p);
    default:
      bad_switch_value("dtype", static_cast<int>(p.dtype));
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
