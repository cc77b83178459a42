// Random numbers of dropout and of draws, for the oracles.
#pragma once
#include <cstdint>

namespace pyfuse::test {

constexpr int64_t dropout_seed[] = {0x123456789abcdef, 77};

// Word n & 3 of Philox4x32-10 at counter (b, h, m, n >> 2), with dropout_seed's lower words as its
// key.
uint32_t random_word(int64_t b, int64_t h, int64_t m, int64_t n);

// What dropout multiplies element (b, h, m, n) by: 1 / (1 - p), or 0; 1 where p is 0.
double dropout_factor(double p, int64_t b, int64_t h, int64_t m, int64_t n);

}  // namespace pyfuse::test
