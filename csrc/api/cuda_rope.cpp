// Python arguments -> RopeCall -> the kernel for its rows, and how heads and tokens are shared out.
#include <algorithm>

#include "api/cuda_arguments.h"
#include "cuda/rope_params.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

constexpr int WARPS = 4;  // of a block
// With fewer warps for each multiprocessor, the heads of a token are shared out.
constexpr int64_t WARPS_WANTED = 16;

// Whether rows start at multiples of `unit` bytes.
bool is_aligned(const RopeCall& p, int unit, int bytes) {
  bool aligned = true;
  const auto check = [&](const void* data, const int64_t (&stride)[3], int64_t heads) {
    const int64_t size[] = {p.tokens / p.M, heads, p.M};
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % unit == 0;
    for (int i = 0; i < 3; ++i)
      aligned = aligned && (size[i] <= 1 || stride[i] * bytes % unit == 0);
  };
  for (const RopePart& part : p.part) {
    if (part.heads == 0) continue;
    check(part.x, part.x_stride, part.heads);
    check(part.y, part.y_stride, part.heads);
  }
  return aligned;
}

// The kernel, by its entry's name; fills in the lanes of a row.
std::string kernel_for(RopeCall& p, int bytes) {
  const int turned = p.interleaved ? p.r : p.r / 2;
  for (const int chunk : {16 / bytes, 2}) {
    const int chunks = p.d / chunk;
    if (!is_aligned(p, chunk * bytes, bytes) || p.d % chunk != 0 || turned % chunk != 0 ||
        chunks > 64)
      continue;
    p.lanes = std::min(chunks, 32);
    return std::string(p.interleaved ? "interleaved" : "half") + (chunk == 2    ? "_pairs"
                                                                  : chunks > 32 ? "_wide"
                                                                                : "");
  }
  p.lanes = std::min(std::max(p.r / 2, p.d - p.r), 32);
  return "elements";
}

// How many warps there are to be.
int64_t share_out(RopeCall& p, int processors) {
  const int32_t heads = p.part[0].heads + p.part[1].heads, rows = 32 / p.lanes;
  p.heads_at = std::min(heads, rows);
  p.tokens_at = rows / p.heads_at;
  const int64_t groups = ceil_div(p.tokens, p.tokens_at), rounds = ceil_div(heads, p.heads_at);
  const int64_t splits = std::min(rounds, ceil_div(WARPS_WANTED * processors, groups));
  p.heads_each = narrow(ceil_div(rounds, splits)) * p.heads_at;
  p.splits = narrow(ceil_div(heads, p.heads_each));
  return groups * p.splits;
}

// The order is that of pyfuse/backends/cuda_rope.py.
void rope(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  RopeCall p{};
  p.tokens = narrow(from.integer()), p.M = narrow(from.integer());
  p.d = narrow(from.integer()), p.r = narrow(from.integer());
  for (RopePart& part : p.part) {
    part.heads = narrow(from.integer());
    part.x = from.address(part.heads > 0 ? "x" : nullptr), from.integers(part.x_stride);
    part.y = from.address(part.heads > 0 ? "y" : nullptr), from.integers(part.y_stride);
  }
  p.cos = from.address("cos"), p.sin = from.address("sin");
  p.table_f32 = from.integer() != 0;
  from.integers(p.table_stride);
  p.table_rows = from.integer();
  p.positions = read_integers(from);
  from.integers(p.position_stride);
  p.interleaved = from.integer() != 0;
  p.copy = p.r < p.d && p.part[0].x != p.part[0].y;
  p.sign = static_cast<float>(from.real());
  if (p.tokens < 1 || p.M < 1 || p.part[0].heads < 1 || p.r < 2 || p.r % 2 != 0 || p.r > p.d)
    throw std::invalid_argument("rope: cannot rotate " + std::to_string(p.r) + " of " +
                                std::to_string(p.d) + " elements of " + std::to_string(p.tokens) +
                                " tokens");
  const Gpu on = read_gpu(gpu);
  Launch launch;
  launch.unit = std::string("rope_") + name_of(dtype);
  launch.entry = kernel_for(p, size_of(dtype));
  launch.threads = 32 * WARPS;
  launch.grid[0] = ceil_div(share_out(p, on.processors), WARPS);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

}  // namespace

void register_rope(py::module_& m) {
  m.def("rope", rope, "Rotary embedding; the order of `call` is in csrc/api.");
}

}  // namespace pyfuse::cuda
