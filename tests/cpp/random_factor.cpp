#include "random_factor.h"

#include <cmath>

namespace pyfuse::test {

// Salmon, Moraes, Dror and Shaw, SC 2011.
uint32_t random_word(int64_t b, int64_t h, int64_t m, int64_t n) {
  uint32_t c[4] = {static_cast<uint32_t>(b), static_cast<uint32_t>(h), static_cast<uint32_t>(m),
                   static_cast<uint32_t>(n >> 2)};
  uint32_t key[2] = {static_cast<uint32_t>(dropout_seed[0]),
                     static_cast<uint32_t>(dropout_seed[1])};
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t{0xD2511F53} * c[0], y = uint64_t{0xCD9E8D57} * c[2];
    c[0] = static_cast<uint32_t>(y >> 32) ^ c[1] ^ key[0], c[1] = static_cast<uint32_t>(y);
    c[2] = static_cast<uint32_t>(x >> 32) ^ c[3] ^ key[1], c[3] = static_cast<uint32_t>(x);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return c[n & 3];
}

double dropout_factor(double p, int64_t b, int64_t h, int64_t m, int64_t n) {
  if (p == 0) return 1;
  return random_word(b, h, m, n) >> 8 >= std::ceil(p * (1 << 24)) ? 1 / (1 - p) : 0;
}

}  // namespace pyfuse::test
