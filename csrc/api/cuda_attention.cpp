// Python arguments -> AttentionForward -> the kernel for its head size and options.
#include "api/cuda_arguments.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

// As attention_fwd.cu has them.
struct ForwardTiles {
  int block_m, shared;

  ForwardTiles(DType dtype, int d, bool plain) {
    const bool half = size_of(dtype) == 2;
    const int largest_n = half ? 64 : d <= 64 ? 64 : d == 256 ? 16 : 32;
    const int block_n = plain ? largest_n : largest_n < 64 ? largest_n : 32;
    block_m = plain && half && d <= 128 ? 128 : 64;
    shared = (block_m + 2 * block_n) * d * size_of(dtype) + 128;  // and what its threads share
  }
};

// The order is that of pyfuse/backends/cuda_attention.py.
void attention_forward(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  AttentionForward p{};
  static_cast<AttentionCall&>(p) = read_attention(from);
  p.o = from.address("o"), from.integers(p.o_stride);
  p.lse = static_cast<float*>(from.address()), from.integers(p.lse_stride);
  const int d = head_size(p);
  const bool plain = is_plain(p);
  const ForwardTiles tiles(dtype, d, plain);
  Launch launch;
  launch.unit = unit_name("attention_fwd", dtype, d);
  launch.entry = plain ? "forward" : "forward_options";
  launch.grid[0] = block_count(p, p.M, tiles.block_m);
  launch.grid[1] = p.heads;
  launch.shared = tiles.shared;
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward", attention_forward, "Attention; the order of `call` is in csrc/api.");
}

}  // namespace pyfuse::cuda
