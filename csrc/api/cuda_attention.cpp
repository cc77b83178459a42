// Python arguments -> AttentionForward -> the kernel for its head size and options.
#include "api/cuda_arguments.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

// As attention_fwd_hopper.cu has them.
constexpr int HOPPER_ROWS = 128;  // of queries and of keys
constexpr int HOPPER_THREADS = 384;

int hopper_shared(int d) {
  const int tile = HOPPER_ROWS * d * 2;
  return 5 * tile + 3 * 1024;  // queries, two stages of keys and of values; and what threads share
}

TensorMap rows_of(const void* data, DType dtype, const AttentionCall& p, int heads, int rows,
                  int columns, const int64_t (&stride)[3]) {
  const bool packed = p.cu_q.data != nullptr;
  TensorMap map{data, dtype, {packed ? 1 : p.batch, heads, rows, columns}, {}, HOPPER_ROWS};
  // Of a dimension of size 1 torch may have any stride; a map wants a multiple of 16 bytes.
  for (int i = 0; i < 3; ++i) map.stride[i] = map.size[i] > 1 ? stride[i] : columns;
  return map;
}

std::vector<TensorMap> hopper_maps(const AttentionCall& p, DType dtype) {
  const int groups = p.heads / p.group;
  return {rows_of(p.q, dtype, p, p.heads, p.M, p.d, p.q_stride),
          rows_of(p.k, dtype, p, groups, p.N, p.d, p.k_stride),
          rows_of(p.v, dtype, p, groups, p.N, p.dv, p.v_stride)};
}

// What cuTensorMapEncodeTiled takes: strides below 2^40 bytes, and none of 0, as of tensors that
// are expanded; and there is no map of nothing.
bool can_be_mapped(const std::vector<TensorMap>& maps) {
  for (const TensorMap& map : maps) {
    for (const int64_t size : map.size) {
      if (size < 1) return false;
    }
    for (const int64_t stride : map.stride) {
      if (stride <= 0 || stride >= int64_t(1) << 39) return false;
    }
  }
  return true;
}

// Makes the launch one of attention_fwd_hopper.cu where that kernel can have the call.
void prefer_hopper(Launch& launch, const Gpu& gpu, const AttentionCall& p, DType dtype) {
  const int largest = p.d > p.dv ? p.d : p.dv;
  if (gpu.arch != 90 || !is_plain(p) || !p.aligned || size_of(dtype) != 2 || largest <= 32 ||
      largest > 128)
    return;
  const int d = largest <= 64 ? 64 : 128;
  const std::string unit = unit_name("attention_fwd_hopper", dtype, d);
  auto maps = hopper_maps(p, dtype);
  if (!has_unit(unit) || !can_be_mapped(maps)) return;
  launch.unit = unit;
  launch.grid[0] = block_count(p, p.M, HOPPER_ROWS);
  launch.threads = HOPPER_THREADS;
  launch.shared = hopper_shared(d);
  launch.maps = std::move(maps);
}

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
  const ForwardTiles tiles(size_of(dtype), d, plain, p.aligned);
  Launch launch;
  launch.unit = unit_name("attention_fwd", dtype, d);
  launch.entry = !plain ? "forward_options" : p.aligned ? "forward" : "forward_unaligned";
  launch.grid[0] = block_count(p, p.M, tiles.rows());
  launch.grid[1] = p.heads;
  launch.shared = tiles.bytes();
  const Gpu on = read_gpu(gpu);
  prefer_hopper(launch, on, p, dtype);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention_forward", attention_forward, "Attention; the order of `call` is in csrc/api.");
}

}  // namespace pyfuse::cuda
