// Python arguments -> DropoutParams -> kernel.
#include "api/arguments.h"
#include "api/caches.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

void dropout(uintptr_t x, uintptr_t flow, uintptr_t y, uintptr_t seed, int64_t rows, int64_t d,
             int64_t x_stride, int64_t flow_stride, int dtype, int activation, double probability,
             int threads) {
  if (rows == 0 || d == 0) return;
  DropoutParams p{};
  p.dtype = dtype_of(dtype);
  p.activation = activation_of(activation);
  p.flow = optional_address(flow);
  const bool unread = p.flow != nullptr && p.activation == Activation::none;
  p.x = unread ? optional_address(x) : address(x, "x");
  p.y = address(y, "y");
  p.seed = static_cast<const int64_t*>(optional_address(seed));
  if (!(probability >= 0 && probability < 1)) throw std::invalid_argument("p: needs 0 <= p < 1");
  p.p = probability;
  p.rows = rows, p.d = d;
  p.x_stride = x_stride, p.flow_stride = flow_stride;
  const int64_t bytes = rows * d * size_of(p.dtype), operands = p.flow == nullptr || unread ? 2 : 3;
  p.stream = operands * bytes > cache_bytes && takes_streams(p.y, d * size_of(p.dtype));
  prefer_huge_pages(p.y, bytes);
  p.threads = at_least_one(threads);
  const py::gil_scoped_release release;
  cpu::kernels().dropout(p);
}

}  // namespace

void register_dropout(py::module_& m) {
  m.def("dropout", &dropout, "dropout(act(x)) of [rows, d], or the gradient of x; see params.h.");
}

}  // namespace pyfuse
