// Python arguments -> RopeParams, with the checks that the kernel leaves to its caller.
#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

void check(const RopeParams& p) {
  if (p.r < 0 || p.r > p.d || p.r % 2 != 0)
    throw std::invalid_argument("rope: cannot rotate " + std::to_string(p.r) + " of " +
                                std::to_string(p.d) + " elements");
  if (p.table_dtype != p.dtype && p.table_dtype != DType::f32)
    throw std::invalid_argument("rope: cos and sin must be of x's dtype or float32");
}

// Every position is looked at before the first is used: the kernel reads the table unchecked.
void check_positions(const RopeParams& p) {
  const int64_t sequences = p.position_stride[0] == 0 ? 1 : p.batch;
  for (int64_t b = 0; b < sequences; ++b)
    for (int64_t m = 0; m < p.rows; ++m) {
      const int64_t at = p.positions[b * p.position_stride[0] + m * p.position_stride[1]];
      if (at < 0 || at >= p.table_rows)
        throw std::out_of_range("positions: " + std::to_string(at) + " is outside the table of " +
                                std::to_string(p.table_rows) + " rows");
    }
}

void rope(uintptr_t x, const py::tuple& x_stride, uintptr_t y, const py::tuple& y_stride,
          uintptr_t cos, uintptr_t sin, int64_t table_batch_stride, int64_t table_row_stride,
          int64_t table_rows, uintptr_t positions, const py::tuple& position_stride,
          const py::tuple& sizes, int64_t r, int dtype, int table_dtype, bool interleaved,
          bool inverse, int threads) {
  RopeParams p{};
  int64_t size[4];
  read_strides(sizes, size);
  p.batch = size[0], p.heads = size[1], p.rows = size[2], p.d = size[3];
  if (p.batch == 0 || p.heads == 0 || p.rows == 0 || p.d == 0) return;
  p.x = address(x, "x");
  p.y = address(y, "y");
  p.r = r;
  p.cos = r > 0 ? address(cos, "cos") : nullptr;
  p.sin = r > 0 ? address(sin, "sin") : nullptr;
  read_strides(x_stride, p.x_stride);
  read_strides(y_stride, p.y_stride);
  p.table_stride[0] = table_batch_stride, p.table_stride[1] = table_row_stride;
  p.table_rows = table_rows;
  p.positions = static_cast<const int64_t*>(optional_address(positions));
  read_strides(position_stride, p.position_stride);
  p.dtype = dtype_of(dtype);
  p.table_dtype = dtype_of(table_dtype);
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.threads = at_least_one(threads);
  check(p);
  const py::gil_scoped_release release;
  if (p.positions != nullptr) check_positions(p);
  cpu::kernels().rope(p);
}

}  // namespace

void register_rope(py::module_& m) {
  m.def("rope", &rope, "Rotary embedding. sizes = (B, H, M, D), r of D are rotated; see params.h.");
}

}  // namespace pyfuse
