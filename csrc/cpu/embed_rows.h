// The rows that an embedding adds up: for its two directions.
#pragma once
#include "cpu/isa.h"
#include "cpu/philox.h"
#include "cpu/row_vectors.h"

namespace pyfuse::cpu::PYFUSE_ISA {

PYFUSE_INLINE int64_t row_of(const EmbedTable& table, int64_t token) {
  const int64_t at = token % table.id_count;
  return table.ids != nullptr ? table.ids[at] : at;
}
template <class X>
PYFUSE_INLINE const X* find_row(const EmbedTable& table, int64_t token) {
  if (table.weight == nullptr) return nullptr;
  return static_cast<const X*>(table.weight) + row_of(table, token) * table.row_stride;
}

// What one token adds up; P is the type of the positions: T, or computed where they are sinusoids.
template <class T, class P>
struct Summands {
  const T* token;
  const P* position;  // null: none
  const T* segment;   // null: none
  const T* next;      // the row of the next token, fetched meanwhile
  compute_t<T> scale;

  template <class At>
  PYFUSE_INLINE vec_t<T> sum(const At& at) const {
    __builtin_prefetch(next + at.i);
    vec_t<T> v = at(token) * scale;
    if (position != nullptr) v += at(position);
    if (segment != nullptr) v += at(segment);
    return v;
  }
};

template <class T, class P>
PYFUSE_INLINE Summands<T, P> find_summands(const EmbedParams& p, int64_t token) {
  const int64_t next = token + 1 < p.tokens ? token + 1 : token;
  return {find_row<T>(p.token, token), find_row<P>(p.position, token),
          find_row<T>(p.segment, token), find_row<T>(p.token, next),
          static_cast<compute_t<T>>(p.scale)};
}

// Calls fn(T{}, P{}) for the types of a call. csrc/api/embed.cpp has checked that
// positions are of the tables' dtype or of the computed one.
template <class Fn>
PYFUSE_INLINE void with_embed_types(DType dtype, DType position_dtype, const Fn& fn) {
  const bool own = dtype == position_dtype;
  switch (dtype) {
    case DType::f32:
      return fn(float{}, float{});
    case DType::f64:
      return fn(double{}, double{});
    case DType::bf16:
      return own ? fn(bf16{}, bf16{}) : fn(bf16{}, float{});
    case DType::f16:
      return own ? fn(f16{}, f16{}) : fn(f16{}, float{});
    default:
      bad_switch_value("dtype", static_cast<int>(dtype));
  }
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
