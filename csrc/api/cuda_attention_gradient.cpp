// Python arguments -> AttentionGradient -> the kernels of attention's backward.
#include "api/cuda_arguments.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

// Whether kernels without options do: a scale below 0 is no different, as nothing takes a maximum.
// (Those of half precision pass over a rest: it is far below what their products round.)
bool is_plain_gradient(AttentionCall p) {
  p.scale = 1.0f;
  return p.aligned && is_plain(p);
}

// The order is that of pyfuse/backends/cuda_attention_gradient.py.
AttentionGradient read_gradient(Arguments& from) {
  AttentionGradient p{};
  static_cast<AttentionCall&>(p) = read_attention(from);
  p.o = from.address("o"), from.integers(p.o_stride);
  p.d_o = from.address("do"), from.integers(p.do_stride);
  p.d_lse = static_cast<const float*>(from.address()), from.integers(p.dlse_stride);
  p.terms.lse = static_cast<const float*>(from.address("lse"));
  p.terms.lse2 = static_cast<float*>(from.address("lse2"));
  p.terms.rest = static_cast<float*>(from.address());
  p.terms.delta = static_cast<float*>(from.address("delta"));
  from.integers(p.terms.stride);
  p.factor = static_cast<float>(from.real());
  return p;
}

void launch_by_queries(const Gpu& on, const AttentionGradient& p, DType dtype, const char* entry,
                       bool plain) {
  const int d = head_size(p);
  const QueryGradientTiles tiles(size_of(dtype), d, plain);
  Launch launch;
  launch.unit = unit_name("attention_bwd_dq", dtype, d);
  launch.entry = entry;
  launch.grid[0] = block_count(p, p.M, tiles.rows());
  launch.grid[1] = p.heads;
  launch.threads = tiles.threads();
  launch.shared = tiles.bytes();
  start(on, launch, p);
}

// lse2, rest and delta, where there is a rest; else lse2 and delta by way of o.
void attention_terms(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  AttentionGradient p = read_gradient(from);
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  if (p.terms.rest != nullptr) return launch_by_queries(on, p, dtype, "terms", false);
  Launch launch;
  launch.unit = std::string("attention_bwd_terms_") + name_of(dtype);
  launch.entry = "row_terms";
  const int64_t chunks = ceil_div(p.dv, 8);  // a lane for each, if a warp has them
  p.row_lanes = chunks > 16 ? 32 : chunks > 8 ? 16 : chunks > 4 ? 8 : 4;
  const int64_t sequences = p.cu_q.data == nullptr ? p.batch : 1;
  launch.grid[0] = ceil_div(p.M, launch.threads / p.row_lanes) * sequences;
  launch.grid[1] = p.heads;
  start(on, launch, p);
}

void attention_dkdv(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  AttentionGradient p = read_gradient(from);
  p.d_k = from.address("dk"), from.integers(p.dk_stride);
  p.d_v = from.address("dv"), from.integers(p.dv_stride);
  const int d = head_size(p);
  const bool plain = is_plain_gradient(p);
  const KeyGradientTiles tiles(size_of(dtype), d, plain);
  Launch launch;
  launch.unit = unit_name("attention_bwd_dkdv", dtype, d);
  launch.entry = plain ? "dkdv" : "dkdv_options";
  launch.grid[0] = block_count(p, p.N, tiles.rows());
  launch.grid[1] = p.heads / p.group;
  launch.threads = tiles.threads();
  launch.shared = tiles.bytes();
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

void attention_dq(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  AttentionGradient p = read_gradient(from);
  p.d_q = from.address("dq"), from.integers(p.dq_stride);
  p.d_slopes = static_cast<float*>(from.address());
  const bool plain = is_plain_gradient(p);
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  launch_by_queries(on, p, dtype, plain ? "dq" : "dq_options", plain);
}

void attention_dmask(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  AttentionGradient p = read_gradient(from);
  p.d_mask = from.address("dmask"), p.dmask_kind = narrow(from.integer());
  p.sharing_batches = narrow(from.integer()), p.sharing_heads = narrow(from.integer());
  p.rows_apart = from.integer() != 0, p.columns_apart = from.integer() != 0;
  from.integers(p.dmask_stride);
  const int d = head_size(p);
  const MaskGradientTiles tiles(size_of(dtype), d);
  Launch launch;
  launch.unit = unit_name("attention_bwd_dmask", dtype, d);
  launch.entry = "dmask";
  launch.grid[0] = (p.rows_apart ? ceil_div(p.M, tiles.rows()) : 1) *
                   (p.columns_apart ? ceil_div(p.N, tiles.block_n) : 1) *
                   (p.batch / p.sharing_batches);
  launch.grid[1] = p.heads / p.sharing_heads;
  launch.threads = tiles.threads();
  launch.shared = tiles.bytes();
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

}  // namespace

void register_attention_gradient(py::module_& m) {
  m.def("attention_terms", attention_terms, "What the backward needs of each row.");
  m.def("attention_dkdv", attention_dkdv, "The gradients of k and v.");
  m.def("attention_dq", attention_dq, "The gradient of q, and each query's share of the slopes'.");
  m.def("attention_dmask", attention_dmask, "The gradient of an additive mask.");
}

}  // namespace pyfuse::cuda
