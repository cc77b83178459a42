// How a kernel is started: by the name of its fatbin (a unit of CMakeLists.txt) and of its entry.
//
// Kernels are compiled to fatbins and found by name, so that no host code is generated for them:
// what is started here on a GPU, the tests start with the same bytes in an emulator.
#pragma once
#include <pyfuse/params.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace pyfuse::cuda {

// The GPU that is current, as Python knows it.
struct Gpu {
  int arch;        // compute capability, 90 for sm_90
  int processors;  // multiprocessors
  uint64_t stream;
};

struct Launch {
  std::string unit, entry;
  int64_t grid[3] = {1, 1, 1};
  int threads = 128;
  int shared = 0;  // bytes of dynamic shared memory
  int cluster = 1;
};

// Starts the kernel with `params`, a plain struct of `size` bytes, as its argument. A grid without
// blocks starts nothing. Throws std::runtime_error with the kernel's name and sizes.
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
