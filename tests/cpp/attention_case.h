// One call of attention: its inputs in exact memory, its parameters, and the formula itself, a
// query at a time in double.
#pragma once
#include <cmath>
#include <string>
#include <vector>

#include "array.h"

namespace pyfuse::test {

enum class MaskKind { none, boolean, additive };

struct AttentionCase {
  std::string name;
  int64_t queries, keys;
  int64_t batch = 2, heads_q = 2, heads_k = 2, d = 16, dv = 16;
  int64_t window_left = -1, window_right = -1;
  double scale = 0.25, softcap = 0, dropout = 0;
  bool sinks = false, alibi = false, heads_first = false;
  std::vector<int64_t> seqlens = {};
  bool align_to_seqlens = false;
  std::vector<int64_t> packed_queries = {},
                       packed_keys = {};  // lengths, instead of the sizes above
  MaskKind mask = MaskKind::none;
  DType mask_dtype = DType::f32;
  bool mask_has[3] = {true, true, true};  // its own values for each batch, head, query
  int64_t mask_key_stride = 1;

  bool packed() const { return !packed_queries.empty(); }
};

// Every option by itself, the sizes at which tiles and vectors end, and some of them together.
std::vector<AttentionCase> attention_cases();

class AttentionInputs {
 public:
  AttentionInputs(const AttentionCase& c, DType dtype);

  AttentionParams params() const;  // o and lse are null; threads is 1
  int64_t queries(int64_t b) const;
  int64_t keys(int64_t b) const;
  bool visible(int64_t b, int64_t h, int64_t m, int64_t n) const;
  double distance(int64_t b, int64_t m, int64_t n) const;         // to the diagonal
  double kept(int64_t b, int64_t h, int64_t m, int64_t n) const;  // dropout's factor
  int64_t key_head(int64_t h) const { return h / (c.heads_q / c.heads_k); }
  double sink(int64_t h) const { return c.sinks ? sinks_.get(h) : -INFINITY; }

  // Tensors in the layout of q and k, and element j of a query's or a key's row there.
  Tensor like_queries(DType dtype, int64_t d) const;
  Tensor like_keys(DType dtype, int64_t d) const;
  double of_query(const Tensor& t, int64_t b, int64_t h, int64_t m, int64_t j) const;
  double of_key(const Tensor& t, int64_t b, int64_t h, int64_t n, int64_t j) const;
  int64_t lse_count() const { return c.heads_q * q.batch * q.rows; }
  void set_lse_stride(int64_t (&stride)[2]) const;
  int64_t lse_at(int64_t b, int64_t h, int64_t m) const;

  struct Softmax {                    // of one query, before dropout
    std::vector<double> probability;  // [N], 0 for a hidden key
    std::vector<double> cap_slope;    // [N], what softcap does to a small change of the score
    double lse;
    double score_size;  // the largest sum of absolute terms of a score: what its error grows with
  };
  Softmax softmax(int64_t b, int64_t h, int64_t m) const;

  struct MaskLayout {
    explicit MaskLayout(const AttentionCase& c);
    int64_t stride[4], size[4], count;
  };

  const AttentionCase c;
  const std::vector<int64_t> first_query, first_key;  // [B + 1] where packed, else empty
  Tensor q, k, v;
  const MaskLayout mask_layout;

 private:
  double mask_term(int64_t b, int64_t h, int64_t m, int64_t n) const;
  void fill_mask();
  void poison_hidden_keys();

  Array mask_;  // of one kind or the other
  Memory bool_mask_;
  Array sinks_, slopes_;
  Memory seqlens_, first_query_, first_key_, seed_;
};

}  // namespace pyfuse::test
