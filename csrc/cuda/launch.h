// How a kernel is started: by the name of its fatbin (a unit of CMakeLists.txt) and of its entry.
//
// Kernels are compiled to fatbins and found by name, so that no host code is generated for them:
// what is started here on a GPU, the tests start with the same bytes in an emulator.
#pragma once
#include <pyfuse/params.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pyfuse::cuda {

// The GPU that is current, as Python knows it.
struct Gpu {
  int arch;        // compute capability, 90 for sm_90
  int processors;  // multiprocessors
  uint64_t stream;
};

// Rows of a tensor [batches, heads, rows, columns] for the copy engine of sm_90, which brings boxes
// of `box` rows x 128 bytes into shared memory, swizzled by 128 bytes, with zeros for what lies
// beyond the tensor. Strides count elements; of columns it is 1.
struct TensorMap {
  const void* data;
  DType dtype;
  int64_t size[4], stride[3];
  int box;
};

struct Launch {
  std::string unit, entry;
  int64_t grid[3] = {1, 1, 1};
  int threads = 128;
  int shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;
  std::vector<TensorMap> maps;
};

// Whether this build has a unit: some are for one architecture.
bool has_unit(const std::string& name);

// Starts the kernel with `params`, a plain struct of `size` bytes, as its argument, followed by the
// maps, each a `const __grid_constant__ CUtensorMap`. A grid without blocks starts nothing. Throws
// std::runtime_error with the kernel's name and sizes.
void start(const Gpu& gpu, const Launch& launch, const void* params, size_t size);

template <class Params>
void start(const Gpu& gpu, const Launch& launch, const Params& params) {
  start(gpu, launch, &params, sizeof params);
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// "f32", "bf16" or "f16", as units are named; throws for any other dtype.
const char* name_of(DType dtype);
inline int size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace pyfuse::cuda
