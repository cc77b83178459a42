// What the kernels of the embedding share: the sum of a token's rows, sinusoids, dropout, sums over
// a row, and what all tokens share in shared memory.
#pragma once

#include "dropout.cuh"
#include "embed_params.h"
#include "row_sum.cuh"
#include "vector.cuh"

namespace pyfuse::cuda {

/// The rows that a token takes. If an id is outside of its table, none is read, and its factor
/// makes the sum NaN.
template <typename T>
struct Sources {
  const T *token = nullptr, *position = nullptr, *segment = nullptr;
  uint64_t place = 0;
  float factor = 0.f;

  DEVICE Sources(const EmbedCall& p, int t) {
    if (t >= p.tokens) return;
    const int64_t own = element(p.token.ids, t);
    int64_t at = t % p.length, kind = 0;
    if (p.position.ids.data != nullptr) at = element(p.position.ids, at);
    if (p.segment.rows >= 0) kind = element(p.segment.ids, t);
    place = static_cast<uint64_t>(at);
    const bool known = has(p.token, own) && (p.position.rows < 0 || has(p.position, at)) &&
                       (p.segment.rows < 0 || has(p.segment, kind));
    factor = known ? p.scale : NAN;
    if (!known) return;
    token = row(p.token, own);
    if (p.position.rows >= 0) position = row(p.position, at);
    if (p.segment.rows >= 0) segment = row(p.segment, kind);
  }

  static DEVICE bool has(const EmbedTable& table, int64_t i) { return i >= 0 && i < table.rows; }
  static DEVICE const T* row(const EmbedTable& table, int64_t i) {
    return static_cast<const T*>(table.weight) + i * table.stride;
  }
};

/// sin and cos of place · turn, of which 2^64 are a whole turn: products wrap as angles do, so that
/// no position is too far. The first bits say which quarter of a turn is nearest.
DEVICE void sinusoid(float& sine, float& cosine, uint64_t place, uint64_t turn) {
  const uint64_t angle = place * turn;
  const int high = static_cast<int>(angle >> 32);
  const int quarter = ((high >> 29) + 1) >> 1;  // -2 to 2
  int rest = high & 0x3fffffff;
  rest -= rest >> 29 << 30;
  const float low = static_cast<float>(static_cast<uint32_t>(angle)) * 0x1p-32f;
  const float x =
      (static_cast<float>(rest) + low) * 1.4629180792671596e-09f;  // 2π 2^-32, |x| <= π/4
  const float square = x * x;
  // Of least greatest relative error, 4e-9 and 1e-10, before rounding.
  float s = (-1.9515217e-4f * square + 8.33216123e-3f) * square - 1.66666552e-1f;
  s = s * (square * x) + x;
  float c = (2.44330816e-5f * square - 1.38873153e-3f) * square + 4.16666456e-2f;
  c = c * (square * square) + (1.f - 0.5f * square);
  sine = quarter & 1 ? c : s;
  cosine = quarter & 1 ? s : c;
  if (quarter & 2) sine = -sine;
  if ((quarter + 1) & 2) cosine = -cosine;
}

/// The steps of the angles of V columns, each of its pairs' in two words; of one column, its
/// pair's.
template <int V>
struct Steps {
  static constexpr int WORDS = V == 1 ? 2 : V;
  using Shared = Planes<WORDS>;

  float words[WORDS];

  DEVICE void load(const uint64_t* turns, int column) {
#pragma unroll
    for (int i = 0; i < WORDS / 2; ++i) {
      const uint64_t turn = turns[column / 2 + i];
      words[2 * i] = __uint_as_float(static_cast<uint32_t>(turn));
      words[2 * i + 1] = __uint_as_float(static_cast<uint32_t>(turn >> 32));
    }
  }

  /// Add columns 0 1 2 3 ... of the encoding: sin a, cos a, sin a', cos a', ...
  DEVICE void add_to(float (&e)[V], uint64_t place, int column) const {
#pragma unroll
    for (int i = 0; i < WORDS / 2; ++i) {
      const uint64_t high = __float_as_uint(words[2 * i + 1]);
      float sine, cosine;
      sinusoid(sine, cosine, place, high << 32 | __float_as_uint(words[2 * i]));
      if constexpr (V == 1) {
        e[0] += column % 2 == 0 ? sine : cosine;
      } else {
        e[2 * i] += sine, e[2 * i + 1] += cosine;
      }
    }
  }
};

/// e = the sum of the V columns of a token's rows without the sinusoid.
template <typename T, int V>
DEVICE void sum_rows(float (&e)[V], const Sources<T>& rows, int column) {
  Vector<T, V> token, position, segment;
  if (rows.token != nullptr) token.load(rows.token + column);
  if (rows.position != nullptr) position.load(rows.position + column);
  if (rows.segment != nullptr) segment.load(rows.segment + column);
  float more[V];
  token.unpack(e);
#pragma unroll
  for (int i = 0; i < V; ++i) e[i] *= rows.factor;
  if (rows.position != nullptr) {
    position.unpack(more);
#pragma unroll
    for (int i = 0; i < V; ++i) e[i] += more[i];
  }
  if (rows.segment != nullptr) {
    segment.unpack(more);
#pragma unroll
    for (int i = 0; i < V; ++i) e[i] += more[i];
  }
}

template <int V>
DEVICE void store_floats(float* to, const float (&x)[V]) {
  Vector<float, V> v;
  v.pack_from(x);
  v.store(to);
}

/// Dropout of V columns of token t.
template <int V>
DEVICE void drop(float (&e)[V], const EmbedDropout& dropout, int t, int column) {
  if (dropout.threshold == 0) return;
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    const uint32_t quad = static_cast<uint32_t>(column + i) / 4;
    const uint4 four =
        philox({0, 0, static_cast<uint32_t>(t), quad}, dropout.key[0], dropout.key[1]);
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    if constexpr (V == 1) {
      const int which = column % 4;
      const uint32_t word = which == 0   ? four.x
                            : which == 1 ? four.y
                            : which == 2 ? four.z
                                         : four.w;
      e[0] = kept(word, dropout.threshold) ? e[0] * dropout.keep_scale : 0.f;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        e[i + j] = kept(words[j], dropout.threshold) ? e[i + j] * dropout.keep_scale : 0.f;
    }
  }
}

DEVICE float element_of(const EmbedVector& x, int i) {
  switch (x.dtype) {
    case 1:
      return to_float(static_cast<const bf16*>(x.data)[i]);
    case 2:
      return to_float(static_cast<const fp16*>(x.data)[i]);
    default:
      return static_cast<const float*>(x.data)[i];
  }
}

/// V columns of a parameter of the norm, where it is not in shared memory.
template <int V>
DEVICE void read_vector(float (&to)[V], const EmbedVector& x, int column) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = element_of(x, column + i);
}

/// What all tokens share, in shared memory: of `count` columns from `first` on the norm's weight
/// (vectors > 0) and bias (vectors > 1), and the steps of angles.
template <int V>
struct Common {
  using Parameters = Planes<V>;
  const Parameters weight, bias;
  const typename Steps<V>::Shared turns;

  DEVICE Common(float* shared, int vectors, int count)
      : weight(shared, count),
        bias(shared + Parameters::size(count), count),
        turns(shared + vectors * Parameters::size(count), (count + 1) / 2 * 2) {}

  DEVICE void fill(const EmbedCall& p, int vectors, int first, int count) const {
    for (int i = threadIdx.x; vectors > 0 && i < count; i += blockDim.x) {
      weight.at(i) = element_of(p.norm_weight, first + i);
      if (vectors > 1)
        bias.at(i) = p.norm_bias.data == nullptr ? 0.f : element_of(p.norm_bias, first + i);
    }
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(p.turns + first / 2);
    for (int i = threadIdx.x; p.turns != nullptr && i < (count + 1) / 2 * 2; i += blockDim.x)
      turns.at(i) = __uint_as_float(words[i]);
    __syncthreads();
  }

  /// Of the columns from first + i on.
  DEVICE Steps<V> steps(int i) const {
    Steps<V> found;
    turns.read(found.words, V == 1 ? i / 2 * 2 : i);
    return found;
  }
};

/// The threads of a block as those of rows: `size` of them to a row, next to each other.
struct RowThreads {
  const int size, row, index;
  RowSum<1> sums;

  DEVICE explicit RowThreads(int size)
      : size(size), row(threadIdx.x / size), index(threadIdx.x % size), sums(size) {}

  /// Σ over the threads of a row. All threads of the block call it.
  DEVICE float sum(float x) {
    float s[1] = {x};
    sums.add(s);
    return s[0];
  }
};

}  // namespace pyfuse::cuda
