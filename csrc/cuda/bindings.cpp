// The Python module pyfuse._cuda: a table of contents. Each operation's arguments are in csrc/api.
#include <pybind11/pybind11.h>

namespace pyfuse::cuda {
void register_launch(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_embed(pybind11::module_& m);
void register_rope(pybind11::module_& m);
void register_decode(pybind11::module_& m);
void register_norm(pybind11::module_& m);
void register_attention_gradient(pybind11::module_& m);
}  // namespace pyfuse::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "pyfuse's CUDA kernels: pointers, sizes and strides in; nothing of torch is linked.";
  pyfuse::cuda::register_launch(m);
  pyfuse::cuda::register_attention(m);
  pyfuse::cuda::register_embed(m);
  pyfuse::cuda::register_rope(m);
  pyfuse::cuda::register_decode(m);
  pyfuse::cuda::register_norm(m);
  pyfuse::cuda::register_attention_gradient(m);
}
