// Python arguments -> LinearParams -> kernel.
#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

void few_rows(const LinearParams& p) { cpu::kernels().linear(&p, 1); }
void many_rows(const LinearParams& p) { cpu::kernels().linear_packed(p); }

template <void (*kernel)(const LinearParams&)>
void linear(uintptr_t x, int64_t x_stride, uintptr_t w, int64_t w_stride, uintptr_t bias,
            uintptr_t y, int64_t y_stride, int64_t rows, int64_t n, int64_t k, int dtype,
            int activation, uintptr_t multiply, int64_t multiply_stride, uintptr_t residual,
            int64_t residual_stride, int threads) {
  if (rows <= 0 || n <= 0) return;
  LinearParams p{};
  p.x = k > 0 ? address(x, "x") : nullptr;
  p.w = k > 0 ? address(w, "weight") : nullptr;
  p.y = address(y, "y");
  p.bias = optional_address(bias);
  p.multiply = optional_address(multiply);
  p.residual = optional_address(residual);
  p.rows = rows, p.n = n, p.k = k;
  p.x_stride = x_stride, p.w_stride = w_stride, p.y_stride = y_stride;
  p.multiply_stride = multiply_stride, p.residual_stride = residual_stride;
  p.dtype = dtype_of(dtype);
  p.activation = activation_of(activation);
  p.threads = at_least_one(threads);
  const py::gil_scoped_release release;
  kernel(p);
}

// Several layers of the same x in one call: layers = [(w, w_stride, bias, y, N, activation), ...].
void linear_together(uintptr_t x, int64_t rows, int64_t k, int dtype, int threads,
                     const py::sequence& layers) {
  constexpr size_t most = 4;
  if (layers.size() > most) throw std::invalid_argument("layers: more than 4 in one call");
  if (rows <= 0 || layers.size() == 0) return;
  LinearParams params[most];
  for (size_t i = 0; i < layers.size(); ++i) {
    const py::tuple layer = layers[i];
    LinearParams& p = params[i] = LinearParams{};
    p.x = k > 0 ? address(x, "x") : nullptr;
    p.w = k > 0 ? address(layer[0].cast<uintptr_t>(), "weight") : nullptr;
    p.bias = optional_address(layer[2].cast<uintptr_t>());
    p.y = address(layer[3].cast<uintptr_t>(), "y");
    p.rows = rows, p.k = k, p.n = layer[4].cast<int64_t>();
    p.x_stride = k, p.w_stride = layer[1].cast<int64_t>(), p.y_stride = p.n;
    p.dtype = dtype_of(dtype);
    p.activation = activation_of(layer[5].cast<int>());
    p.threads = at_least_one(threads);
  }
  const py::gil_scoped_release release;
  cpu::kernels().linear(params, static_cast<int>(layers.size()));
}

void pack(uintptr_t w, int64_t w_stride, uintptr_t packed, int64_t n, int64_t k, int dtype,
          int threads) {
  if (n <= 0 || k <= 0) return;
  LinearParams p{};
  p.w = address(w, "weight");
  p.y = address(packed, "packed");
  p.n = n, p.k = k, p.w_stride = w_stride;
  p.dtype = dtype_of(dtype);
  p.threads = at_least_one(threads);
  const py::gil_scoped_release release;
  cpu::kernels().pack_linear(p);
}

}  // namespace

void register_linear(py::module_& m) {
  m.def("linear", &linear<few_rows>,
        "y = act(x wT + bias) * multiply + residual for few rows; see params.h.");
  m.def("linear_together", &linear_together, "Layers of one x, few rows; see csrc/api/linear.cpp.");
  m.def("linear_packed", &linear<many_rows>,
        "The same for many rows, with w as pack_linear left it (w_stride is not used).");
  m.def("pack_linear", &pack, "w [N, K] -> packed [ceil(N / panel)][K][panel].");
  m.attr("packed_linear_panel") = cpu::packed_linear_panel;
}

}  // namespace pyfuse
