// Rotary embedding, for sm_80 and later: each pair (x1, x2) of a token's heads is turned by the
// angles of the token's row of cos and sin,
//
//   y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin                     (Su et al., arXiv:2104.09864)
//
// or back, with a sign of -1. x [B, H, M, d], of whose d columns the first r are turned, and the
// others copied. One launch has one or two tensors, queries and keys, with the same angles.
//
// A warp has all heads of a token (where tokens are few, some; where heads are few, of several
// tokens): it reads the token's angles once, and turns as many heads as it has lanes for at a time.
// A lane has 16 bytes of a row (or two elements); the other half of its pairs comes from the lane
// that has it, so that rows are read and written without gaps wherever their halves begin.
//
// Compiled once for each ELEMENT (f32, bf16, f16).
#include "rope_params.h"
#include "vector.cuh"

namespace pyfuse::cuda {
namespace {

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;

/// Which token and heads a lane has.
struct Lane {
  int index, slot, chunk;  // of its head, which row's, and which part of the row
  int first_token, token;
  int first, last;  // heads of its warp, of those of both parts one after the other
  int head;         // the first of its own
  bool active;

  DEVICE explicit Lane(const RopeCall& p) {
    const int warp = blockIdx.x * WARPS + threadIdx.x / 32;
    index = threadIdx.x % 32;
    slot = index / p.lanes;
    chunk = index - slot * p.lanes;
    first_token = warp / p.splits * p.tokens_at;
    first = warp % p.splits * p.heads_each;
    last = first + p.heads_each;
    token = first_token + slot / p.heads_at;
    head = slot % p.heads_at;
    active = slot < p.heads_at * p.tokens_at && token < p.tokens;
  }
};

/// Where a token's angles begin in cos and sin; -1 where it has none.
DEVICE int64_t angles_of(const RopeCall& p, int token) {
  if (token >= p.tokens) return -1;
  const int64_t b = token / p.M, m = token % p.M;
  int64_t row = m;
  if (p.positions.data != nullptr) {
    row = element(p.positions, b * p.position_stride[0] + m * p.position_stride[1]);
    if (row < 0 || row >= p.table_rows) return -1;
  }
  return b * p.table_stride[0] + row * p.table_stride[1];
}

template <typename T>
DEVICE float angle(const void* table, bool f32, int64_t at) {
  return f32 ? static_cast<const float*>(table)[at] : to_float(static_cast<const T*>(table)[at]);
}

/// The part of a lane in one tensor: `step` elements further on is the next head that it has.
template <typename T>
struct Heads {
  const T* x;
  T* y;
  int64_t x_step, y_step;
  int begin, end;  // of the warp

  DEVICE Heads(const RopeCall& p, const RopePart& part, int before, const Lane& lane)
      : x_step(p.heads_at * part.x_stride[1]), y_step(p.heads_at * part.y_stride[1]) {
    begin = max(lane.first - before, 0);
    end = min(lane.last - before, part.heads);
    const int64_t b = lane.token / p.M, m = lane.token % p.M, h = begin + lane.head;
    x = static_cast<const T*>(part.x) + b * part.x_stride[0] + h * part.x_stride[1] +
        m * part.x_stride[2];
    y = static_cast<T*>(part.y) + b * part.y_stride[0] + h * part.y_stride[1] +
        m * part.y_stride[2];
  }
};

/// Whole rows in chunks of V elements, K to a lane.
template <typename T, int V, bool INTERLEAVED, int K>
struct Turn {
  static constexpr int P = INTERLEAVED ? V / 2 : V;  // pairs that a chunk takes part in
  static constexpr int AHEAD = 4 / K;                // heads that a lane has under way
  using Chunk = Vector<T, V>;
  using Angles = Planes<P>;
  static constexpr int MOST = 32 * K * V / 2;  // pairs of a warp's tokens
  static constexpr int SIZE = Angles::size(MOST);

  const RopeCall& p;
  const Lane lane;
  float c[K][P], s[K][P];
  bool turned[K], mine[K];     // of the chunks that this lane has
  int source[K], source_k[K];  // the lane, and which of its chunks, that has the other half

  DEVICE Turn(const RopeCall& p, float* shared) : p(p), lane(p) {
    const Angles cos(shared + threadIdx.x / 32 * 2 * SIZE, MOST), sin(cos.data + SIZE, MOST);
    stage(cos, sin);
    const int pairs = p.r / 2, half = pairs / V, at = lane.slot / p.heads_at * pairs;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int chunk = lane.chunk + 32 * k;
      turned[k] = lane.active && chunk * V < p.r;
      mine[k] = turned[k] || (lane.active && p.copy && chunk * V < p.d);
      const bool upper = !INTERLEAVED && chunk >= half;
      const int other = !turned[k] ? chunk : upper ? chunk - half : chunk + half;
      source[k] = lane.index - lane.chunk + other % 32, source_k[k] = other / 32;
      if (!turned[k]) continue;
      const int i = at + (upper ? chunk - half : chunk) * P;
      cos.read(c[k], i);
      sin.read(s[k], i);
#pragma unroll
      for (int j = 0; j < P; ++j) s[k][j] = !INTERLEAVED && !upper ? -s[k][j] : s[k][j];
    }
  }

  /// All angles of the warp's tokens, as float32, into shared memory.
  DEVICE void stage(const Angles& cos, const Angles& sin) const {
    const int pairs = p.r / 2;
    for (int i = 0; i < p.tokens_at; ++i) {
      const int64_t at = angles_of(p, lane.first_token + i);
      for (int j = lane.index; j < pairs; j += 32) {
        const int to = i * pairs + j;
        cos.at(to) = at < 0 ? NAN : angle<T>(p.cos, p.table_f32, at + j);
        sin.at(to) = at < 0 ? NAN : p.sign * angle<T>(p.sin, p.table_f32, at + j);
      }
    }
    __syncwarp();
  }

  DEVICE void run() const {
    turn(Heads<T>(p, p.part[0], 0, lane));
    if (p.part[1].heads > 0) turn(Heads<T>(p, p.part[1], p.part[0].heads, lane));
  }

  DEVICE void turn(Heads<T> at) const {
    for (int h = at.begin; h < at.end; h += AHEAD * p.heads_at) {
      Chunk x[AHEAD][K];
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        const bool some = h + a * p.heads_at + lane.head < at.end;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (some && mine[k]) x[a][k].load(at.x + (lane.chunk + 32 * k) * V);
        }
        at.x += at.x_step;
      }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a) {
        if (h + a * p.heads_at >= at.end) return;
        const bool some = h + a * p.heads_at + lane.head < at.end;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          Chunk y = turned_chunk(x[a], k);
          if (some && mine[k]) y.store(at.y + (lane.chunk + 32 * k) * V);
        }
        at.y += at.y_step;
      }
    }
  }

  DEVICE Chunk turned_chunk(const Chunk (&x)[K], int k) const {
    float own[V], y[V];
    x[k].unpack(own);
    if constexpr (INTERLEAVED) {
#pragma unroll
      for (int i = 0; i < P; ++i) {
        y[2 * i] = fmaf(own[2 * i], c[k][i], -__fmul_rn(own[2 * i + 1], s[k][i]));
        y[2 * i + 1] = fmaf(own[2 * i + 1], c[k][i], __fmul_rn(own[2 * i], s[k][i]));
      }
    } else {
      float other[V];
      other_half(x, k).unpack(other);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = fmaf(own[i], c[k][i], __fmul_rn(other[i], s[k][i]));
    }
    Chunk result = x[k];
    if (turned[k]) result.pack_from(y);
    return result;
  }

  DEVICE Chunk other_half(const Chunk (&x)[K], int k) const {
    Chunk other;
#pragma unroll
    for (int i = 0; i < Chunk::WORDS; ++i) {
      other.word(i) = __shfl_sync(~0u, x[0].word(i), source[k]);
      if constexpr (K > 1) {
        const uint32_t second = __shfl_sync(~0u, x[1].word(i), source[k]);
        if (source_k[k] != 0) other.word(i) = second;
      }
    }
    return other;
  }
};

/// Any sizes and strides, element by element.
template <typename T>
struct TurnElements {
  const RopeCall& p;
  const Lane lane;

  DEVICE explicit TurnElements(const RopeCall& p) : p(p), lane(p) {}

  DEVICE void run() const {
    if (!lane.active) return;
    const int64_t angles = angles_of(p, lane.token);
    const Heads<T> q(p, p.part[0], 0, lane), k(p, p.part[1], p.part[0].heads, lane);
    for (int i = lane.chunk; i < p.r / 2; i += p.lanes) {
      const float c = angles < 0 ? NAN : angle<T>(p.cos, p.table_f32, angles + i);
      const float s = angles < 0 ? NAN : p.sign * angle<T>(p.sin, p.table_f32, angles + i);
      turn(q, i, c, s);
      turn(k, i, c, s);
    }
    if (!p.copy) return;
    for (int i = p.r + lane.chunk; i < p.d; i += p.lanes) {
      copy(q, i);
      copy(k, i);
    }
  }

  DEVICE void turn(Heads<T> at, int pair, float c, float s) const {
    const int first = p.interleaved ? 2 * pair : pair, second = p.interleaved ? 1 : p.r / 2;
    at.x += first, at.y += first;
#pragma unroll 2
    for (int h = at.begin + lane.head; h < at.end; h += p.heads_at) {
      const float x1 = to_float(at.x[0]), x2 = to_float(at.x[second]);
      round_to(at.y[0], fmaf(x1, c, -__fmul_rn(x2, s)));
      round_to(at.y[second], fmaf(x2, c, __fmul_rn(x1, s)));
      at.x += at.x_step, at.y += at.y_step;
    }
  }

  DEVICE void copy(Heads<T> at, int column) const {
    for (int h = at.begin + lane.head; h < at.end; h += p.heads_at) {
      at.y[column] = at.x[column];
      at.x += at.x_step, at.y += at.y_step;
    }
  }
};

template <int V, bool INTERLEAVED, int K>
DEVICE void turn_rows(const RopeCall& p) {
  using Kernel = Turn<ELEMENT, V, INTERLEAVED, K>;
  __shared__ __align__(16) float shared[WARPS * 2 * Kernel::SIZE];
  Kernel(p, shared).run();
}

constexpr int V = 16 / sizeof(ELEMENT);

}  // namespace

/// Grid: as many warps as there are tokens, tokens_at of them at a time, and splits of each.
/// What a chunk is (here 16 bytes) divides where rows start, their halves, and what is not turned.
/// A row has 32 chunks at most.
extern "C" __global__ void __launch_bounds__(THREADS) half(const __grid_constant__ RopeCall p) {
  turn_rows<V, false, 1>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    interleaved(const __grid_constant__ RopeCall p) {
  turn_rows<V, true, 1>(p);
}

/// 64 chunks at most.
extern "C" __global__ void __launch_bounds__(THREADS)
    half_wide(const __grid_constant__ RopeCall p) {
  turn_rows<V, false, 2>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    interleaved_wide(const __grid_constant__ RopeCall p) {
  turn_rows<V, true, 2>(p);
}

/// 64 chunks of two elements at most: 20 of 80 columns are turned, say.
extern "C" __global__ void __launch_bounds__(THREADS, 8)
    half_pairs(const __grid_constant__ RopeCall p) {
  turn_rows<2, false, 2>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS, 8)
    interleaved_pairs(const __grid_constant__ RopeCall p) {
  turn_rows<2, true, 2>(p);
}

/// Everything else.
extern "C" __global__ void __launch_bounds__(THREADS) elements(const __grid_constant__ RopeCall p) {
  TurnElements<ELEMENT>(p).run();
}

}  // namespace pyfuse::cuda
