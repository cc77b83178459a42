// Small kernels that do in legal ways what looks dangerous: each hands data from thread to thread
// by another means. Nothing may be found in them.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

#include <cuda/atomic>
#include <cuda/barrier>

namespace cg = cooperative_groups;

/// *out = sum x. Every block leaves its part; the one that counts last adds them up.
extern "C" __global__ void last_block_sum(const float* x, float* parts, float* out, unsigned* count,
                                          int n) {
  __shared__ float sums[32];
  __shared__ bool is_last;
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    sum += x[i];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int i = 0; i < blockDim.x / 32; ++i) sum += sums[i];
    parts[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicInc(count, gridDim.x) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x < gridDim.x) atomicAdd(out, static_cast<volatile float*>(parts)[threadIdx.x]);
}

/// sum[i] += 1 in every block and turn, under a lock that one thread takes for its block.
extern "C" __global__ void locked_sum(int* lock, float* sum, int turns) {
  cuda::atomic_ref<int, cuda::thread_scope_device> held(*lock);
  for (int turn = 0; turn < turns; ++turn) {
    if (threadIdx.x == 0) {
      while (held.exchange(1, cuda::memory_order_acquire)) {
      }
    }
    __syncthreads();
    sum[threadIdx.x] += 1.0f;
    __syncthreads();
    if (threadIdx.x == 0) held.store(0, cuda::memory_order_release);
  }
}

/// y = sum x over 64 elements: a tree in shared memory, in steps of one warp.
extern "C" __global__ void warp_tree(const float* x, float* y) {
  __shared__ float sums[64];
  const int lane = threadIdx.x;
  sums[lane] = x[lane];
  sums[lane + 32] = x[lane + 32];
  __syncwarp();
  for (int step = 32; step > 0; step /= 2) {
    const float other = lane < step ? sums[lane + step] : 0.0f;
    __syncwarp();
    sums[lane] += other;
    __syncwarp();
  }
  if (lane == 0) *y = sums[0];
}

/// y[i / 8] = sum of eight x; *odd = how many x are odd, counted by the lanes that have one.
extern "C" __global__ void parts_of_warps(const int* x, int* y, int* odd) {
  const auto eight = cg::tiled_partition<8>(cg::this_thread_block());
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int sum = cg::reduce(eight, x[i], cg::plus<int>());
  if (eight.thread_rank() == 0) y[i / 8] = sum;
  if (x[i] & 1) {
    const auto some = cg::coalesced_threads();
    if (some.thread_rank() == 0) atomicAdd(odd, static_cast<int>(some.size()));
  }
}

/// y = x reversed, three times over, with a barrier in shared memory.
extern "C" __global__ void reverse(const int* x, int* y) {
  using Barrier = cuda::barrier<cuda::thread_scope_block>;
  __shared__ alignas(Barrier) char place[sizeof(Barrier)];
  __shared__ int row[256];
  auto* barrier = reinterpret_cast<Barrier*>(place);
  if (threadIdx.x == 0) init(barrier, blockDim.x);
  __syncthreads();
  for (int turn = 0; turn < 3; ++turn) {
    row[threadIdx.x] = x[threadIdx.x] + turn;
    barrier->arrive_and_wait();
    y[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
    barrier->arrive_and_wait();
  }
}

__device__ unsigned arrived;
__device__ volatile unsigned generation;

/// A barrier of all blocks, of counters and fences; they must be on the device together.
static __device__ void grid_barrier() {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned mine = generation;
    if (atomicAdd(&arrived, 1) == gridDim.x - 1) {
      arrived = 0;
      __threadfence();
      generation = mine + 1;
    } else {
      while (generation == mine) {
      }
    }
    __threadfence();
  }
  __syncthreads();
}

/// wrong counts what a thread finds other than its neighbour block wrote; x [gridDim, blockDim].
extern "C" __global__ void neighbours(int* x, int* wrong) {
  const int neighbour = (blockIdx.x + 1) % gridDim.x;
  for (int turn = 0; turn < 3; ++turn) {
    x[blockIdx.x * blockDim.x + threadIdx.x] = 1000 * turn + blockIdx.x;
    grid_barrier();
    if (x[neighbour * blockDim.x + threadIdx.x] != 1000 * turn + neighbour) atomicAdd(wrong, 1);
    grid_barrier();
  }
}

/// bins[v] = how many x are v.
extern "C" __global__ void histogram(const unsigned char* x, int* bins, int n) {
  __shared__ int own[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) own[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(own + x[i], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x) {
    if (own[i]) atomicAdd(bins + i, own[i]);
  }
}

/// x = running sums of x, in two buffers by turns; 256 threads.
extern "C" __global__ void running_sums(int* x) {
  __shared__ int sums[2][256];
  const int i = threadIdx.x;
  int now = 0;
  sums[0][i] = x[i];
  __syncthreads();
  for (int step = 1; step < 256; step *= 2, now ^= 1) {
    sums[now ^ 1][i] = sums[now][i] + (i >= step ? sums[now][i - step] : 0);
    __syncthreads();
  }
  x[i] = sums[now][i];
}

/// tile[b] = tile[b - 1] + 1 for block b, which waits for the flag of the block before it.
extern "C" __global__ void chain(float* tile, int* flags) {
  const int b = blockIdx.x;
  if (b > 0) {
    if (threadIdx.x == 0) {
      while (atomicCAS(flags + b - 1, 1, 1) != 1) {
      }
    }
    __syncthreads();
    __threadfence();
  }
  const float before = b > 0 ? tile[(b - 1) * blockDim.x + threadIdx.x] : 0.0f;
  tile[b * blockDim.x + threadIdx.x] = before + 1;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(flags + b, 1);
}
