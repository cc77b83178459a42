// The Python module pyfuse._C: a table of contents. Each operation's arguments are in csrc/api.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"

namespace pyfuse {
void register_attention(pybind11::module_& m);
void register_attention_decode(pybind11::module_& m);
void register_decode_step(pybind11::module_& m);
void register_dropout(pybind11::module_& m);
void register_embed(pybind11::module_& m);
void register_linear(pybind11::module_& m);
void register_norm(pybind11::module_& m);
void register_rope(pybind11::module_& m);
void register_sample(pybind11::module_& m);
}  // namespace pyfuse

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyfuse's CPU kernels: pointers, sizes and strides in; nothing of torch is linked.";
  m.def("isa", &pyfuse::cpu::isa, "Name of the instruction set that the kernels use.");
  m.def("select_isa", &pyfuse::cpu::select_isa, "Use this instruction set from now on.");
  m.def("available_isas", &pyfuse::cpu::available_isas, "What this CPU can run, best first.");
  pyfuse::register_attention(m);
  pyfuse::register_attention_decode(m);
  pyfuse::register_decode_step(m);
  pyfuse::register_dropout(m);
  pyfuse::register_embed(m);
  pyfuse::register_linear(m);
  pyfuse::register_norm(m);
  pyfuse::register_rope(m);
  pyfuse::register_sample(m);
}
