// Small kernels for sm_90 and later, each about one way of moving data: TMA tiles, bulk copies,
// barriers in shared memory and clusters. Tiles leave shared memory as they lie there, swizzle
// included, so that a test sees what the copy engine wrote.
#include "copy_engine.cuh"

namespace {

DEVICE void copy_out(char* out, const char* tile, int bytes) {
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) out[i] = tile[i];
}

/// A barrier for one arrival, that of the thread which starts the copies.
DEVICE void init_barrier(uint32_t barrier) {
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
}

}  // namespace

/// out [bytes] = the box at (x, y) as it lies in shared memory: zeros where it leaves the tensor.
extern "C" __global__ void tma_load_2d(const __grid_constant__ CUtensorMap map, char* out, int x,
                                       int y, int bytes) {
  extern __shared__ __align__(1024) char tile[];
  __shared__ uint64_t loaded;
  const uint32_t barrier = shared_address(&loaded);
  init_barrier(barrier);
  if (threadIdx.x == 0) {
    tma_prefetch(&map);
    mbarrier_arrive_expect(barrier, bytes);
    tma_load(shared_address(tile), &map, x, y, barrier);
  }
  mbarrier_wait(barrier, 0);
  copy_out(out, tile, bytes);
}

/// The same in three dimensions.
extern "C" __global__ void tma_load_3d(const __grid_constant__ CUtensorMap map, char* out, int x,
                                       int y, int z, int bytes) {
  extern __shared__ __align__(1024) char tile[];
  __shared__ uint64_t loaded;
  const uint32_t barrier = shared_address(&loaded);
  init_barrier(barrier);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, bytes);
    tma_load(shared_address(tile), &map, x, y, z, barrier);
  }
  mbarrier_wait(barrier, 0);
  copy_out(out, tile, bytes);
}

/// Copy the box at (x, y) of one tensor to (to_x, to_y) of another, whose map has the same box;
/// what would fall outside is not written.
extern "C" __global__ void tma_copy_2d(const __grid_constant__ CUtensorMap from,
                                       const __grid_constant__ CUtensorMap to, int x, int y,
                                       int to_x, int to_y, int bytes) {
  extern __shared__ __align__(1024) char tile[];
  __shared__ uint64_t loaded;
  const uint32_t barrier = shared_address(&loaded);
  init_barrier(barrier);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, bytes);
    tma_load(shared_address(tile), &from, x, y, barrier);
    mbarrier_wait(barrier, 0);
    tma_store(&to, to_x, to_y, shared_address(tile));
    bulk_commit();
    bulk_wait_read<0>();
  }
}

/// The box at (0, 0, z) becomes value + index in it, for z = blockIdx.x: threads write shared
/// memory, the copy engine reads it.
extern "C" __global__ void tma_fill_3d(const __grid_constant__ CUtensorMap to, float value,
                                       int elements) {
  extern __shared__ __align__(1024) float box[];
  for (int i = threadIdx.x; i < elements; i += blockDim.x) box[i] = value + float(i);
  async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(&to, 0, 0, blockIdx.x, shared_address(box));
    bulk_commit();
    bulk_wait_read<0>();
  }
}

/// y = factor * x in pieces of four floats per thread, two of them in flight: loads complete on one
/// barrier per stage, whose parity changes with every second piece; n is a multiple of a piece.
extern "C" __global__ void bulk_scale(const float* x, float* y, float factor, int64_t n) {
  constexpr int PIECE = 512, BYTES = PIECE * sizeof(float);
  __shared__ __align__(128) float in[2][PIECE], out[2][PIECE];
  __shared__ uint64_t loaded[2];
  init_barrier(shared_address(&loaded[0]));
  init_barrier(shared_address(&loaded[1]));
  const int pieces = n / PIECE;
  const auto load = [&](int i) {
    const uint32_t barrier = shared_address(&loaded[i % 2]);
    mbarrier_arrive_expect(barrier, BYTES);
    bulk_load(shared_address(in[i % 2]), x + int64_t(i) * PIECE, BYTES, barrier);
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < min(2, pieces); ++i) load(i);
  }
  for (int i = 0; i < pieces; ++i) {
    if (threadIdx.x == 0) bulk_wait_read<1>();  // the store that had this stage
    mbarrier_wait(shared_address(&loaded[i % 2]), i / 2 % 2);
    __syncthreads();
    for (int j = threadIdx.x; j < PIECE; j += blockDim.x) out[i % 2][j] = factor * in[i % 2][j];
    async_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(y + int64_t(i) * PIECE, shared_address(out[i % 2]), BYTES);
      bulk_commit();
      if (i + 2 < pieces) load(i + 2);
    }
  }
  if (threadIdx.x == 0) bulk_wait_read<0>();
}

/// y[i] = x[i] + 1 through a ring of two places: warp 0 fills them, warp 1 empties them. 64
/// threads, 32 elements a turn.
extern "C" __global__ void mbarrier_ring(const float* x, float* y, int turns) {
  __shared__ float place[2][32];
  __shared__ uint64_t full[2], empty[2];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 2) {
    mbarrier_init(shared_address(&full[threadIdx.x]), 32);
    mbarrier_init(shared_address(&empty[threadIdx.x]), 32);
  }
  __syncthreads();
  for (int i = 0; i < turns; ++i) {
    const uint32_t filled = shared_address(&full[i % 2]), emptied = shared_address(&empty[i % 2]);
    const uint32_t parity = i / 2 % 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(emptied, parity ^ 1);
      place[i % 2][lane] = x[i * 32 + lane];
      mbarrier_arrive(filled);
    } else {
      mbarrier_wait(filled, parity);
      y[i * 32 + lane] = place[i % 2][lane] + 1.0f;
      mbarrier_arrive(emptied);
    }
  }
}

/// y[i] = x[n - 1 - i], n = blockDim.x: a barrier for the whole block that can be polled.
extern "C" __global__ void mbarrier_reverse(const float* x, float* y) {
  extern __shared__ float row[];
  __shared__ uint64_t written;
  const uint32_t barrier = shared_address(&written);
  if (threadIdx.x == 0) mbarrier_init(barrier, blockDim.x);
  __syncthreads();
  row[threadIdx.x] = x[threadIdx.x];
  const uint64_t token = mbarrier_arrive_token(barrier);
  while (!mbarrier_test(barrier, token)) __nanosleep(20);
  y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

/// y[cluster] = the sum of the x of all its threads. Each block sums its own, then the first one
/// reads the sums of the others out of their shared memory. blockDim.x is a multiple of 32.
extern "C" __global__ void cluster_sum(const float* x, float* y) {
  __shared__ float sum;
  if (threadIdx.x == 0) sum = 0.0f;
  __syncthreads();
  atomicAdd(&sum, x[int64_t(blockIdx.x) * blockDim.x + threadIdx.x]);
  cluster_sync();
  if (cluster_rank() == 0 && threadIdx.x == 0) {
    float total = 0.0f;
    for (uint32_t rank = 0; rank < cluster_size(); ++rank) {
      total += cluster_load(cluster_address(shared_address(&sum), rank));
    }
    y[blockIdx.x / cluster_size()] = total;
  }
  cluster_sync();  // no block may end while its shared memory is read
}

/// Every block of a cluster gets the box at (x, y) by one load; out [blocks, bytes].
extern "C" __global__ void tma_multicast_2d(const __grid_constant__ CUtensorMap map, char* out,
                                            int x, int y, int bytes) {
  extern __shared__ __align__(1024) char tile[];
  __shared__ uint64_t loaded, ready;
  const uint32_t barrier = shared_address(&loaded), all_expect = shared_address(&ready);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init(all_expect, cluster_size());
    mbarrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(barrier, bytes);
    mbarrier_arrive_remote(cluster_address(all_expect, 0));
    if (cluster_rank() == 0) {
      mbarrier_wait(all_expect, 0);
      tma_load_multicast(shared_address(tile), &map, x, y, barrier, (1 << cluster_size()) - 1);
    }
  }
  mbarrier_wait(barrier, 0);
  copy_out(out + int64_t(blockIdx.x) * bytes, tile, bytes);
  cluster_sync();
}
