// Python arguments -> AttentionGradient -> the kernels of attention's backward.
#include "api/cuda_arguments.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

// A block's rows, warps and bytes of shared memory.
struct Tiles {
  int rows, warps, shared;
};

// As attention_bwd_dkdv.cu has them; rows are keys.
Tiles key_tiles(DType dtype, int d, bool plain) {
  const bool half = size_of(dtype) == 2;
  const int parts = plain && half && d <= 64 ? 2 : 1;
  const int key_warps = half && (d == 96 || d == 128) ? 8 : !half && d == 256 ? 2 : 4;
  const int split = d < 256 ? 1 : half ? 2 : 4;
  const int block_m = d == 256 || (!half && d > 64) ? 16 : 32;
  const int stages = !half && d == 256 ? 1 : 2;
  const int rows = 16 * parts * key_warps;
  const int tiles = 2 * (rows + stages * block_m) * d * size_of(dtype);
  return {rows, key_warps * split, tiles + stages * 3 * block_m * 4 + 128};
}

// As attention_bwd_dq.cu has them; rows are queries.
Tiles query_tiles(DType dtype, int d, bool plain) {
  const bool half = size_of(dtype) == 2;
  const int warps = !half && d == 256 ? 2 : 4;
  const int rows = 16 * (plain && half && d <= 128 ? 2 : 1) * warps;
  const int block_n = !half && d == 256 ? 16 : 32;
  return {rows, warps, 2 * (rows + block_n) * d * size_of(dtype) + 128 + rows * 12};
}

// As attention_bwd_dmask.cu has them; rows are queries, and columns keys.
struct MaskTiles : Tiles {
  int columns;

  MaskTiles(DType dtype, int d) {
    const bool half = size_of(dtype) == 2;
    warps = !half && d == 256 ? 2 : 4;
    rows = 16 * warps;
    columns = d <= (half ? 128 : 64) ? 64 : !half && d == 256 ? 16 : 32;
    const int total = rows * (columns + 8) * 4;
    const int tiles = 2 * (rows + columns) * d * size_of(dtype);
    shared = total > tiles ? total : tiles;
  }
};

// Whether kernels without options do: a scale below 0 is no different, as nothing takes a maximum.
// (Those of half precision pass over a rest: it is far below what their products round.)
bool is_plain_gradient(AttentionCall p) {
  p.scale = 1.0f;
  return is_plain(p);
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
  const Tiles tiles = query_tiles(dtype, d, plain);
  Launch launch;
  launch.unit = unit_name("attention_bwd_dq", dtype, d);
  launch.entry = entry;
  launch.grid[0] = block_count(p, p.M, tiles.rows);
  launch.grid[1] = p.heads;
  launch.threads = 32 * tiles.warps;
  launch.shared = tiles.shared;
  start(on, launch, p);
}

// lse2, rest and delta, where there is a rest; else lse2 and delta by way of o.
void attention_terms(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  const AttentionGradient p = read_gradient(from);
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  if (p.terms.rest != nullptr) return launch_by_queries(on, p, dtype, "terms", false);
  Launch launch;
  launch.unit = std::string("attention_bwd_terms_") + name_of(dtype);
  launch.entry = "row_terms";
  const int chunks = static_cast<int>(ceil_div(p.dv, 8));
  const int lanes = chunks > 16 ? 32 : chunks > 8 ? 16 : chunks > 4 ? 8 : 4;
  const int64_t sequences = p.cu_q.data == nullptr ? p.batch : 1;
  launch.grid[0] = ceil_div(p.M, launch.threads / lanes) * sequences;
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
  const Tiles tiles = key_tiles(dtype, d, plain);
  Launch launch;
  launch.unit = unit_name("attention_bwd_dkdv", dtype, d);
  launch.entry = plain ? "dkdv" : "dkdv_options";
  launch.grid[0] = block_count(p, p.N, tiles.rows);
  launch.grid[1] = p.heads / p.group;
  launch.threads = 32 * tiles.warps;
  launch.shared = tiles.shared;
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
  const MaskTiles tiles(dtype, d);
  Launch launch;
  launch.unit = unit_name("attention_bwd_dmask", dtype, d);
  launch.entry = "dmask";
  launch.grid[0] = (p.rows_apart ? ceil_div(p.M, tiles.rows) : 1) *
                   (p.columns_apart ? ceil_div(p.N, tiles.columns) : 1) *
                   (p.batch / p.sharing_batches);
  launch.grid[1] = p.heads / p.sharing_heads;
  launch.threads = 32 * tiles.warps;
  launch.shared = tiles.shared;
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
