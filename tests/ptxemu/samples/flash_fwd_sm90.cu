// FlashAttention forward for sm_90a: the function of flash_fwd.cu for head size 64 in bf16 and
// fp16, with TMA, wgmma and warps of different roles.   (Shah et al., arXiv:2407.08608)
//
// One block computes 128 rows of one head. The first of its three warpgroups has one thread at
// work, which starts the copies of tiles of K and V into two stages each; the other two multiply,
// 64 rows each. While the product with V runs for one tile, they work on the softmax of the next.
#include "copy_engine.cuh"
#include "flash_softmax.cuh"
#include "wgmma.cuh"

/// Launch with grid (ceil(M / 128), H, B), 384 threads and sizeof(Shared) = 84992 bytes of dynamic
/// shared memory. q and o are maps of [B, H, M, D] with boxes of 64 rows, k and v of [B, H, N, D]
/// with boxes of 128; all swizzle 128 bytes.
struct FlashParams {
  float* lse;  // [B, H, M], contiguous
  int32_t M, N;
  int32_t causal;
  float scale;  // positive
};

namespace {

constexpr int D = 64;
constexpr int BLOCK_N = 128;
constexpr int CONSUMERS = 2;  // warpgroups that multiply
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int THREADS = 128 * (1 + CONSUMERS);
constexpr int ROW = 128;  // bytes of 64 elements

/// Two stages of tiles; copy i goes to stage i mod 2. `full` ends a phase when a copy is there,
/// `empty` when all multiplying warps are done with it.
struct alignas(1024) Ring {  // as the swizzle of its tiles demands
  char tile[2][BLOCK_N * ROW];
  uint64_t full[2], empty[2];

  DEVICE void init() {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(shared_address(&full[stage]), 1);
      mbarrier_init(shared_address(&empty[stage]), 4 * CONSUMERS);
    }
  }

  DEVICE void load(int i, const CUtensorMap* map, int row) {
    const uint32_t barrier = shared_address(&full[i % 2]);
    mbarrier_wait(shared_address(&empty[i % 2]), i / 2 % 2 ^ 1);
    mbarrier_arrive_expect(barrier, BLOCK_N * ROW);
    tma_load(shared_address(tile[i % 2]), map, 0, row, blockIdx.y, blockIdx.z, barrier);
  }

  /// Wait for copy i; the result describes it.
  DEVICE uint64_t wait(int i) {
    mbarrier_wait(shared_address(&full[i % 2]), i / 2 % 2);
    return matrix_descriptor(shared_address(tile[i % 2]));
  }

  DEVICE void release(int i) {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&empty[i % 2]));
  }
};

struct Shared {
  char q[CONSUMERS][64 * ROW];  // later o
  Ring k, v;
  uint64_t q_full;
};
static_assert(sizeof(Shared) == 84992);

/// The tiles of keys that a block walks over, from the last to the first.
struct Walk {
  int m0, tiles, masked_tiles;

  DEVICE explicit Walk(const FlashParams& p) {
    m0 = (gridDim.x - 1 - blockIdx.x) * BLOCK_M;  // where causal, the longest walk first
    const int last = min(m0 + BLOCK_M, p.M) - 1;
    tiles = (visible_keys(last, p.M, p.N, p.causal) + BLOCK_N - 1) / BLOCK_N;
    masked_tiles = tiles - visible_keys(m0, p.M, p.N, p.causal) / BLOCK_N;
  }
  DEVICE int first_key(int i) const { return (tiles - 1 - i) * BLOCK_N; }
};

DEVICE void produce(Shared& shared, const Walk& walk, const CUtensorMap* q, const CUtensorMap* k,
                    const CUtensorMap* v) {
  const uint32_t barrier = shared_address(&shared.q_full);
  mbarrier_arrive_expect(barrier, sizeof(shared.q));
  for (int i = 0; i < CONSUMERS; ++i) {
    const int row = walk.m0 + 64 * i;
    tma_load(shared_address(shared.q[i]), q, 0, row, blockIdx.y, blockIdx.z, barrier);
  }
  for (int i = 0; i < walk.tiles; ++i) {
    shared.k.load(i, k, walk.first_key(i));
    shared.v.load(i, v, walk.first_key(i));
  }
}

/// Write the warpgroup's 64 rows of o over its q, and from there to global memory.
template <typename T>
DEVICE void store_rows(const float (&o)[D / 8][4], char* tile, const CUtensorMap* map, int row) {
  const int lane = threadIdx.x % 32, group = threadIdx.x / 128;
  const int line = threadIdx.x % 128 / 32 * 16 + (lane & 15);
  named_barrier(group, 128);  // all four warps have used q
#pragma unroll
  for (int n = 0; n < D / 8; n += 2) {
    const int chunk = n + (lane >> 4);
    stmatrix(shared_address(tile + line * ROW + ((chunk ^ (line & 7)) << 4)),
             {pack(o[n][0], o[n][1], T()), pack(o[n][2], o[n][3], T()),
              pack(o[n + 1][0], o[n + 1][1], T()), pack(o[n + 1][2], o[n + 1][3], T())});
  }
  async_fence();
  named_barrier(group, 128);
  if (threadIdx.x % 128 == 0) {
    tma_store(map, 0, row, blockIdx.y, blockIdx.z, shared_address(tile));
    bulk_commit();
    bulk_wait_read<0>();
  }
}

template <typename T>
DEVICE void consume(Shared& shared, const Walk& walk, const FlashParams& p,
                    const CUtensorMap* o_map) {
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // one register for the warp
  const int group_m = walk.m0 + 64 * group;
  const int warp_m = group_m + threadIdx.x % 128 / 32 * 16;
  const float scale_log2 = p.scale * 1.44269504f;
  const uint64_t q = matrix_descriptor(shared_address(shared.q[group]));
  float s[BLOCK_N / 8][4] = {}, o[D / 8][4] = {}, m[2] = {-INFINITY, -INFINITY}, l[2] = {},
                    correction[2];
  uint32_t weights[BLOCK_N / 16][4];

  const auto start_keys = [&](int i) {  // s = q kᵀ; 16 elements are 32 bytes of each row
    const uint64_t k = shared.k.wait(i);
    pin(s);
    wgmma_fence();
    for (int step = 0; step < D / 16; ++step)
      wgmma_nt(s, q + 2 * step, k + 2 * step, step > 0, T());
    wgmma_commit();
  };
  const auto start_values = [&](int i) {  // o += weights v; 16 keys are 2048 bytes
    const uint64_t v = shared.v.wait(i);
    pin(o);
    wgmma_fence();
    for (int j = 0; j < BLOCK_N / 16; ++j) wgmma_nn(o, weights[j], v + 128 * j, T());
    wgmma_commit();
  };
  const auto fold = [&](auto masked, int i) {
    constexpr bool MASKED = decltype(masked)::value;
    if constexpr (MASKED) {
      const int m = warp_m + threadIdx.x % 32 / 4, n = walk.first_key(i);
      mask(s, visible_keys(m, p.M, p.N, p.causal) - n, visible_keys(m + 8, p.M, p.N, p.causal) - n);
    }
    softmax_step<MASKED>(s, correction, m, l, scale_log2);
  };
  const auto pack_weights = [&] {  // a lane's scores are already where the left operand wants them
    for (int i = 0; i < BLOCK_N / 8; ++i) {
      weights[i / 2][i % 2 * 2] = pack(s[i][0], s[i][1], T());
      weights[i / 2][i % 2 * 2 + 1] = pack(s[i][2], s[i][3], T());
    }
  };
  const auto step = [&](auto masked, int i) {
    start_keys(i);
    start_values(i - 1);
    wgmma_wait<1>();
    pin(s);
    shared.k.release(i);
    fold(masked, i);
    wgmma_wait<0>();
    pin(o);
    shared.v.release(i - 1);
    scale_rows(o, correction);
    pack_weights();
  };

  mbarrier_wait(shared_address(&shared.q_full), 0);
  if (walk.tiles > 0) {
    start_keys(0);
    wgmma_wait<0>();
    pin(s);
    shared.k.release(0);
    fold(std::true_type(), 0);
    pack_weights();
    int i = 1;
    for (; i < walk.masked_tiles; ++i) step(std::true_type(), i);
    for (; i < walk.tiles; ++i) step(std::false_type(), i);
    start_values(walk.tiles - 1);
    wgmma_wait<0>();
    pin(o);
  }
  float* lse = p.lse + (int64_t(blockIdx.z) * gridDim.y + blockIdx.y) * p.M + warp_m;
  softmax_end(o, m, l, p.scale, lse, p.M - warp_m);
  store_rows<T>(o, shared.q[group], o_map, group_m);
}

template <typename T>
DEVICE void flash_forward(const FlashParams& p, const CUtensorMap* q, const CUtensorMap* k,
                          const CUtensorMap* v, const CUtensorMap* o) {
  extern __shared__ __align__(1024) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&shared.q_full), 1);
    shared.k.init();
    shared.v.init();
    mbarrier_init_fence();
  }
  __syncthreads();
  const Walk walk(p);
  if (threadIdx.x < 128) {
    registers_down_to<24>();
    if (threadIdx.x < 32 && elect_one()) produce(shared, walk, q, k, v);
  } else {
    registers_up_to<240>();
    consume<T>(shared, walk, p, o);
  }
}

}  // namespace

#define FLASH_ENTRY(T)                                                               \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) flash_fwd_sm90_##T##_d64( \
      const __grid_constant__ FlashParams p, const __grid_constant__ CUtensorMap q,  \
      const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,  \
      const __grid_constant__ CUtensorMap o) {                                       \
    flash_forward<T>(p, &q, &k, &v, &o);                                             \
  }

FLASH_ENTRY(bf16)
FLASH_ENTRY(fp16)
