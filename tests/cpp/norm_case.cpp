#include "norm_case.h"

#include <string.h>

#include <cmath>

#include "random_factor.h"

namespace pyfuse::test {

std::string NormCase::name() const {
  static const char* const kinds[] = {"layer", "llama", "gemma", "torch"};
  return std::string(kinds[static_cast<int>(kind)]) + " " + name_of(dtype) + ", z " +
         name_of(z_dtype) + ", weight " + name_of(weight_dtype) + ", " + std::to_string(rows) +
         " rows, d " + std::to_string(d) + (residual ? ", residual" : "") +
         (dropout > 0 ? ", dropout" : "");
}

void for_norm_dtypes(NormCase c, const std::function<void(const NormCase&)>& body) {
  for (const DType dtype : dtypes) {
    c.dtype = c.z_dtype = c.weight_dtype = dtype;
    body(c);
    if (!is_half(dtype)) continue;
    c.weight_dtype = DType::f32;
    if (c.residual) c.z_dtype = DType::f32;
    body(c);
  }
}

NormInputs::NormInputs(const NormCase& c)
    : c(c),
      x(c.dtype, c.rows, c.d, 3, 1, 2),
      residual(c.z_dtype, c.residual ? c.rows : 0, c.d, 3, 1, 2),
      weight(c.weight_dtype, c.affine ? c.d : 0),
      bias(c.weight_dtype, c.affine && !c.rms() ? c.d : 0),
      seed_(sizeof dropout_seed) {
  weight.fill_random(), bias.fill_random();
  memcpy(seed_.data(), dropout_seed, sizeof dropout_seed);
}

NormArguments NormInputs::arguments() const {
  NormArguments p{};
  if (c.rows > 0) p.x = x.array.data();  // as csrc/api does
  if (c.residual && c.rows > 0) p.residual = residual.array.data();
  p.x_stride = x.stride, p.residual_stride = residual.stride;
  if (c.affine) p.weight = weight.data();
  p.rows = c.rows, p.d = c.d;
  p.dtype = c.dtype, p.z_dtype = c.z_dtype, p.y_dtype = c.y_dtype();
  p.weight_dtype = c.weight_dtype;
  p.kind = c.kind;
  p.eps = 1e-5;
  if (c.dropout > 0) p.dropout_seed = static_cast<const int64_t*>(seed_.data());
  p.dropout_p = c.dropout;
  p.threads = 1;
  return p;
}

double NormInputs::kept(int64_t r, int64_t j) const {
  return dropout_factor(c.dropout, 0, 0, r, j);
}

double NormInputs::weight_at(int64_t j) const {
  return (c.affine ? weight.get(j) : 1) + (c.kind == NormKind::gemma ? 1 : 0);
}

NormRow NormInputs::row(int64_t r) const {
  NormRow row{{}, 0, 0};
  const auto count = static_cast<double>(c.d);
  double square = 0;
  for (int64_t j = 0; j < c.d; ++j) {
    const double z = kept(r, j) * x.get(r, j) + (c.residual ? residual.get(r, j) : 0);
    row.z.push_back(rounded(z, c.z_dtype));
    if (!c.rms()) row.mean += row.z.back() / count;
  }
  for (const double z : row.z) square += (z - row.mean) * (z - row.mean) / count;
  row.rstd = 1 / std::sqrt(square + 1e-5);
  return row;
}

}  // namespace pyfuse::test
