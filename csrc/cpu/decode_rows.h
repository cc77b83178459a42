// Where the rows of a chunk of keys lie: with or without pages, what reads them sees one table of
// addresses, and so does the same arithmetic.
#pragma once
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// Asks for the cache line at p + j if a vector of `step` elements at j begins one.
template <class T>
PYFUSE_INLINE void prefetch_at(const T* p, int64_t j, int step) {
  const int64_t bytes = j * static_cast<int64_t>(sizeof(T));
  if (step * sizeof(T) >= 64 || bytes % 64 == 0) __builtin_prefetch(p + j);
}
template <class T>
PYFUSE_INLINE void prefetch_row(const T* p, int64_t length) {
  for (int64_t j = 0; j < length; j += 64 / static_cast<int64_t>(sizeof(T)))
    __builtin_prefetch(p + j);
}

// rows[i] = row lo + i of sequence b and key head hk, of k or v, i < count.
template <class T>
void find_rows(const DecodeParams& p, const void* cache, const int64_t* stride, int64_t b,
               int64_t hk, int64_t lo, int64_t count, const T** rows) {
  const T* base = static_cast<const T*>(cache) + hk * stride[1];
  if (p.block_table == nullptr) {
    base += b * stride[0] + lo * stride[2];
    for (int64_t i = 0; i < count; ++i, base += stride[2]) rows[i] = base;
    return;
  }
  int64_t page = lo / p.page_size, slot = lo % p.page_size;
  for (int64_t i = 0; i < count; ++page, slot = 0) {
    const T* row = base + p.page_of(b, page) * stride[0] + slot * stride[2];
    for (; slot < p.page_size && i < count; ++slot, ++i, row += stride[2]) rows[i] = row;
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
