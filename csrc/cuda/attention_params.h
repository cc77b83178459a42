// What the attention kernels are told: the arguments of pyfuse.attention as plain numbers.
#pragma once
#include <cstdint>

#include "integers.h"

namespace pyfuse::cuda {

/// Letters as in DESIGN. Strides count elements: of batch, head and row; that of a row's elements
/// is
/// 1. Packed sequences (cu_q, cu_k): M and N are the rows of all of them together, and the strides
/// of batches are 0.
struct AttentionCall {
  const void *q, *k, *v;  // [B, Hq, M, d], [B, Hk, N, d], [B, Hk, N, dv]
  int64_t q_stride[3], k_stride[3], v_stride[3];
  int32_t batch, heads, group;  // B, Hq, Hq / Hk
  int32_t M, N, d, dv;
  bool aligned;  // rows of all tensors start at multiples of 16 bytes and are so long

  float scale;                  // what q·k is multiplied by: for units of log 2, or for tanh
  float softcap;                // what tanh is multiplied by for those units; 0: no cap
  int32_t left, right;          // keys seen before and after the query's own place; -1: all
  const float *slopes, *sinks;  // [Hq]; null: none
  Integers lengths;             // [B] keys of each sequence, alignment stays with N
  Integers cu_q, cu_k;          // [B + 1]

  const void* mask;        // null: none
  int32_t mask_kind;       // of DType, or -1: bool
  int64_t mask_stride[4];  // batch, head, query, key

  uint32_t key[2];    // of dropout
  int32_t threshold;  // an element is kept iff (its word >> 8) >= threshold; 0: no dropout
  float keep_scale;   // 1 / (1 - p)
};

struct AttentionForward : AttentionCall {
  void* o;     // [B, Hq, M, dv]
  float* lse;  // [B, Hq, M], unit stride in M; null: not wanted
  int64_t o_stride[3], lse_stride[2];
};

/// Of each query as floats [B, Hq, M] with unit stride in M, all laid out alike.
struct RowTerms {
  const float* lse;            // of the forward
  float *lse2, *rest, *delta;  // as attention_gradient.cuh has them; rest may be null: zeros
  int64_t stride[2];           // batch, head
};

struct AttentionGradient : AttentionCall {
  const void *o, *d_o;    // [B, Hq, M, dv]
  const float* d_lse;     // [B, Hq, M]; null: none
  void *d_q, *d_k, *d_v;  // as q, k, v
  float* d_slopes;        // each query's share, laid out as terms; null: not wanted
  int64_t o_stride[3], do_stride[3], dlse_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
  RowTerms terms;
  float factor;       // d(score) / d(q·k)
  int32_t row_lanes;  // of attention_bwd_terms.cu: so many, a power of 2, share a row

  // The mask's gradient [b, h, m, n], each element of which is shared by so many sequences and
  // heads, and, where they are not `apart`, by all rows or columns.
  void* d_mask;
  int32_t dmask_kind;  // of DType
  int32_t sharing_batches, sharing_heads;
  bool rows_apart, columns_apart;
  int64_t dmask_stride[4];
};

}  // namespace pyfuse::cuda
