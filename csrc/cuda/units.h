// The fatbins of this build. CMake writes the table (units.cpp.in).
#pragma once
#include <cstddef>

namespace pyfuse::cuda {

/// ptx: the architectures for which PTX was made, which is assembled for these and later GPUs.
struct Unit {
  const char *name, *source, *options, *ptx;
  const void* fatbin;
};

extern const Unit units[];
extern const size_t unit_count;

}  // namespace pyfuse::cuda
