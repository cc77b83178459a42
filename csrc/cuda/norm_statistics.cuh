// The mean of a row, and 1 / its deviation.
#pragma once

#include "norm_params.h"
#include "primitives.cuh"
#include "row_sum.cuh"

namespace pyfuse::cuda {

/// sum / d, with p.inverse = 1 / d.
DEVICE float mean_of(float sum, const NormCall& p) {
  const float mean = sum * p.inverse;
  return fmaf(fmaf(-mean, static_cast<float>(p.d), sum), p.inverse, mean);
}

/// x^-1/2, the approximation of the hardware (of two ulp) improved by a step of Newton's; 0 and
/// infinity as they are.
DEVICE float rsqrt_of(float x) {
  const float y = rsqrtf(x), error = fmaf(-x * y, y, 1.0f);
  return isnan(error) ? y : fmaf(0.5f * y, error, y);
}

}  // namespace pyfuse::cuda
