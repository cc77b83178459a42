// What the kernels of LayerNorm and RMSNorm are told: the arguments of pyfuse.layer_norm and
// pyfuse.rms_norm as plain numbers.
#pragma once
#include <cstdint>

namespace pyfuse::cuda {

/// dtype counts as pyfuse::DType: 0 float32, 1 bfloat16, 2 float16.
struct NormRows {  // [rows, d], unit stride in d; data null: not there
  void* data;
  int64_t stride;  // elements between rows
  int32_t dtype;
};

struct NormVector {  // [d]; data null: not there
  const void* data;
  int32_t dtype;
};

/// LayerNorm, or the castings of RMSNorm.
enum NormKind : int32_t { NORM_LAYER, NORM_LLAMA, NORM_GEMMA, NORM_TORCH };

struct NormCall {
  NormRows x, residual;  // z = dropout(x) + residual
  NormVector weight, bias;
  float *mean, *rstd;  // [rows]; the forward writes them, null: not wanted. RMSNorm has no mean
  int64_t rows;
  int32_t d;
  int32_t lanes;  // threads that share a row: a power of 2 up to a warp, or whole warps
  int32_t kind;
  float inverse;  // 1 / d

  uint32_t key[2];    // of dropout
  int32_t threshold;  // an element is kept iff (its word >> 8) >= threshold; 0: no dropout
  float keep_scale;   // 1 / (1 - p)
};

struct NormForward : NormCall {
  NormRows y, z;  // null: not wanted
  float eps;
};

/// x is z itself where the forward kept that: no residual then, and `drop` is false.
struct NormBackward : NormCall {
  NormRows dy, dz;         // what flows into y and z; dz null: nothing
  NormRows dx, dresidual;  // null: not wanted
  float *dweight, *dbias;  // [blocks, d]: the sums of each block's rows; null: not wanted
  bool drop;               // z is still to be made by dropout
};

/// out[i] = sum over `blocks` of sums[block, i], for two of them; null: not wanted.
struct NormSums {
  const float* sums[2];
  NormRows out[2];
  int32_t blocks, d;
};

}  // namespace pyfuse::cuda
