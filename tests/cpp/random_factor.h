// Dropout's random numbers, for the oracles.
#pragma once
#include <cstdint>

namespace pyfuse::test {

constexpr int64_t dropout_seed[] = {0x123456789abcdef, 77};

// What dropout multiplies element (b, h, m, n) by: 1 / (1 - p), or 0; 1 where p is 0.
double dropout_factor(double p, int64_t b, int64_t h, int64_t m, int64_t n);

}  // namespace pyfuse::test
