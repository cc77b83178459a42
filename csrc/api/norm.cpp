// Python arguments -> NormParams and NormGradientParams, with the checks that the kernels leave to
// their caller.
#include "api/arguments.h"
#include "api/caches.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

bool is_half(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

struct Rows {
  void* memory;
  DType dtype;
};

// Results go past the caches where they and what they are made of would not stay there. Neither
// choice changes a bit of the results.
void fit_caches(NormArguments& p, int64_t bytes_per_element, std::initializer_list<Rows> results) {
  const int64_t bytes = p.rows * p.d * bytes_per_element;
  p.row_by_row = bytes > cache_bytes / 2;
  p.stream = bytes > cache_bytes;
  for (const Rows& result : results) {
    p.stream = p.stream && takes_streams(result.memory, p.d * size_of(p.dtype));
    if (result.memory != nullptr)
      prefer_huge_pages(result.memory, p.rows * p.d * size_of(result.dtype));
  }
}

struct DTypes {
  int x, z, y, weight, bias;
};

void fill(NormArguments& p, const DTypes& dtypes, int kind, double eps, uintptr_t dropout_seed,
          double dropout_p, int threads) {
  p.dtype = dtype_of(dtypes.x), p.z_dtype = dtype_of(dtypes.z), p.y_dtype = dtype_of(dtypes.y);
  p.weight_dtype = dtype_of(dtypes.weight);
  if (kind < 0 || kind > static_cast<int>(NormKind::torch))
    throw std::invalid_argument("norm: no such kind: " + std::to_string(kind));
  p.kind = static_cast<NormKind>(kind);
  p.eps = eps;
  p.dropout_seed = static_cast<const int64_t*>(optional_address(dropout_seed));
  p.dropout_p = dropout_p;
  p.threads = at_least_one(threads);
  const auto fits = [&](DType dtype) {
    return dtype == p.dtype || (is_half(p.dtype) && dtype == DType::f32);
  };
  if (!fits(p.z_dtype))
    throw std::invalid_argument(
        "norm: residual must be of x's dtype, or float32 beside a half one");
  if (!fits(p.y_dtype) || (p.y_dtype != p.dtype && p.kind != NormKind::llama))
    throw std::invalid_argument(
        "norm: y must be of x's dtype, or float32 in Llama's casting of a half one");
}

void norm(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t y,
          uintptr_t z, uintptr_t dropout_seed, int64_t rows, int64_t d, int64_t x_stride,
          int64_t residual_stride, int dtype, int z_dtype, int y_dtype, int weight_dtype,
          int bias_dtype, int kind, double eps, double dropout_p, int threads) {
  if (rows == 0 || d == 0) return;
  NormParams p{};
  fill(p, {dtype, z_dtype, y_dtype, weight_dtype, bias_dtype}, kind, eps, dropout_seed, dropout_p,
       threads);
  p.x = address(x, "x");
  p.residual = optional_address(residual);
  p.weight = optional_address(weight);
  p.bias = optional_address(bias);
  p.bias_dtype = dtype_of(bias_dtype);
  p.y = address(y, "y");
  p.z = optional_address(z);
  if (p.z != nullptr && p.residual == nullptr && p.dropout_seed == nullptr)
    throw std::invalid_argument("norm: z is x without residual and dropout; it is not written");
  p.rows = rows, p.d = d;
  p.x_stride = x_stride, p.residual_stride = residual_stride;
  const int64_t z_bytes = size_of(p.z_dtype);
  const int64_t optional = (p.residual != nullptr ? z_bytes : 0) + (p.z != nullptr ? z_bytes : 0);
  fit_caches(p, size_of(p.dtype) + size_of(p.y_dtype) + optional,
             {{p.y, p.y_dtype}, {p.z, p.z_dtype}});
  const py::gil_scoped_release release;
  cpu::kernels().norm(p);
}

// strides: of the rows of x, residual, z, dy and dz; gradients are contiguous.
void norm_gradient(uintptr_t x, uintptr_t residual, uintptr_t z, uintptr_t dy, uintptr_t dz,
                   uintptr_t dx, uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias,
                   uintptr_t weight, uintptr_t dropout_seed, int64_t rows, int64_t d,
                   const py::tuple& strides, int dtype, int z_dtype, int y_dtype, int weight_dtype,
                   int bias_dtype, int kind, double eps, double dropout_p, int threads) {
  NormGradientParams p{};
  fill(p, {dtype, z_dtype, y_dtype, weight_dtype, bias_dtype}, kind, eps, dropout_seed, dropout_p,
       threads);
  int64_t stride[5];
  read_strides(strides, stride);
  p.rows = rows, p.d = d;
  p.residual = optional_address(residual);
  p.z = optional_address(z);
  p.x = p.z != nullptr || rows == 0 ? optional_address(x) : address(x, "x");
  p.weight = optional_address(weight);
  p.dy = rows == 0 ? nullptr : address(dy, "dy");
  p.dz = optional_address(dz);
  p.dx = optional_address(dx);
  p.dresidual = optional_address(dresidual);
  p.dweight = optional_address(dweight);
  p.dbias = optional_address(dbias);
  p.bias_dtype = dtype_of(bias_dtype);
  p.x_stride = stride[0], p.residual_stride = stride[1], p.z_stride = stride[2];
  p.dy_stride = stride[3], p.dz_stride = stride[4];
  const int64_t z_bytes = size_of(p.z_dtype);
  const int64_t optional = (p.dx != nullptr ? size_of(p.dtype) : 0) +
                           (p.dz != nullptr ? z_bytes : 0) + (p.dresidual != nullptr ? z_bytes : 0);
  fit_caches(p, size_of(p.dtype) + size_of(p.y_dtype) + optional,
             {{p.dx, p.dtype}, {p.dresidual, p.z_dtype}});
  const py::gil_scoped_release release;
  cpu::kernels().norm_gradient(p);
}

}  // namespace

void register_norm(py::module_& m) {
  m.def("norm", &norm, "LayerNorm or RMSNorm of [rows, d] into contiguous rows; see params.h.");
  m.def("norm_gradient", &norm_gradient, "The gradients that are not null pointers; see params.h.");
}

}  // namespace pyfuse
