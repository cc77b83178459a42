// Rotary embedding against its formula in double.
#include <string.h>

#include <cmath>

#include "array.h"
#include "cpu/isa.h"

namespace pyfuse::test {
namespace {

struct Case {
  DType dtype, table_dtype;
  int64_t rows, d, r;
  bool interleaved, heads_first, positions, in_place, table_per_batch, inverse = false;
};

constexpr int64_t batch = 2, heads = 3, table_gap = 1;

class Checked {
 public:
  explicit Checked(const Case& c)
      : c(c),
        table_rows(c.positions ? 2 * c.rows : c.rows),
        x(c.dtype, batch, heads, c.rows, c.d, c.heads_first),
        cos(table()),
        sin(table()),
        positions(static_cast<int64_t>(batch * c.rows * sizeof(int64_t))) {
    x.fill_random(), cos.fill_random(), sin.fill_random();
    for (int64_t i = 0; i < batch * c.rows; ++i)
      positions_at()[i] =
          static_cast<int64_t>((random_unit() + 1) / 2 * static_cast<double>(table_rows));
    Tensor y = like_x(), by_two = like_x();
    run(y, 1), run(by_two, 2);
    CHECK(same_bytes(y.array, by_two.array), "other bits on 2 threads");
    check(y);
  }

 private:
  Tensor like_x() const { return Tensor(c.dtype, batch, heads, c.rows, c.d, c.heads_first); }
  Tensor table() const {  // as one head of [B, 1, rows, r/2]
    return Tensor(c.table_dtype, c.table_per_batch ? batch : 1, 1, table_rows, c.r / 2, true,
                  table_gap);
  }
  int64_t* positions_at() const { return static_cast<int64_t*>(positions.data()); }

  void run(Tensor& y, int threads) const {
    if (c.in_place) memcpy(y.array.data(), x.array.data(), static_cast<size_t>(x.array.bytes()));
    RopeParams p{};
    p.x = c.in_place ? y.array.data() : x.array.data();
    p.y = y.array.data();
    p.cos = cos.array.data(), p.sin = sin.array.data();
    p.batch = batch, p.heads = heads, p.rows = c.rows, p.d = c.d, p.r = c.r;
    x.copy_strides(p.x_stride), y.copy_strides(p.y_stride);
    int64_t stride[3];
    cos.copy_strides(stride);
    p.table_stride[0] = c.table_per_batch ? stride[0] : 0, p.table_stride[1] = stride[2];
    p.table_rows = table_rows;
    if (c.positions) {
      p.positions = positions_at();
      p.position_stride[0] = c.rows, p.position_stride[1] = 1;
    }
    p.dtype = c.dtype, p.table_dtype = c.table_dtype;
    p.interleaved = c.interleaved, p.inverse = c.inverse;
    p.threads = threads;
    cpu::kernels().rope(p);
    y.check_gaps();
  }

  void check(const Tensor& y) const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t m = 0; m < c.rows; ++m) {
          for (int64_t i = 0; i < c.r / 2; ++i) check_pair(y, b, h, m, i);
          for (int64_t j = c.r; j < c.d; ++j)
            CHECK(y.get(b, h, m, j) == x.get(b, h, m, j), "element %d is not rotated", int(j));
        }
  }

  void check_pair(const Tensor& y, int64_t b, int64_t h, int64_t m, int64_t i) const {
    const int64_t row = c.positions ? positions_at()[b * c.rows + m] : m;
    const int64_t sequence = c.table_per_batch ? b : 0;
    const double cosine = cos.get(sequence, 0, row, i);
    const double sine = (c.inverse ? -1 : 1) * sin.get(sequence, 0, row, i);
    const int64_t first = c.interleaved ? 2 * i : i,
                  second = c.interleaved ? first + 1 : i + c.r / 2;
    const double x1 = x.get(b, h, m, first), x2 = x.get(b, h, m, second);
    check_value(y.get(b, h, m, first), x1 * cosine, -x2 * sine, first);
    check_value(y.get(b, h, m, second), x2 * cosine, x1 * sine, second);
  }

  void check_value(double y, double one, double other, int64_t j) const {
    const double tolerance = accumulator(c.dtype) * (std::fabs(one) + std::fabs(other)) +
                             0.51 * epsilon(c.dtype) * std::fabs(one + other) +
                             (is_half(c.dtype) ? 0x1p-25 : 0);
    CHECK(close(y, one + other, tolerance), "%s, d %d, r %d, %s: element %d: %.9g, needs %.9g",
          name_of(c.dtype), int(c.d), int(c.r), c.interleaved ? "interleaved" : "half", int(j), y,
          one + other);
  }

  const Case c;
  const int64_t table_rows;
  Tensor x, cos, sin;
  Memory positions;
};

void check_sizes(Case c) {
  const int64_t sizes[][3] = {{1, 2, 2},    {3, 6, 4},   {17, 64, 64},  {5, 80, 32},
                              {33, 34, 34}, {2, 65, 10}, {3, 600, 590}, {200, 64, 64}};
  for (const auto& size : sizes) {
    c.rows = size[0], c.d = size[1], c.r = size[2];
    for (const DType dtype : dtypes) {
      c.dtype = c.table_dtype = dtype;
      const Checked own(c);
      c.table_dtype = DType::f32;
      const Checked wide(c);
    }
  }
}

TEST(halves) {
  check_sizes({DType::f32, DType::f32, 0, 0, 0, false, false, false, false, false});
  check_sizes({DType::f32, DType::f32, 0, 0, 0, false, true, false, true, true});
}

TEST(interleaved) {
  check_sizes({DType::f32, DType::f32, 0, 0, 0, true, false, false, false, true});
  check_sizes({DType::f32, DType::f32, 0, 0, 0, true, true, false, true, false});
}

TEST(inverse) {
  check_sizes({DType::f32, DType::f32, 0, 0, 0, false, false, false, false, false, true});
  check_sizes({DType::f32, DType::f32, 0, 0, 0, true, true, true, true, false, true});
}

TEST(positions) {
  check_sizes({DType::f32, DType::f32, 0, 0, 0, false, false, true, false, false});
  check_sizes({DType::f32, DType::f32, 0, 0, 0, true, true, true, true, false});
}

}  // namespace
}  // namespace pyfuse::test
