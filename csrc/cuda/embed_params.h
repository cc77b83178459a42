// What the kernels of the embedding are told: the arguments of pyfuse.embed as plain numbers.
#pragma once
#include <cstdint>

#include "integers.h"

namespace pyfuse::cuda {

/// Rows of d columns, and which of them each token takes.
struct EmbedTable {
  const void* weight;
  int64_t stride;
  int64_t rows;  // -1: no such summand
  Integers ids;
};

/// A vector of d numbers in any of the kernels' types (of DType); null: not there.
struct EmbedVector {
  const void* data;
  int32_t dtype;
};

struct EmbedDropout {
  uint32_t key[2];
  int32_t threshold;  // an element is kept iff (its word >> 8) >= threshold; 0: no dropout
  float keep_scale;   // 1 / (1 - p)
};

struct EmbedCall {
  EmbedTable token, position, segment;  // position has ids also where sinusoids take them
  int32_t length;                       // tokens after which positions start again
  const uint64_t* turns;                // [d / 2], of a sinusoid (see embed.cuh); null: none
  EmbedVector norm_weight, norm_bias;
  float scale, eps;
  int32_t tokens, d;
  int32_t threads;  // of a row, a power of two
  EmbedDropout dropout;
};

struct EmbedForward : EmbedCall {
  void* y;            // [tokens, d]
  float* statistics;  // [tokens, 2], mean and 1/deviation; null: not wanted
};

struct EmbedBackward : EmbedCall {
  const void* dy;  // [tokens, d]
  int64_t dy_stride;
  const float* statistics;
  float* dsum;    // [tokens, d]; null: not wanted
  float* sums;    // [slots, 2, d], of the norm's weight and bias; null: not wanted
  int32_t slots;  // slot i has the tokens i, i + slots, ...
};

/// out[v] = scale · the sum of rows[token(j)] over the j with id(j) = v, which are neighbours.
struct RowSums {
  const void* rows;  // [tokens, d]
  int64_t stride;
  // id(j) = ids[j / repeat], token(j) = order[j / repeat] + j % repeat · length; where they are
  // null, j / repeat itself.
  const void* ids;
  int32_t id_bytes;
  const int64_t* order;
  int32_t repeat, length, count, d;
  void* out;  // [height, d]
  int64_t height;
  float scale;
  float* edges;    // [2 chunks, d], sums of each chunk's first and last run; null: one chunk
  void* edge_ids;  // [2 chunks], int64 where id_bytes is 8, else int32
  int32_t stretches;
  EmbedDropout dropout;
};

}  // namespace pyfuse::cuda
