// A walk along a row, vector by vector, for kernels that pass over it more than once.
#pragma once
#include "cpu/stream.h"
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

// The vector that a walk stands on: a whole one, or the last with `count` lanes. at(row) loads it,
// at.put(row, v) stores it (streamed: past the caches), at.only(v) is v where there are elements
// and 0 elsewhere.
template <class C>
struct Whole {
  static constexpr int64_t count = Vec<C>::width;
  int64_t i;
  template <class X>
  PYFUSE_INLINE auto operator()(const X* from) const {
    return load(from + i);
  }
  template <bool streamed = false, class X, class V>
  PYFUSE_INLINE void put(X* to, V v) const {
    streamed ? stream(to + i, v) : store(to + i, v);
  }
  template <class V>
  PYFUSE_INLINE V only(V v) const {
    return v;
  }
};
template <class C>
struct Part {
  int64_t i, count;
  template <class X>
  PYFUSE_INLINE auto operator()(const X* from) const {
    return load(from + i, count);
  }
  template <bool streamed = false, class X, class V>
  PYFUSE_INLINE void put(X* to, V v) const {
    store(to + i, v, count);
  }
  template <class V>
  PYFUSE_INLINE V only(V v) const {
    return iota<C>() < static_cast<C>(count) ? v : V{};
  }
};

// A sum over a row is kept in as many parts, to hide the latency of an addition.
constexpr int accumulators = 4;
template <class V>
PYFUSE_INLINE V combine(const V (&part)[accumulators]) {
  return (part[0] + part[1]) + (part[2] + part[3]);
}

#define PYFUSE_INLINE_BODY __attribute__((always_inline))

// body(vector, part of a sum) for the vectors of d elements of computed type C.
template <class C, int parts = accumulators, class Body>
PYFUSE_INLINE void for_vectors(int64_t d, const Body& body) {
  constexpr int64_t w = Vec<C>::width;
  int64_t i = 0;
  for (; i + parts * w <= d; i += parts * w)
    PYFUSE_UNROLL for (int a = 0; a < parts; ++a) body(Whole<C>{i + a * w}, a);
  if (parts > 1)
    for (; i + w <= d; i += w) body(Whole<C>{i}, 0);
  if (i < d) body(Part<C>{i, d - i}, parts > 1 ? 1 : 0);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
