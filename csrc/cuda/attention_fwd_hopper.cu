// FlashAttention forward on wgmma and TMA, for sm_90a: attention_fwd.cu's function for 16-bit
// elements in aligned rows, without options.   (Shah et al., arXiv:2407.08608)
//
// A block of three warpgroups owns 128 queries of one head. The first has one thread at work, which
// has the copy engine bring tiles of 128 keys and their values into two stages each; the other two
// multiply, for 64 queries each. While the product with the values of one tile runs, they work on
// the softmax of the next; and they start their products in turn, so that the softmax of one falls
// into the products of the other. Tiles at the edges of what the queries see come first.
//
// Compiled for each ELEMENT (bf16, f16) and HEAD_SIZE (64, 128), the largest that D and Dv may
// have: the copy engine fills columns beyond them, and rows beyond the tensor, with zeros.
#include "product.cuh"
#include "sequence.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

namespace pyfuse::cuda {
namespace {

using T = ELEMENT;
constexpr int D = HEAD_SIZE;
constexpr int BLOCK = 128;    // queries, and keys
constexpr int CONSUMERS = 2;  // warpgroups that multiply
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int PARTS = BLOCK / 8, OUT = D / 8;
using Rows = Tile<T, D, BLOCK>;  // panels of 64 columns, swizzled as the copy engine does

// Barriers of the warps that multiply; of the last two kinds one for each warpgroup.
enum NamedBarrier { VALUES_CHECKED = 1, QUERIES_USED, TURN = QUERIES_USED + CONSUMERS };

/// Start a copy of a tile; `barrier` has one arrival and its bytes to wait for.
DEVICE void load_rows(char* tile, const CUtensorMap* map, int64_t row, int h, int64_t batch,
                      uint64_t* barrier) {
  mbarrier_arrive_expect(shared_address(barrier), Rows::BYTES);
  for (int panel = 0; panel < Rows::PANELS; ++panel) {
    tma_load(shared_address(tile + panel * Rows::PANEL), map, panel * Rows::ROW / int(sizeof(T)),
             static_cast<int>(row), h, static_cast<int>(batch), shared_address(barrier));
  }
}

/// Two stages of tiles; tile i goes to stage i mod 2. `full` ends a phase when a copy is there,
/// `empty` when all multiplying warps are done with it.
struct alignas(1024) Ring {  // as the swizzle of its tiles demands
  char tile[2][Rows::BYTES];
  uint64_t full[2], empty[2];

  static DEVICE int stage(int i) { return i & 1; }
  static DEVICE int parity(int i) { return i >> 1 & 1; }  // of the phase in which tile i comes

  DEVICE void init() {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(shared_address(&full[stage]), 1);
      mbarrier_init(shared_address(&empty[stage]), 4 * CONSUMERS);
    }
  }
  DEVICE void load(int i, const CUtensorMap* map, int64_t row, int h, int64_t batch) {
    mbarrier_wait(shared_address(&empty[stage(i)]), parity(i) ^ 1);
    load_rows(tile[stage(i)], map, row, h, batch, &full[stage(i)]);
  }
  DEVICE void wait(int i) { mbarrier_wait(shared_address(&full[stage(i)]), parity(i)); }
  DEVICE void release(int i) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&empty[stage(i)]));
  }
  DEVICE uint64_t descriptor(int i) const {
    return matrix_descriptor(shared_address(tile[stage(i)]), Rows::PANEL);
  }
};

struct Shared {
  char q[Rows::BYTES];  // later o
  Ring k, v;
  uint64_t q_full;
  uint64_t spoilt[2][BLOCK / 64];  // of every second tile: which values are not finite
  Work work;
};
static_assert(sizeof(Shared) == 5 * Rows::BYTES + 3 * 1024);

DEVICE void produce(const AttentionForward& p, Shared& shared, const CUtensorMap* q,
                    const CUtensorMap* k, const CUtensorMap* v) {
  const Work work = shared.work;
  const Place& at = work.place;
  const int h = blockIdx.y;
  load_rows(shared.q, q, at.row + work.m0, h, at.batch, &shared.q_full);
  for (int i = 0; i < work.tiles.tiles; ++i) {
    const int64_t row = at.other + work.tiles.start<BLOCK>(i);
    shared.k.load(i, k, row, h / p.group, at.batch);
    shared.v.load(i, v, row, h / p.group, at.batch);
  }
}

/// What a warp that multiplies knows of its 16 queries.
struct Consumer {
  const AttentionForward& p;
  Shared& shared;
  const Work& work;
  const int tiles;
  const int group;  // of warps, from 0
  const uint64_t q;

  float s[1][PARTS][4], o[1][OUT][4] = {};
  uint32_t weights[BLOCK / 16][4];  // of the tile before the one that s is of; as left operands
  Softmax<1> softmax;
  bool shrinks;  // of the whole warp: by what
  float shrink[1][2];

  DEVICE Consumer(const AttentionForward& p, Shared& shared)
      : p(p),
        shared(shared),
        work(shared.work),
        tiles(work.tiles.tiles),
        group(__shfl_sync(~0u, threadIdx.x / 128, 0) - 1),  // one register for the warp
        q(matrix_descriptor(shared_address(shared.q)) + group * (64 * Rows::ROW >> 4)) {}

  DEVICE int warp() const { return group * 4 + threadIdx.x % 128 / 32; }
  /// This lane's first query.
  DEVICE int m() const { return work.m0 + warp() * 16 + threadIdx.x % 32 / 4; }

  /// s = q kᵀ of tile i; 16 elements are 32 bytes of each row of a panel.
  DEVICE void start_keys(int i) {
    shared.k.wait(i);
    const uint64_t k = shared.k.descriptor(i);
    pin(s[0]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      const int ahead = (step / 4 * Rows::PANEL + step % 4 * 32) >> 4;
      wgmma_nt(s[0], q + ahead, k + ahead, step > 0, T());
    }
    wgmma_commit();
  }

  /// o += weights v of tile i; 16 keys are 2048 bytes of each panel.
  DEVICE void start_values(int i) {
    shared.v.wait(i);
    const uint64_t v = shared.v.descriptor(i);
    pin(o[0]);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < BLOCK / 16; ++j)
      wgmma_nn(o[0], weights[j], v + j * (16 * Rows::ROW >> 4), T());
    wgmma_commit();
  }

  /// Which of tile i's values are not finite, bit n for row n of each 64: zeros take their place,
  /// since a weight of 0 would not stop them. All consumers together, 16 rows a warp.
  DEVICE void clear_spoilt_values(int i, uint64_t (&spoilt)[2]) {
    shared.v.wait(i);
    char* const tile = shared.v.tile[Ring::stage(i)];
    const int row = warp() * 16 + threadIdx.x % 16, first = threadIdx.x % 32 / 16;
    bool bad = false;
#pragma unroll
    for (int c = first; c < Rows::ROW_CHUNKS; c += 2)
      bad |= !all_finite(load_shared16(shared_address(tile + Rows::at(row, c))), T());
    uint32_t rows = __ballot_sync(~0u, bad);
    rows = (rows | rows >> 16) & 0xffff;
    if (rows != 0) {
      if (rows >> threadIdx.x % 16 & 1) {
        for (int c = first; c < Rows::ROW_CHUNKS; c += 2)
          *reinterpret_cast<uint4*>(tile + Rows::at(row, c)) = {0, 0, 0, 0};
      }
      async_fence();  // the products read them by another way than the stores went
    }
    if (threadIdx.x % 32 == 0)
      reinterpret_cast<uint16_t*>(shared.spoilt[Ring::stage(i)])[warp()] =
          static_cast<uint16_t>(rows);
    named_barrier(VALUES_CHECKED, 128 * CONSUMERS);
    for (int half = 0; half < 2; ++half) spoilt[half] = shared.spoilt[Ring::stage(i)][half];
  }

  /// Turn the scores of tile i into weights, and remember by what o then has to shrink: a product
  /// with values may still be running.
  template <bool EDGE>
  DEVICE void fold(int i) {
    if constexpr (EDGE) {
      uint64_t spoilt[2];
      clear_spoilt_values(i, spoilt);
      const int n = work.tiles.start<BLOCK>(i);
      for (int half = 0; half < 2; ++half) {
        auto& scores = reinterpret_cast<float (&)[1][PARTS / 2][4]>(s[0][half * PARTS / 2]);
        hide(scores, work.band, m(), n + half * BLOCK / 2, spoilt[half]);
      }
    }
    shrinks = false;
    softmax.step<EDGE>(s, p.scale, [&](const float (&by)[1][2]) {
      shrink[0][0] = by[0][0], shrink[0][1] = by[0][1];
      shrinks = true;
    });
  }

  /// After fold(i): end the product before, and bring o and the weights to where its own wants
  /// them.
  DEVICE void settle(int i) {
    wgmma_wait<0>();
    pin(o[0]);
    if (i > 0) shared.v.release(i - 1);
    if (shrinks) Softmax<1>::shrink(o, shrink);
#pragma unroll
    for (int n = 0; n < PARTS; ++n) {
      weights[n / 2][n % 2 * 2] = pack(s[0][n][0], s[0][n][1], T());
      weights[n / 2][n % 2 * 2 + 1] = pack(s[0][n][2], s[0][n][3], T());
    }
  }

  /// Between fold(i - 1) and fold(i) the products, of which the second runs on while that folds. A
  /// loop ends with the fold, since the compiler would begin to wait for that product in its midst.
  template <bool EDGE>
  DEVICE void step(int i) {
    settle(i - 1);
    named_barrier(TURN + group, 128 * CONSUMERS);
    start_keys(i);
    start_values(i - 1);
    if (group == 0 || i + 1 < tiles) named_barrier_arrive(TURN + (group ^ 1), 128 * CONSUMERS);
    wgmma_wait<1>();
    pin(s[0]);
    shared.k.release(i);
    fold<EDGE>(i);
  }

  DEVICE void run() {
    mbarrier_wait(shared_address(&shared.q_full), 0);
    if (group == 1 && tiles > 1) named_barrier_arrive(TURN, 128 * CONSUMERS);  // the first turn
    if (tiles > 0) {
      start_keys(0);
      wgmma_wait<0>();
      pin(s[0]);
      shared.k.release(0);
      fold<true>(0);
      int i = 1;
#pragma unroll 1
      for (; i < work.tiles.edges; ++i) step<true>(i);
#pragma unroll 1
      for (; i < tiles; ++i) step<false>(i);
      settle(tiles - 1);
      start_values(tiles - 1);
      wgmma_wait<0>();
      pin(o[0]);
    }
    end();
  }

  DEVICE void end() {
    const Place& at = work.place;
    const int h = blockIdx.y;
    float lse[1][2];
    softmax.end(o, lse, p.sinks == nullptr ? -INFINITY : p.sinks[h] * LOG2E, 1.0f);
    if (p.lse != nullptr && threadIdx.x % 4 == 0) {
      float* to = p.lse + at.batch * p.lse_stride[0] + h * p.lse_stride[1] + at.row;
      for (int row = 0; row < 2; ++row) {
        if (m() + 8 * row < at.count) to[m() + 8 * row] = lse[0][row];
      }
    }
    // By way of the queries' tile, so that a lane has 16 bytes together.
    const int warp_row = warp() * 16, first = work.m0 + warp_row;
    T* const to = static_cast<T*>(p.o) + at.batch * p.o_stride[0] + h * p.o_stride[1] +
                  (at.row + first) * p.o_stride[2];
    named_barrier(QUERIES_USED + group, 128);
    store_product<T, Rows>(shared.q, warp_row, o[0]);
    __syncwarp();
    write_rows<T, Rows>(shared.q, warp_row, 16, to, p.o_stride[2], p.dv, at.count - first, true);
  }
};

}  // namespace

/// Grid: blocks of queries, heads.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    forward(const __grid_constant__ AttentionForward p, const __grid_constant__ CUtensorMap q,
            const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v) {
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&shared.q_full), 1);
    shared.k.init();
    shared.v.init();
    mbarrier_init_fence();
  }
  const Work& work = Work::of<BLOCK, BLOCK>(p, &shared.work);  // and all wait for the barriers
  if (work.place.nothing || work.m0 >= work.place.count) return;
  if (threadIdx.x < 128) {
    registers_down_to<24>();
    if (threadIdx.x < 32 && elect_one()) produce(p, shared, &q, &k, &v);
  } else {
    registers_up_to<240>();
    Consumer(p, shared).run();
  }
}

}  // namespace pyfuse::cuda
