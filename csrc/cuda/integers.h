// Integers on the GPU, as the caller has them.
#pragma once

namespace pyfuse::cuda {

/// int32 or (wide) int64; null: not there.
struct Integers {
  const void* data;
  bool wide;
};

}  // namespace pyfuse::cuda
