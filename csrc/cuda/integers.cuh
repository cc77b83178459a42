// Reading Integers.
#pragma once

#include "integers.h"
#include "primitives.cuh"

namespace pyfuse::cuda {

DEVICE int64_t element(const Integers& x, int64_t i) {
  return x.wide ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int32_t*>(x.data)[i];
}

}  // namespace pyfuse::cuda
