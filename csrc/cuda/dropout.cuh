// The random numbers of dropout: Philox4x32-10 (Salmon et al., SC'11), counted as pyfuse/philox.py
// says: element (b, h, m, n) takes word n % 4 of the four that counter (b, h, m, n / 4) gives.
#pragma once

#include "primitives.cuh"

namespace pyfuse::cuda {

DEVICE uint4 philox(uint4 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
    const uint32_t high2 = __umulhi(0xCD9E8D57u, counter.z), low2 = 0xCD9E8D57u * counter.z;
    counter = {high2 ^ counter.y ^ key0, low2, high0 ^ counter.w ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

/// Whether the element of this word stays.
DEVICE bool kept(uint32_t word, int threshold) { return static_cast<int>(word >> 8) >= threshold; }

/// The words of a lane's two columns 8n + 2t and 8n + 2t + 1 in rows g and g + 8 of a product's
/// part n (product.cuh), in its order. `n` is the first column of the part; of the four lanes of a
/// row two share a counter: each computes one row and gives the other what it needs of it.
DEVICE void dropout_words(uint32_t (&words)[4], uint32_t b, uint32_t h, uint32_t row_g, uint32_t n,
                          const uint32_t (&key)[2]) {
  const int t = threadIdx.x % 4;
  const bool odd = t & 1;
  const uint4 own = philox({b, h, odd ? row_g + 8 : row_g, (n >> 2) + t / 2}, key[0], key[1]);
  const uint32_t first = __shfl_xor_sync(~0u, odd ? own.x : own.z, 1);
  const uint32_t second = __shfl_xor_sync(~0u, odd ? own.y : own.w, 1);
  words[0] = odd ? first : own.x;
  words[1] = odd ? second : own.y;
  words[2] = odd ? own.z : first;
  words[3] = odd ? own.w : second;
}

/// The same where rows are keys: `key_g` is that of row g, `query` the part's first column. Four
/// neighbouring keys share a counter, so of the four lanes that have them each computes one of the
/// four elements' counters, and they exchange what is theirs.
DEVICE void dropout_words_by_key(uint32_t (&words)[4], uint32_t b, uint32_t h, uint32_t query,
                                 uint32_t key_g, const uint32_t (&key)[2]) {
  const int own = threadIdx.x / 4 % 4;  // the element, of words, whose counter is this lane's
  const uint32_t m = query + threadIdx.x % 4 * 2 + own % 2;
  const uint4 x = philox({b, h, m, (key_g >> 2) + own / 2 * 2}, key[0], key[1]);
  // A transposition of four lanes' four words: of pairs, then of pairs of pairs.
  const bool odd = own & 1, high = own & 2;
  const uint32_t first = __shfl_xor_sync(~0u, odd ? x.x : x.y, 4);
  const uint32_t second = __shfl_xor_sync(~0u, odd ? x.z : x.w, 4);
  const uint32_t y[4] = {odd ? first : x.x, odd ? x.y : first, odd ? second : x.z,
                         odd ? x.w : second};
  const uint32_t third = __shfl_xor_sync(~0u, high ? y[0] : y[2], 8);
  const uint32_t fourth = __shfl_xor_sync(~0u, high ? y[1] : y[3], 8);
  words[0] = high ? third : y[0];
  words[1] = high ? fourth : y[1];
  words[2] = high ? y[2] : third;
  words[3] = high ? y[3] : fourth;
}

}  // namespace pyfuse::cuda
