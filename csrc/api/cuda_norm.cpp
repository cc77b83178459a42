// Python arguments -> NormForward, NormBackward -> the kernels for their rows' size and alignment.
#include <algorithm>
#include <initializer_list>

#include "api/cuda_arguments.h"
#include "cuda/norm_params.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

int32_t read_dtype(Arguments& from) {
  const DType dtype = dtype_of(from.integer());
  name_of(dtype);  // throws for any that the kernels lack
  return static_cast<int32_t>(dtype);
}

// (address, elements between rows, dtype); a null address raises where there is a name.
NormRows read_rows(Arguments& from, const char* name = nullptr) {
  void* const data = from.address(name);
  const int64_t stride = from.integer();
  return {data, stride, read_dtype(from)};
}

NormVector read_vector(Arguments& from) {
  const void* const data = from.address();
  return {data, read_dtype(from)};
}

void read_call(Arguments& from, NormCall& p) {
  p.x = read_rows(from, "x"), p.residual = read_rows(from);
  p.weight = read_vector(from), p.bias = read_vector(from);
  p.mean = static_cast<float*>(from.address()), p.rstd = static_cast<float*>(from.address());
  p.rows = from.integer();
  const int64_t d = from.integer();
  if (d <= 0 || d > 1 << 30)
    throw std::invalid_argument("d: the kernels have 1 to 2^30 columns, got " + std::to_string(d));
  p.d = static_cast<int32_t>(d), p.inverse = 1.0f / static_cast<float>(d);
  const int64_t kind = from.integer();
  if (kind < NORM_LAYER || kind > NORM_TORCH)
    throw std::invalid_argument("no such kind: " + std::to_string(kind));
  p.kind = static_cast<int32_t>(kind);
  p.key[0] = static_cast<uint32_t>(from.integer());
  p.key[1] = static_cast<uint32_t>(from.integer());
  p.threshold = static_cast<int32_t>(from.integer());
  p.keep_scale = static_cast<float>(from.real());
}

bool multiple(const void* data, int64_t of) { return reinterpret_cast<uintptr_t>(data) % of == 0; }

// How many neighbours a lane moves together (norm_row.cuh): as many as 16 bytes hold of the widest
// tensor, if all rows begin at multiples of what that is of them.
int unit_of(const NormCall& p, std::initializer_list<NormRows> others) {
  const auto fits = [&](int unit) {
    const auto rows = [&](const NormRows& t) {
      if (t.data == nullptr) return true;
      const int size = size_of(static_cast<DType>(t.dtype));
      return unit * size <= 16 && multiple(t.data, unit * size) &&
             (p.rows == 1 || t.stride % unit == 0);
    };
    const auto vector = [&](const NormVector& t) {
      return multiple(t.data, std::min(16, unit * size_of(static_cast<DType>(t.dtype))));
    };
    return p.d % unit == 0 && rows(p.x) && rows(p.residual) && vector(p.weight) && vector(p.bias) &&
           std::all_of(others.begin(), others.end(), rows);
  };
  return fits(8) ? 8 : fits(4) ? 4 : 1;
}

// How rows are shared by threads. elements: of a row in each thread; 0: rows go through a block in
// stretches.
struct Shape {
  int elements = 0, lanes = 512, threads = 512;
};

Shape shape_of(int d, int elements, int unit) {
  const int lanes = static_cast<int>(ceil_div(d, elements));
  Shape shape{elements, unit < 8 ? 4 : 1, 256};  // four: whole sectors
  while (shape.lanes < lanes && shape.lanes < 32) shape.lanes *= 2;
  if (lanes > 32) shape.lanes = static_cast<int>(ceil_div(lanes, 32)) * 32;
  shape.threads = std::max(256 / shape.lanes, 1) * shape.lanes;
  return shape;
}

// The figures are those of the entries of norm.cu and norm_bwd.cu. What a warp does for a row as a
// whole costs as much as a dozen columns: so many columns a thread as registers allow, except for
// rows that would then leave most of a warp without any.
Shape forward_shape(int d, int unit) {
  if (d <= (unit == 1 ? 2048 : 256)) return shape_of(d, 8, unit);
  if (unit > 1 && d <= 8192) return shape_of(d, 16, unit);
  return unit == 8 && d <= 16384 ? shape_of(d, 32, unit) : Shape{};
}

Shape backward_shape(int d, int unit) {
  const int elements = unit == 1 ? 4 : unit == 8 && d > 256 ? 16 : 8;
  return d <= 512 * elements ? shape_of(d, elements, unit) : Shape{};
}

// Bytes of shared memory: of 16 columns a thread has the weight there, and where a block has
// several rows at a time, their sums are joined there.
int backward_shared(const Shape& shape) {
  if (shape.threads > shape.lanes) return shape.threads * shape.elements * 8;
  return shape.elements == 16 ? shape.threads * 64 : 0;
}

Launch launch_of(const char* kernel, const Shape& shape, int unit) {
  Launch launch;
  launch.unit = std::string(kernel) + "_" + std::to_string(unit);
  launch.entry = shape.elements == 0 ? "stretches" : "elements" + std::to_string(shape.elements);
  launch.threads = shape.threads;
  return launch;
}

// As many blocks as run at once, for so many threads of a multiprocessor; each goes through many
// rows.
int64_t blocks_of(const Gpu& on, const Shape& shape, int64_t rows, int threads) {
  const int64_t at_once = int64_t{on.processors} * std::max(1, threads / shape.threads);
  return std::min(ceil_div(rows, shape.threads / shape.lanes), at_once);
}

// The order is that of pyfuse/backends/cuda_norm.py.
void norm_forward(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  NormForward p{};
  read_call(from, p);
  p.y = read_rows(from), p.z = read_rows(from);
  p.eps = static_cast<float>(from.real());
  const Gpu on = read_gpu(gpu);
  const int unit = unit_of(p, {p.y, p.z});
  const Shape shape = forward_shape(p.d, unit);
  p.lanes = shape.lanes;
  Launch launch = launch_of("norm", shape, unit);
  launch.grid[0] = blocks_of(on, shape, p.rows, shape.elements >= 16 ? 512 : 1024);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

// The sums of `blocks` blocks' rows, where a kernel has not made them on the way.
void start_columns(const Gpu& on, NormBackward p, int64_t blocks, int unit) {
  p.lanes = 32;
  const int chunks = unit == 1 ? 4 : 1;  // of a lane
  Launch launch = launch_of("norm_bwd", {}, unit);
  launch.entry = "columns";
  launch.threads = 256;
  launch.shared = launch.threads * unit * chunks * 8;  // two sums
  launch.grid[0] = blocks, launch.grid[1] = ceil_div(p.d, 32 * unit * chunks);
  start(on, launch, p);
}

// The rows of sums, dweight and dbias have `blocks` rows; the order is that of
// pyfuse/backends/cuda_norm_gradient.py.
void norm_backward(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  NormBackward p{};
  read_call(from, p);
  p.dy = read_rows(from, "dy"), p.dz = read_rows(from);
  p.dx = read_rows(from), p.dresidual = read_rows(from);
  p.drop = from.integer() != 0;
  const int64_t blocks = from.integer();
  p.dweight = static_cast<float*>(from.address()), p.dbias = static_cast<float*>(from.address());
  const NormRows out[2] = {read_rows(from), read_rows(from)};
  const Gpu on = read_gpu(gpu);
  const int unit = unit_of(p, {p.dy, p.dz, p.dx, p.dresidual});
  const Shape shape = backward_shape(p.d, unit);
  const bool parameters = p.dweight != nullptr || p.dbias != nullptr;
  const bool rows = p.dx.data != nullptr || p.dresidual.data != nullptr;
  p.lanes = shape.lanes;
  Launch launch = launch_of("norm_bwd", shape, unit);
  launch.shared = backward_shared(shape);
  launch.grid[0] = shape.elements == 0 ? blocks_of(on, shape, p.rows, 512) : blocks;
  const py::gil_scoped_release release;
  if (shape.elements > 0 || rows) start(on, launch, p);
  if (!parameters) return;
  if (shape.elements == 0) start_columns(on, p, blocks, unit);
  const NormSums sums{{p.dweight, p.dbias}, {out[0], out[1]}, static_cast<int32_t>(blocks), p.d};
  Launch added;
  added.unit = "norm_sums", added.entry = "add_blocks", added.threads = 1024;
  added.grid[0] = ceil_div(p.d, 32), added.grid[1] = 2;
  start(on, added, sums);
}

}  // namespace

void register_norm(py::module_& m) {
  m.def("norm_forward", norm_forward, "LayerNorm, RMSNorm; the order of `call` is in csrc/api.");
  m.def("norm_backward", norm_backward, "Their gradients; the order of `call` is in csrc/api.");
}

}  // namespace pyfuse::cuda
