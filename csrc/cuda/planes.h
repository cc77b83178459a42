// How much room Planes (vector.cuh) take, for kernels and whoever starts them.
#pragma once

#ifdef __CUDACC__
#define PYFUSE_HOST_DEVICE __host__ __device__
#else
#define PYFUSE_HOST_DEVICE
#endif

namespace pyfuse::cuda {

/// How many floats `count` of them take, of which lanes read p neighbours each.
PYFUSE_HOST_DEVICE constexpr int planes_size(int p, int count) {
  return p <= 4 ? (count + 3) / 4 * 4 : p / 4 * ((count / (p / 4) + 31) / 32 * 32 + 16);
}

}  // namespace pyfuse::cuda
