#include "array.h"

#include <math.h>
#include <string.h>

#include <cmath>

namespace pyfuse::test {

const char* name_of(DType dtype) {
  static const char* const names[] = {"f32", "bf16", "f16", "f64"};
  return names[static_cast<int>(dtype)];
}

int64_t size_of(DType dtype) {
  static const int64_t sizes[] = {4, 2, 2, 8};
  return sizes[static_cast<int>(dtype)];
}

double epsilon(DType dtype) {
  static const double epsilons[] = {0x1p-23, 0x1p-7, 0x1p-10, 0x1p-52};
  return epsilons[static_cast<int>(dtype)];
}

double accumulator(DType dtype) { return dtype == DType::f64 ? 0x1p-52 : 0x1p-23; }

bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

double rounded(double x, DType dtype) {
  if (dtype == DType::f64) return x;
  return dtype == DType::f32 ? static_cast<float>(x) : from_half(to_half(x, dtype), dtype);
}

bool close(double actual, double exact, double tolerance) {
  return actual == exact || std::fabs(actual - exact) <= tolerance;
}

double Array::get(int64_t i) const {
  const char* from = static_cast<const char*>(data()) + i * size_of(dtype);
  if (is_half(dtype)) {
    uint16_t bits;
    memcpy(&bits, from, sizeof bits);
    return from_half(bits, dtype);
  }
  float narrow;
  double wide;
  if (dtype == DType::f64) return memcpy(&wide, from, sizeof wide), wide;
  return memcpy(&narrow, from, sizeof narrow), narrow;
}

void Array::set(int64_t i, double x) {
  char* to = static_cast<char*>(data()) + i * size_of(dtype);
  if (is_half(dtype)) {
    const uint16_t bits = to_half(x, dtype);
    memcpy(to, &bits, sizeof bits);
  } else if (dtype == DType::f64) {
    memcpy(to, &x, sizeof x);
  } else {
    const float narrow = static_cast<float>(x);
    memcpy(to, &narrow, sizeof narrow);
  }
}

void Array::fill_random(double scale) {
  for (int64_t i = 0; i < count; ++i) set(i, scale * random_unit());
}

bool same_bytes(const Array& a, const Array& b) {
  return a.bytes() == b.bytes() && memcmp(a.data(), b.data(), static_cast<size_t>(a.bytes())) == 0;
}

Rows::Rows(DType dtype, int64_t rows, int64_t d, int64_t gap, double centre, double scale)
    : rows(rows), d(d), stride(d + gap), array(dtype, rows > 0 ? rows * stride - gap : 0) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < d; ++j) array.set(r * stride + j, centre + scale * random_unit());
}

Tensor::Tensor(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t d, bool heads_first,
               int64_t gap)
    : batch(batch),
      heads(heads),
      rows(rows),
      d(d),
      array(dtype, batch * heads * rows > 0 ? batch * heads * rows * (d + gap) - gap : 0),
      gap_(gap),
      stride_{heads * rows * (d + gap), heads_first ? rows * (d + gap) : d + gap,
              heads_first ? d + gap : heads * (d + gap)} {}

void Tensor::fill_random(double scale) {
  for (int64_t row = 0; row < batch * heads * rows; ++row)
    for (int64_t j = 0; j < d; ++j) array.set(row * (d + gap_) + j, scale * random_unit());
}

void Tensor::copy_strides(int64_t (&to)[3]) const {
  for (int i = 0; i < 3; ++i) to[i] = stride_[i];
}

void Tensor::check_gaps() const {
  for (int64_t row = 0; row + 1 < batch * heads * rows; ++row)
    for (int64_t j = 0; j < gap_; ++j)
      CHECK(std::isnan(array.get(row * (d + gap_) + d + j)), "wrote after row %lld",
            static_cast<long long>(row));
}

}  // namespace pyfuse::test
