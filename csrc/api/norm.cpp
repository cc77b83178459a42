// Python arguments -> NormParams, with the checks that the kernel leaves to its caller.
#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

void check(const NormParams& p) {
  if (p.z != nullptr && p.residual == nullptr)
    throw std::invalid_argument("norm: z is only written where there is a residual");
  if (p.rms && p.bias != nullptr) throw std::invalid_argument("norm: RMSNorm has no bias");
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  if (p.weight_dtype != p.dtype && !(half && p.weight_dtype == DType::f32))
    throw std::invalid_argument("norm: weights must be of x's dtype, or float32 beside a half one");
}

void norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y,
          uintptr_t z, int64_t rows, int64_t d, int64_t x_stride, int64_t residual_stride,
          int dtype, int weight_dtype, double eps, bool rms, bool round_first, double weight_plus,
          int threads) {
  if (rows == 0 || d == 0) return;
  NormParams p{};
  p.x = address(x, "x");
  p.residual = optional_address(residual);
  p.weight = optional_address(weight);
  p.bias = optional_address(bias);
  p.y = address(y, "y");
  p.z = optional_address(z);
  p.rows = rows, p.d = d;
  p.x_stride = x_stride, p.residual_stride = residual_stride;
  p.y_stride = d, p.z_stride = d;
  p.dtype = dtype_of(dtype);
  p.weight_dtype = dtype_of(weight_dtype);
  p.eps = eps;
  p.rms = rms, p.round_first = round_first, p.weight_plus = weight_plus;
  p.threads = at_least_one(threads);
  check(p);
  const py::gil_scoped_release release;
  cpu::kernels().norm(p);
}

}  // namespace

void register_norm(py::module_& m) {
  m.def("norm", &norm, "LayerNorm or RMSNorm of [rows, d] into contiguous rows; see params.h.");
}

}  // namespace pyfuse
