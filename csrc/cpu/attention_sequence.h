// One sequence of a batch as a call of its own: the tiled kernels work on one sequence at a time,
// be the batch padded ([B, H, M, D]) or packed (rows of all sequences one after another).
#pragma once
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

inline int64_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

inline const void* advance(const void* base, int64_t elements, DType dtype) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + elements * size_of(dtype);
}
inline void* advance(void* base, int64_t elements, DType dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + elements * size_of(dtype);
}

// The dtype in which sums are taken.
inline DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

inline int64_t first_row(const int64_t* cu_seqlens, int64_t b) {
  return cu_seqlens == nullptr ? 0 : cu_seqlens[b];
}
inline int64_t row_count(const int64_t* cu_seqlens, int64_t b, int64_t otherwise) {
  return cu_seqlens == nullptr ? otherwise : cu_seqlens[b + 1] - cu_seqlens[b];
}
inline int64_t query_count(const AttentionParams& p, int64_t b) {
  return row_count(p.cu_seqlens_q, b, p.queries);
}
inline int64_t key_count(const AttentionParams& p, int64_t b) {
  return row_count(p.cu_seqlens_k, b, p.keys);
}

// Sequence b of p; batch indices are 0 from here on.
inline AttentionParams sequence_of(const AttentionParams& p, int64_t b) {
  const int64_t query = first_row(p.cu_seqlens_q, b), key = first_row(p.cu_seqlens_k, b);
  AttentionParams s = p;
  s.batch = 1, s.sequence = p.sequence + b;
  s.queries = query_count(p, b), s.keys = key_count(p, b);
  s.cu_seqlens_q = s.cu_seqlens_k = nullptr;
  s.q = advance(p.q, b * p.q_stride[0] + query * p.q_stride[2], p.dtype);
  s.k = advance(p.k, b * p.k_stride[0] + key * p.k_stride[2], p.dtype);
  s.v = advance(p.v, b * p.v_stride[0] + key * p.v_stride[2], p.dtype);
  s.o = advance(p.o, b * p.o_stride[0] + query * p.o_stride[2], p.dtype);
  s.lse = advance(p.lse, b * p.lse_stride[0] + query, p.lse_dtype);
  if (p.seqlens_k != nullptr) s.seqlens_k = p.seqlens_k + b;
  if (p.mask != nullptr) {
    const int64_t at = b * p.mask_stride[0];
    s.mask = p.mask_is_bool ? static_cast<const uint8_t*>(p.mask) + at
                            : advance(p.mask, at, p.mask_dtype);
  }
  return s;
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
