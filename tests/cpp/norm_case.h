// One call of a norm: its inputs, and what its formula says of a row, in double.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "array.h"

namespace pyfuse::test {

struct NormCase {
  DType dtype = DType::f32, z_dtype = DType::f32, weight_dtype = DType::f32;
  int64_t rows = 0, d = 0;
  NormKind kind = NormKind::layer;
  bool affine = true, residual = false, keep_z = false;
  double dropout = 0;  // 0 or 0.5, which loses no bit of x: z has one right value then

  bool rms() const { return kind != NormKind::layer; }
  // Llama's casting promotes: a float weight times the rounded row.
  DType y_dtype() const { return kind == NormKind::llama && affine ? weight_dtype : dtype; }
  // Rows of whole cache lines may be written past the caches.
  bool streams() const { return d * size_of(dtype) % 64 == 0; }
  std::string name() const;
};

// body(c) for every dtype of x, and those that residual and weight may have beside it.
void for_norm_dtypes(NormCase c, const std::function<void(const NormCase&)>& body);

struct NormRow {
  std::vector<double> z;
  double mean, rstd;
};

class NormInputs {
 public:
  explicit NormInputs(const NormCase& c);
  NormArguments arguments() const;
  NormRow row(int64_t r) const;
  double weight_at(int64_t j) const;
  double kept(int64_t r, int64_t j) const;  // dropout's factor

  const NormCase c;
  const Rows x, residual;
  Array weight, bias;

 private:
  Memory seed_;
};

}  // namespace pyfuse::test
