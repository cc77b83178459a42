// What a kernel is told: one plain struct per operation. Pointers, sizes, strides (in elements);
// no torch, no Python. Filled and checked by csrc/api, read by csrc/cpu.
#pragma once
#include <cstdint>

namespace pyfuse {

enum class DType : int {
  f32 = 0,
  bf16 = 1,
  f16 = 2,
  f64 = 3
};  // pyfuse/backends/cpu.py counts alike

// o = softmax(scale·q·kᵀ ...)·v; letters, order of the steps and alignment as in DESIGN: the last
// query sees the last key. Strides: batch, head, row; the innermost stride is 1.
struct AttentionParams {
  const void *q, *k, *v;
  void* o;
  void* lse;  // [B, Hq, M], natural log, unit stride in M; null: not wanted
  int64_t q_stride[3], k_stride[3], v_stride[3], o_stride[3];
  int64_t lse_stride[2];  // batch, head
  DType lse_dtype;        // f32 or f64
  int64_t batch, heads_q, heads_k, queries, keys, d, dv;
  DType dtype;

  // Packed sequences: [B + 1] each, the first row of every sequence and the end; batch strides are
  // 0 then, and queries and keys are those of the longest sequence. Null: all sequences are alike.
  const int64_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t sequence;  // the index that dropout counts the first sequence as

  double scale;
  double softcap;            // 0: none
  int64_t window_left;       // keys to the left of the aligned diagonal; -1: all
  int64_t window_right;      // keys to the right of it; 0: causal; -1: all
  const int64_t* seqlens_k;  // [B] or null
  bool align_to_seqlens;  // the last query stands on key seqlens_k[b] - 1, not on the last of all
  const double* sinks;    // [Hq] or null
  const double* alibi_slopes;  // [Hq] or null

  const void* mask;  // null: none
  bool mask_is_bool;
  DType mask_dtype;        // of an additive mask
  int64_t mask_stride[4];  // batch, head, query, key; 0 where broadcast

  double dropout_p;             // 0: none
  const int64_t* dropout_seed;  // (seed, offset)

  int threads;
};

// The gradients of attention. `call` is the call as it was, its o and lse being those it gave, lse
// in f64: in float its rounding alone would cost the probabilities another ulp of log2(N).
struct AttentionGradientParams {
  AttentionParams call;
  const void* d_o;     // [B, Hq, M, Dv]
  const void* d_lse;   // [B, Hq, M], float (double for f64); null: nothing depends on lse
  void *dq, *dk, *dv;  // as q, k, v; all three or none
  int64_t do_stride[3], dlse_stride[2], dq_stride[3], dk_stride[3], dv_stride[3];
  void* d_mask;  // contiguous, of the mask's own sizes (1 where broadcast) and dtype; null: not
                 // wanted
  int64_t mask_size[4];
  double* d_sinks;         // [Hq]; null: not wanted
  double* d_alibi_slopes;  // [Hq]; null: not wanted
};

// Attention of few queries over a cache. With a block_table the cache is in pages and k and v are
// [pages, Hk, page_size, ...]: key j of sequence b lies in page block_table[b][j / page_size].
struct DecodeParams : AttentionParams {
  const void* block_table = nullptr;  // [B, pages of a sequence], int32 or int64; null: contiguous
  bool table_is_64_bit = false;
  int64_t table_stride[2] = {};
  int64_t page_size = 1, pages = 0;

  int64_t page_of(int64_t b, int64_t i) const {
    const int64_t at = b * table_stride[0] + i * table_stride[1];
    return table_is_64_bit ? static_cast<const int64_t*>(block_table)[at]
                           : static_cast<const int32_t*>(block_table)[at];
  }
};

enum class NormKind : int { layer = 0, llama = 1, gemma = 2, torch = 3 };  // RMSNorm: by casting

// What the norms' forward and backward both read: z = dropout(x) + residual, row by row.
struct NormArguments {
  const void* x;
  const void* residual;  // null: none
  const void* weight;    // null: ones
  int64_t rows, d;
  int64_t x_stride, residual_stride;  // of rows; the outputs are contiguous
  DType dtype;                        // of x
  DType z_dtype;                      // of residual and z: x's, or float32 beside a half type
  DType y_dtype;                      // of y: likewise
  DType weight_dtype;                 // any
  NormKind kind;
  double eps;
  const int64_t* dropout_seed;  // (seed, offset); null: no dropout
  double dropout_p;
  bool stream;      // results go past the caches, which they would not fit
  bool row_by_row;  // speed is the memory's, which comes fastest row after row
  int threads;
};

// y = norm(z) · weight + bias over the last dimension.
struct NormParams : NormArguments {
  const void* bias;  // null: zeros
  DType bias_dtype;
  void* y;
  void* z;  // null: not wanted
};

// dz of what the norm read and of what it returned as z, summed; dx = dropout'(dz).
struct NormGradientParams : NormArguments {
  const void* z;   // as the forward wrote it; null: recomputed from x and residual
  const void* dy;  // of y_dtype
  const void* dz;  // of z_dtype; null: none
  int64_t z_stride, dy_stride, dz_stride;
  DType bias_dtype;
  void *dx, *dresidual, *dweight, *dbias;  // null: not wanted
};

// Rotates the first r of d elements of every row of x [B, H, M, D] by the angles of that token.
struct RopeParams {
  const void* x;
  void* y;  // may be x
  const void *cos, *sin;
  int64_t batch, heads, rows, d, r;
  int64_t x_stride[3], y_stride[3];
  int64_t table_stride[2];   // batch, row of cos and sin (batch 0 where shared)
  const int64_t* positions;  // null: row m uses row m of the table
  int64_t position_stride[2];
  int64_t table_rows;
  DType dtype, table_dtype;
  bool interleaved;
  bool inverse;  // by the negative angles: what the gradient of x needs
  int threads;
};

// A table of rows and the row that each token takes of it.
struct EmbedTable {
  const void* weight;  // null: no such summand
  int64_t row_stride, rows;
  const int64_t* ids;  // token i takes row ids[i % id_count]; null: row i % id_count
  int64_t id_count;
};

// y = dropout(norm(scale · token row + position row + segment row)).
struct EmbedParams {
  EmbedTable token, position, segment;
  void* y;  // [tokens, d] contiguous
  int64_t tokens, d;
  DType dtype, position_dtype;  // position_dtype: dtype, or the one computed in
  double scale;
  const void *norm_weight, *norm_bias;  // of the dtype computed in; weight null: no norm
  double eps;
  void* statistics;             // [tokens, 2], mean and 1/deviation; null: not wanted
  const int64_t* dropout_seed;  // null: no dropout
  double dropout_p;
  int threads;
};

// The gradient of y's sum and of the norm's parameters. y of `forward` is not looked at, and its
// statistics are read.
struct EmbedGradientParams {
  EmbedParams forward;
  const void* dy;
  int64_t dy_stride;
  void* dsum;   // [tokens, d] of the dtype computed in; null: not wanted
  void* dnorm;  // [2, d] likewise: of the norm's weight, of its bias; null: not wanted
};

// y[v] = scale · the sum of the rows i with ids[i % id_count] = v, in their order; without ids
// i % id_count = v.
struct RowSumsParams {
  const void* rows;
  int64_t row_stride, count, d;
  const int64_t* ids;
  int64_t id_count;
  void* y;  // [table_rows, d] contiguous
  int64_t table_rows;
  DType rows_dtype, dtype;  // rows_dtype: dtype, or the one computed in
  double scale;
  int threads;
};

enum class Activation : int { none = 0, gelu = 1, gelu_tanh = 2, silu = 3, relu = 4 };

// A weight of the decoding step, packed into panels of 64 outputs (csrc/cpu/panel_rows.h), zeros
// where there are none.
struct StepMatrix {
  const void* w;       // null: no such matrix
  const float* scale;  // of int8: one for each output, up to a multiple of 64; else null
  const float* bias;   // likewise; null: none
  int64_t n, k;
};
struct StepNorm {
  const float *weight, *bias;  // bias: of LayerNorm, null for RMSNorm
};
struct StepLayer {
  StepNorm norm1, norm2;
  StepMatrix qkv, out, gate, up, down;  // gate: null w without
};
enum class StepWeights : int { f32 = 0, bf16 = 1, int8 = 2 };

// What a decoder of Llama's or GPT-2's kind is made of: x += attention(norm(x)), x +=
// feed_forward(norm(x)) in each layer.
struct StepModel {
  const StepLayer* layers;
  int64_t layer_count, width, heads_q, heads_k, d, hidden, vocabulary;
  StepWeights weights;
  DType dtype;                 // of the token table, f32 or bf16
  const void* tokens;          // [V, W]
  const float* places;         // [P, W]: learned or sinusoidal positions; null: none
  const float *cos, *sin;      // [P, R/2] of RoPE, in halves; null: none
  int64_t positions, rotated;  // P, R
  StepNorm norm;               // after the last layer
  StepMatrix head;
  double embedding_scale, head_scale, eps, scale;
  Activation activation;
  int64_t window_left;  // keys before a token's own that it sees; -1: all
};

constexpr int64_t MOST_STEP_QUERIES = 16, MOST_STEP_ROWS = 64;  // and these, times Hq / Hk

// One step: `rows` tokens, those of each of the sequences one after another, as many of each.
struct StepParams {
  const StepModel* model;
  int64_t sequences, queries;  // of each sequence
  const int64_t* ids;          // [rows]
  const int64_t* lengths;      // [sequences], these tokens included: the last one stands at its end
  const int32_t* block_table;  // [sequences, table_stride]
  int64_t table_stride, page_size, pages;
  void *k, *v;  // [layers, pages, Hk, page_size, D] of `cache`
  DType cache;  // f32 or bf16
  bool prompt;  // many tokens of each sequence: attention by tiles, else at most MOST_STEP_QUERIES
  bool every;   // logits of every token, not of the last ones
  float* logits;  // [rows or sequences, logits_stride]
  int64_t logits_stride;
  int threads;
};

// y = dropout(act(x)) over [rows, d]; with a flow, the gradient of x from y's. The element (row,
// column) has the random word of element (0, 0, row, column).
struct DropoutParams {
  const void* x;     // backward: the x of the forward, but for relu its y; not read for none
  const void* flow;  // null: forward
  void* y;           // contiguous
  int64_t rows, d;
  int64_t x_stride, flow_stride;  // of rows
  DType dtype;
  Activation activation;
  const int64_t* seed;  // (seed, offset); null: no dropout
  double p;
  bool stream;  // results go past the caches, which they would not fit
  int threads;
};

// y = act(x·wᵀ + bias) · multiply + residual; w [N, K], or as pack_linear left it.
struct LinearParams {
  const void *x, *w, *bias, *multiply, *residual;  // the last three may be null
  void* y;
  int64_t rows, n, k;
  int64_t x_stride, w_stride, y_stride, multiply_stride, residual_stride;
  DType dtype;
  Activation activation;
  int threads;
};

// Tokens by their logits: pyfuse/generation/sampling.py has the definition.
struct SampleRow {
  uint64_t seed;
  uint32_t sequence, step;
};
enum : int64_t { sample_nan = -1, sample_infinite = -2, sample_nothing = -3 };
struct SampleResult {
  int64_t token;         // or one of the above: what is wrong with the row
  float logit, largest;  // of raw: the token's and the largest
  int64_t total;         // weight of all of raw
};
struct SampleTop {
  int32_t token;
  float logit;
};
struct SampleParams {
  const float* logits;  // [R, V], rows `stride` apart
  const float* raw;     // likewise: what log-probabilities are taken of; null: of nothing
  int64_t rows, vocabulary, stride, raw_stride;
  float temperature;      // 0: the largest logit
  int64_t top_k;          // 0: all
  double top_p;           // 1: all
  int64_t least_weight;   // of min-p; 0: any
  const SampleRow* of;    // [R]
  SampleResult* results;  // [R]
  int64_t top;            // of raw's largest, so many are told of
  SampleTop* best;        // [R, top], in rising order of their ids
  int threads;
};

}  // namespace pyfuse
