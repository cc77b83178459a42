// The fatbins of this build. CMake writes the table (units.cpp.in).
#pragma once
#include <cstddef>

namespace pyfuse::cuda {

struct Unit {
  const char *name, *source, *options, *archs;
  const void* fatbin;
};

extern const Unit units[];
extern const size_t unit_count;

}  // namespace pyfuse::cuda
