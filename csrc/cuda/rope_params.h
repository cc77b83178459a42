// What the kernels of the rotary embedding are told: the arguments of pyfuse.rope as plain numbers.
#pragma once
#include <cstdint>

#include "integers.h"

namespace pyfuse::cuda {

/// One of the tensors that are turned. Strides count elements: of batch, head and row.
struct RopePart {
  const void* x;  // [B, heads, M, d]
  void* y;        // may be x
  int64_t x_stride[3], y_stride[3];
  int32_t heads;
};

struct RopeCall {
  RopePart part[2];  // of the second heads may be 0
  const void *cos, *sin;
  int64_t table_stride[2];  // batch, row
  int64_t table_rows;
  bool table_f32;      // float32 beside x's own type
  Integers positions;  // null: token m has row m
  int64_t position_stride[2];
  int32_t tokens, M, d, r;  // tokens: B M; the first r of d columns are turned
  bool interleaved, copy;   // copy: the other columns are to be written
  float sign;               // of sin: -1 turns back

  // A warp has tokens_at tokens, of each heads_each heads, heads_at of them at once; of a token
  // there are `splits` warps. A head has `lanes` lanes.
  int32_t lanes, heads_at, tokens_at, heads_each, splits;
};

}  // namespace pyfuse::cuda
