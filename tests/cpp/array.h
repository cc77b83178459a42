// Tensors of any dtype for the kernels' tests: in memory of their exact size, NaN where no value
// was set, read and written as double.
#pragma once
#include <vector>

#include "check.h"

namespace pyfuse::test {

constexpr DType dtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

const char* name_of(DType dtype);
int64_t size_of(DType dtype);
double epsilon(DType dtype);      // from 1 to the next value
double accumulator(DType dtype);  // epsilon of what the kernels compute in
bool is_half(DType dtype);
double rounded(double x, DType dtype);

// |actual - exact| <= tolerance, or both the same infinity.
bool close(double actual, double exact, double tolerance);

class Array {
 public:
  Array(DType dtype, int64_t count) : dtype(dtype), count(count), memory_(count * size_of(dtype)) {}
  double get(int64_t i) const;
  void set(int64_t i, double x);  // rounded to dtype
  void fill_random(double scale = 1);
  void* data() const { return memory_.data(); }
  int64_t bytes() const { return count * size_of(dtype); }

  const DType dtype;
  const int64_t count;

 private:
  Memory memory_;
};

// Every byte alike: that is, for every number of threads.
bool same_bytes(const Array& a, const Array& b);

// [rows, d] of random values, `gap` elements of NaN between the rows.
struct Rows {
  Rows(DType dtype, int64_t rows, int64_t d, int64_t gap = 3, double centre = 0, double scale = 1);
  double get(int64_t r, int64_t j) const { return array.get(r * stride + j); }
  const int64_t rows, d, stride;
  Array array;
};

// [B, H, T, D] as it is (heads_first) or as models hand it over, [B, T, H, D] in memory; `gap`
// elements of NaN lie between rows.
class Tensor {
 public:
  Tensor(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t d, bool heads_first,
         int64_t gap = 3);
  double get(int64_t b, int64_t h, int64_t t, int64_t j) const { return array.get(at(b, h, t, j)); }
  void set(int64_t b, int64_t h, int64_t t, int64_t j, double x) { array.set(at(b, h, t, j), x); }
  void fill_random(double scale = 1);
  void copy_strides(int64_t (&to)[3]) const;
  void check_gaps() const;  // nothing was written there

  const int64_t batch, heads, rows, d;
  Array array;

 private:
  int64_t at(int64_t b, int64_t h, int64_t t, int64_t j) const {
    return b * stride_[0] + h * stride_[1] + t * stride_[2] + j;
  }
  int64_t gap_, stride_[3];
};

}  // namespace pyfuse::test
