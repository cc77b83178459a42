// Where the keys and values of a cache lie: in one piece, in pages, or among what is new; and the
// way of what is new into the cache.
#pragma once

#include "attention_decode.h"
#include "mask.cuh"

namespace pyfuse::cuda {

/// The cache of one head as one of its lanes sees it: keys (lanes 0 to 15) or values.
template <typename T>
struct Cache {
  char *cached, *given;                        // the first row in the cache and of what is new
  int64_t page_bytes, row_bytes, given_bytes;  // from page to page, from row to row
  Integers table;
  int64_t entry, entry_step;  // of the sequence's first page in the table, and from page to page
  int page_size, page_bits, shift;  // shift: the first key that is new

  DEVICE Cache(const AttentionDecode& p, int64_t b, int hk, int length, bool keys)
      : table(p.table),
        entry(b * p.table_stride[0]),
        entry_step(p.table_stride[1]),
        page_size(p.page_size),
        page_bits(p.page_bits),
        shift(p.k_new != nullptr ? length - p.M : length) {
    const auto& stride = keys ? p.k_stride : p.v_stride;
    const auto& new_stride = keys ? p.k_new_stride : p.v_new_stride;
    const int64_t size = sizeof(T);
    page_bytes = stride[0] * size, row_bytes = stride[2] * size;
    given_bytes = new_stride[2] * size;
    cached = static_cast<char*>(const_cast<void*>(keys ? p.k : p.v)) + hk * stride[1] * size;
    if (table.data == nullptr) cached += b * page_bytes;
    given = static_cast<char*>(const_cast<void*>(keys ? p.k_new : p.v_new));
    if (given != nullptr) given += (b * new_stride[0] + hk * new_stride[1]) * size;
  }

  DEVICE int page_index(int n) const {
    return page_bits >= 0 ? n >> page_bits : unsigned(n) / unsigned(page_size);
  }
  DEVICE int64_t page_of(int n) const {
    return table.data == nullptr ? 0 : element(table, entry + page_index(n) * entry_step);
  }
  /// Where key n is, or is to be, in the cache.
  DEVICE char* row(int n, int64_t page) const {
    const int before = table.data == nullptr ? 0 : page_index(n) * page_size;
    return cached + page * page_bytes + (n - before) * row_bytes;
  }
};

/// Write what is new of one head into its cache, by all threads of a block.
template <typename T, int THREADS>
DEVICE void append(const AttentionDecode& p, int64_t b, int hk, int length) {
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    const bool keys = part == 0;
    const Cache<T> cache(p, b, hk, length, keys);
    const int elements = keys ? p.d : p.dv;
    const int pieces = p.aligned ? elements * int(sizeof(T)) / 16 : elements;
    for (int64_t i = threadIdx.x; i < int64_t(p.M) * pieces; i += THREADS) {
      const int m = static_cast<int>(i / pieces), c = static_cast<int>(i % pieces);
      const int n = cache.shift + m;
      if (n < 0 || n >= p.N) continue;
      char* const to = cache.row(n, cache.page_of(n));
      const char* const from = cache.given + m * cache.given_bytes;
      if (p.aligned) {
        reinterpret_cast<uint4*>(to)[c] = reinterpret_cast<const uint4*>(from)[c];
      } else {
        reinterpret_cast<T*>(to)[c] = reinterpret_cast<const T*>(from)[c];
      }
    }
  }
}

}  // namespace pyfuse::cuda
