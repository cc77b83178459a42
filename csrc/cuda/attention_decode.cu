// Attention of few queries over a cache on mma.sync, for sm_80 and later: the keys of a head are
// shared out between blocks, those of a share between the warps of a block.
//
//   o[r] = sum_n softmax_n(s[r, n]) v[n],   s as in mask.cuh;   row r is query r / G of head r % G
//
// (Flash-Decoding: Dao, Haziza, Massa, Sizov, 2023.) All G query heads of a key head and all M
// queries are rows of one tile, so that they use together what is read once. A warp streams 16 keys
// at a time, and their values, through a ring in shared memory that is its own: nobody waits for
// another warp before all are through. Lane i of a warp knows where key i lies, in the cache, in
// one of its pages or among what is new, and lane 16 + i where its value lies.
//
// Which keys a warp takes depends on nothing but the sequence, and every sum of a row has its own
// rows' numbers alone in it: the tile that a query is in, and its neighbours there, change no bit.
//
// Compiled once for each ELEMENT (f32, bf16, f16) and HEAD_SIZE, the largest that D and Dv may
// have: columns beyond them are zeros; with TILES_OF_32 where the sums of so many rows fit the
// registers.
#include "decode.cuh"
#include "product.cuh"
#include "softmax.cuh"

namespace pyfuse::cuda {
namespace {

constexpr DecodeRing RING(sizeof(ELEMENT), HEAD_SIZE);
constexpr int WARPS = RING.warps, THREADS = 32 * WARPS;

/// The cache of one head as one of its lanes sees it: keys (lanes 0 to 15) or values.
template <typename T>
struct Cache {
  char *cached, *given;                        // the first row in the cache and of what is new
  int64_t page_bytes, row_bytes, given_bytes;  // from page to page, from row to row
  Integers table;
  int64_t entry, entry_step;  // of the sequence's first page in the table, and from page to page
  int page_size, page_bits, shift;  // shift: the first key that is new

  DEVICE Cache(const AttentionDecode& p, int64_t b, int hk, int length, bool keys)
      : table(p.table),
        entry(b * p.table_stride[0]),
        entry_step(p.table_stride[1]),
        page_size(p.page_size),
        page_bits(p.page_bits),
        shift(p.k_new != nullptr ? length - p.M : length) {
    const auto& stride = keys ? p.k_stride : p.v_stride;
    const auto& new_stride = keys ? p.k_new_stride : p.v_new_stride;
    const int64_t size = sizeof(T);
    page_bytes = stride[0] * size, row_bytes = stride[2] * size;
    given_bytes = new_stride[2] * size;
    cached = static_cast<char*>(const_cast<void*>(keys ? p.k : p.v)) + hk * stride[1] * size;
    if (table.data == nullptr) cached += b * page_bytes;
    given = static_cast<char*>(const_cast<void*>(keys ? p.k_new : p.v_new));
    if (given != nullptr) given += (b * new_stride[0] + hk * new_stride[1]) * size;
  }

  DEVICE int page_index(int n) const { return page_bits >= 0 ? n >> page_bits : n / page_size; }
  DEVICE int64_t page_of(int n) const {
    return table.data == nullptr ? 0 : element(table, entry + page_index(n) * entry_step);
  }
  /// Where key n is, or is to be, in the cache.
  DEVICE char* row(int n, int64_t page) const {
    const int before = table.data == nullptr ? 0 : page_index(n) * page_size;
    return cached + page * page_bytes + (n - before) * row_bytes;
  }
};

/// Write what is new of one head into its cache, by all threads of a block.
template <typename T>
DEVICE void append(const AttentionDecode& p, int64_t b, int hk, int length) {
  for (const bool keys : {true, false}) {
    const Cache<T> cache(p, b, hk, length, keys);
    const int elements = keys ? p.d : p.dv;
    const int pieces = p.aligned ? elements * int(sizeof(T)) / 16 : elements;
    for (int64_t i = threadIdx.x; i < int64_t(p.M) * pieces; i += THREADS) {
      const int m = static_cast<int>(i / pieces), c = static_cast<int>(i % pieces);
      const int n = cache.shift + m;
      if (n < 0 || n >= p.N) continue;
      char* const to = cache.row(n, cache.page_of(n));
      const char* const from = cache.given + m * cache.given_bytes;
      if (p.aligned) {
        reinterpret_cast<uint4*>(to)[c] = reinterpret_cast<const uint4*>(from)[c];
      } else {
        reinterpret_cast<T*>(to)[c] = reinterpret_cast<const T*>(from)[c];
      }
    }
  }
}

template <typename T, int D, int MT>
struct Decode {
  static constexpr int ROWS = 16 * MT, OUT = D / 8, STEPS = D * sizeof(T) / 32;
  static constexpr int STRIDE = 16 * WARPS;  // keys from step to step of a warp
  static constexpr int RING_BYTES = RING.warp_bytes(), SLOTS = RING.slots;
  static constexpr bool KEEP_QUERIES = sizeof(T) == 2 && MT * D <= 128;
  using Keys = Tile<T, D, 16>;
  using Queries = Tile<T, D, ROWS>;
  using Copy = Copier<Keys, 32>;
  static_assert(Keys::BYTES == RING.slot && RING_BYTES >= ROWS * D * 4);

  const AttentionDecode& p;
  char* const shared;
  const int warp, lane;
  char* const ring;
  const uint32_t ring_address;
  const int hk, b, r0, rows;  // rows: of all tiles
  const Band band;
  const Cache<T> cache;
  int low, high;               // the keys of this block
  int inside, past;            // those of [inside, past) are seen by all rows
  int next;                    // the first key of the step whose keys are copied next
  int64_t page = 0;            // of this lane's key there
  const char* from = nullptr;  // this lane's row in the step whose keys were copied last
  int filled = 0, used = 0;    // the slots of the next keys to copy and to use, in bytes

  int first[MT][2], last[MT][2], place[MT][2];  // of this lane's rows: see Band
  float slope[MT][2];
  float o[MT][OUT][4] = {};
  Softmax<MT> softmax;
  Operand<T> kept_queries[KEEP_QUERIES ? STEPS : 1][MT];

  DEVICE Decode(const AttentionDecode& p, char* shared, int hk, int b, int r0)
      : p(p),
        shared(shared),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        ring(shared + warp * RING_BYTES),
        ring_address(shared_address(ring)),
        hk(hk),
        b(b),
        r0(r0),
        rows(p.M * p.group),
        band(band_in_cache(p, b)),
        cache(p, b, hk, band.N, lane < 16) {
    const int m0 = r0 / p.group, m1 = (min(r0 + ROWS, rows) - 1) / p.group;
    const Shares shares(band, p.splits);
    const int begin = shares.low + blockIdx.y * shares.size;
    high = min(begin + shares.size, band.last(m1));
    low = max(begin, band.first(m0));
    inside = band.first(m1), past = band.last(m0);
    next = low / STRIDE * STRIDE + 16 * warp;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int r = min(r0 + 16 * i + 8 * j + lane / 4, rows - 1), m = r / p.group;
        first[i][j] = band.first(m), last[i][j] = band.last(m), place[i][j] = band.place(m);
        slope[i][j] = p.slopes == nullptr ? 0.0f : p.slopes[hk * p.group + r % p.group] * LOG2E;
      }
    }
  }

  DEVICE char* query_tile() const { return shared + WARPS * RING_BYTES; }
  /// (maximum, sum of weights) of each row, those of one warp after another's.
  DEVICE float2* sums() const { return reinterpret_cast<float2*>(query_tile() + Queries::BYTES); }

  // Copying
  // ----------------------------------------------------------------------------------------

  DEVICE bool there(int n) const { return n >= low && n < high; }

  /// Ask the table for the page of this lane's key of the next step.
  DEVICE void look_up() {
    const int n = next + lane % 16;
    if (there(n) && n < cache.shift) page = cache.page_of(n);
  }

  /// Start copying 16 rows into a slot: of keys, whose places lanes 0 to 15 know, or of values.
  DEVICE void copy(int slot, int n, bool keys) const {
    const int elements = keys ? p.d : p.dv, source = keys ? 0 : 16;
    if (p.aligned) {
#pragma unroll
      for (int i = 0; i < 16; i += Copy::LOADED) {
        const int row = i + Copy::row();
        const char* const x = other_lane(source + row) + Copy::chunk() * 16;
#pragma unroll
        for (int c = 0; c < Keys::ROW_CHUNKS; c += Copy::ACROSS) {
          if ((c + Copy::chunk()) * 16 < elements * int(sizeof(T)))
            cp_async_or_zero(ring_address + slot + Keys::at(row, c + Copy::chunk()), x + c * 16,
                             there(n + row));
        }
      }
      return;
    }
    for (int row = 0; row < 16; ++row) {
      const auto* const x = reinterpret_cast<const T*>(other_lane(source + row));
      for (int d = lane; d < elements; d += 32) {
        char* const to = ring + slot + Keys::at(row, d / Keys::PER_CHUNK);
        reinterpret_cast<T*>(to)[d % Keys::PER_CHUNK] = there(n + row) ? x[d] : T(0.0f);
      }
    }
  }

  DEVICE const char* other_lane(int lane) const {
    return reinterpret_cast<const char*>(
        __shfl_sync(~0u, reinterpret_cast<unsigned long long>(from), lane));
  }

  DEVICE void copy_keys() {
    if (next < high) {
      const int n = next + lane % 16;
      from = static_cast<const char*>(p.q);  // of what is not there nothing is read
      if (there(n))
        from = n >= cache.shift ? cache.given + (n - cache.shift) * cache.given_bytes
                                : cache.row(n, page);
      copy(filled, next, true);
      next += STRIDE;
      look_up();
    } else {
      next = high + STRIDE;  // so that its values are not copied either
    }
    cp_async_commit();
  }

  /// The values of the keys that were copied last.
  DEVICE void copy_values() {
    if (next < high + STRIDE) copy(filled + RING.slot, next - STRIDE, false);
    filled = after(filled);
    cp_async_commit();
  }

  static DEVICE int after(int slot) {
    return slot + 2 * RING.slot == RING_BYTES ? 0 : slot + 2 * RING.slot;
  }

  DEVICE void load_queries() {
    using Copy = Copier<Queries, THREADS>;
    for (int r = Copy::row(); r < ROWS; r += Copy::LOADED) {
      const int row = min(r0 + r, rows - 1);
      const T* const q = static_cast<const T*>(p.q) + b * p.q_stride[0] +
                         (hk * p.group + row % p.group) * p.q_stride[1] +
                         row / p.group * p.q_stride[2];
      for (int c = Copy::chunk(); c < Queries::ROW_CHUNKS; c += Copy::ACROSS) {
        char* const to = query_tile() + Queries::at(r, c);
        const int d = c * Queries::PER_CHUNK;
        if (p.aligned) {
          if (d < p.d) cp_async_or_zero(shared_address(to), q + d, r0 + r < rows);
        } else {
          for (int j = 0; j < Queries::PER_CHUNK && d + j < p.d; ++j)
            reinterpret_cast<T*>(to)[j] = r0 + r < rows ? q[d + j] : T(0.0f);
        }
      }
    }
    cp_async_commit();
  }

  DEVICE void clear_padding() {
    if (p.d < D) Copier<Queries, THREADS>::template clear_padding<T, ROWS>(query_tile(), p.d);
    for (int i = 0; i < WARPS * SLOTS; ++i) {
      const int elements = i % 2 == 0 ? p.d : p.dv;
      if (elements < D)
        Copier<Keys, THREADS>::template clear_padding<T, 16>(shared + i * RING.slot, elements);
    }
  }

  // One step
  // ---------------------------------------------------------------------------------------

  DEVICE void multiply_queries(float (&s)[MT][2][4], int slot) const {
    const uint32_t keys = lane_address_of_rows<Keys>(ring_address);
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      if constexpr (KEEP_QUERIES) {
        multiply_rows<T, Keys>(s, kept_queries[i], keys, slot, i);
      } else {
        Operand<T> q[MT];
        read_queries(q, i);
        multiply_rows<T, Keys>(s, q, keys, slot, i);
      }
    }
  }

  DEVICE void read_queries(Operand<T> (&q)[MT], int step) const {
    const uint32_t from = lane_address<Queries>(shared_address(query_tile()));
#pragma unroll
    for (int i = 0; i < MT; ++i) q[i] = left_operand<T, Queries>(from, i * 16 * Queries::ROW, step);
  }

  /// f(score, its key's distance from n, i, j) for each score of the rows [i][j].
  template <class F>
  DEVICE void each(float (&s)[MT][2][4], F f) const {
    const int column = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        for (int j = 0; j < 4; ++j) f(s[i][part][j], column + 8 * part + j % 2, i, j / 2);
      }
    }
  }

  DEVICE void score(float (&s)[MT][2][4], int n) const {
    if (p.fold) return;
    each(s, [&](float& x, int, int, int) { x *= p.scale; });
    if (p.softcap != 0.0f)
      each(s, [&](float& x, int, int, int) { x = tanh_accurate(x) * p.softcap; });
    if (p.slopes != nullptr) {
      each(s, [&](float& x, int key, int i, int j) {
        x -= slope[i][j] * fabsf(float(place[i][j] - n - key));
      });
    }
  }

  /// Hide what rows do not see. Where values are not finite, a weight of 0 would not stop them:
  /// they become zeros, and the scores of those who see them NaN.
  DEVICE void hide(float (&s)[MT][2][4], int n, int values) const {
    char* const row = ring + values;
    const int r = lane % 16;
    bool bad = false;
    for (int c = lane / 16; c < Keys::ROW_CHUNKS; c += 2)
      bad |= !all_finite(*reinterpret_cast<const uint4*>(row + Keys::at(r, c)), T());
    uint32_t spoilt = __ballot_sync(~0u, bad);
    spoilt = (spoilt | spoilt >> 16) & 0xffffu;
    if (spoilt != 0) {
      for (int c = lane / 16; c < Keys::ROW_CHUNKS; c += 2) {
        if (spoilt >> r & 1) *reinterpret_cast<uint4*>(row + Keys::at(r, c)) = uint4{};
      }
      __syncwarp();
    }
    each(s, [&](float& x, int key, int i, int j) {
      if (spoilt >> key & 1) x = NAN;
      if (n + key < first[i][j] || n + key >= last[i][j]) x = -INFINITY;
    });
  }

  /// Fold 16 keys from n on, and their values, into the sums.
  DEVICE void step(int n) {
    float s[MT][2][4] = {};
    cp_async_wait<SLOTS - 2>();
    __syncwarp();  // the keys are there for all lanes, and none reads the values before them
    copy_values();
    multiply_queries(s, used);
    score(s, n);
    cp_async_wait<SLOTS - 2>();
    __syncwarp();  // the values are there, and no lane reads the keys any more
    copy_keys();
    const int values = used + RING.slot;
    if (n < inside || n + 16 > past || n + 16 > high) hide(s, n, values);
    softmax.step(s, o, p.fold ? p.scale : 1.0f);
    if constexpr (sizeof(T) == 4) {
      multiply_columns_f32<Keys>(o, s, ring_address, values, AllRows());
    } else {
      multiply_columns<T, Keys>(o, s, lane_address<Keys>(ring_address), values, AllRows());
    }
    used = after(used);
  }

  // The warps' sums
  // --------------------------------------------------------------------------------

  /// The byte of a row of sums in shared memory where four columns start. Rows that a warp writes
  /// together lie in different banks.
  static DEVICE int at(int row, int column) {
    return row * D * 4 + ((column * 4) ^ (sizeof(T) == 2 ? (row & 3) << 5 : (row & 1) << 6));
  }

  /// Leave this warp's sums in its ring.
  DEVICE void leave() const {
    const int g = lane / 4, t = lane % 4;
    __syncwarp();  // no lane reads values any more
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      for (int j = 0; j < 2; ++j) {
        const int row = 16 * i + 8 * j + g;
        const float l = over_row(softmax.l[i][j], [](float x, float y) { return x + y; });
        if (t == 0) sums()[warp * ROWS + row] = {l == 0.0f ? -INFINITY : softmax.pivot[i][j], l};
#pragma unroll
        for (int n = 0; n < OUT; n += sizeof(T) / 2) {
          const float x = o[i][n][2 * j], y = o[i][n][2 * j + 1];
          if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<float2*>(ring + at(row, 8 * n + 2 * t)) = {x, y};
          } else {
            *reinterpret_cast<float4*>(ring + at(row, 8 * n + 4 * t)) = {x, o[i][n + 1][2 * j], y,
                                                                         o[i][n + 1][2 * j + 1]};
          }
        }
      }
    }
  }

  /// Add up what the warps left, and write o, or the share's part of it.
  DEVICE void merge_warps() const {
    const int columns = (p.dv + 3) / 4 * 4;
    for (int i = threadIdx.x; i < min(ROWS, rows - r0) * (D / 4); i += THREADS) {
      const int row = i / (D / 4), column = i % (D / 4) * 4;
      if (column >= columns) continue;
      float top = -INFINITY, l = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) top = fmaxf(top, sums()[w * ROWS + row].x);
      float4 sum{};
#pragma unroll
      for (int w = 0; w < WARPS; ++w) {
        const float2 of = sums()[w * ROWS + row];
        const float weight = weight_of(of.x, top);
        l = fmaf(of.y, weight, l);
        add_scaled(sum, *reinterpret_cast<const float4*>(shared + w * RING_BYTES + at(row, column)),
                   weight);
      }
      write(r0 + row, column, columns, top, l, sum);
    }
  }

  DEVICE void write(int r, int column, int columns, float top, float l, float4 sum) const {
    const int m = r / p.group, h = hk * p.group + r % p.group;
    const int64_t row = (int64_t(b) * p.heads + h) * p.M + m;
    if (p.partial != nullptr) {
      const int64_t share = row * p.splits + blockIdx.y;
      const int64_t all = int64_t(p.batch) * p.heads * p.M * p.splits;
      *reinterpret_cast<float4*>(p.partial + share * columns + column) = sum;
      if (column == 0) {
        p.partial[all * columns + share] = top;
        p.partial[all * (columns + 1) + share] = l;
      }
      return;
    }
    const Finish finish(top, l, sink_of(p, h));
    write_four<T>(p, b, h, m, column, scaled(sum, finish.factor));
    if (p.lse != nullptr && column == 0) p.lse[row] = finish.lse;
  }

  DEVICE void run() {
    load_queries();
    clear_padding();
    int n = next;
    look_up();
#pragma unroll
    for (int i = 0; i < SLOTS / 2; ++i) {
      copy_keys();
      if (i + 1 < SLOTS / 2) copy_values();
    }
    cp_async_wait<SLOTS - 1>();
    __syncthreads();  // the queries are there, and the padding of the rings
    if constexpr (KEEP_QUERIES) {
#pragma unroll
      for (int i = 0; i < STEPS; ++i) read_queries(kept_queries[i], i);
    }
    for (; n < high; n += STRIDE) step(n);
    leave();
    __syncthreads();
    merge_warps();
  }
};

template <int MT>
DEVICE void run(const AttentionDecode& p) {
  extern __shared__ __align__(1024) char shared[];
  const int tiles = (p.M * p.group + 16 * MT - 1) / (16 * MT), heads = p.heads / p.group;
  const int x = static_cast<int>(blockIdx.x), hk = x / tiles % heads, b = x / tiles / heads;
  const Band band = band_in_cache(p, b);
  if (static_cast<int>(blockIdx.y) == p.splits) {
    if (x % tiles == 0) append<ELEMENT>(p, b, hk, band.N);
    return;
  }
  const Shares shares(band, p.splits);
  if (p.splits > 1 && static_cast<int>(blockIdx.y) >= shares.used()) return;
  Decode<ELEMENT, HEAD_SIZE, MT>(p, shared, hk, b, x % tiles * 16 * MT).run();
}

}  // namespace

/// Tiles of 16 rows. Grid: tiles of rows of key heads of sequences; splits, and where something is
/// new one more that writes it into the cache, which nobody reads it from.
extern "C" __global__ void __launch_bounds__(THREADS)
    decode(const __grid_constant__ AttentionDecode p) {
  run<1>(p);
}

#if defined(TILES_OF_32)
/// The same with tiles of 32 rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    decode_32_rows(const __grid_constant__ AttentionDecode p) {
  run<2>(p);
}
#endif

}  // namespace pyfuse::cuda
