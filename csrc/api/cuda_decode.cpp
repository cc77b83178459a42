// Python arguments -> AttentionDecode -> the kernel for its head size and rows, and the one that
// merges the splits.
#include "api/cuda_arguments.h"
#include "cuda/attention_decode.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

void read_cache(Arguments& from, AttentionDecode& p) {
  p.table = read_integers(from);
  from.integers(p.table_stride);
  p.page_size = narrow(from.integer());
  if (p.page_size < 1) throw std::invalid_argument("page_size: got 0, needs 1 or more");
  p.page_bits = -1;
  for (int bits = 0; bits < 31; ++bits) {
    if (p.page_size == 1 << bits) p.page_bits = bits;
  }
  const bool appends = from.integer() != 0;
  p.k_new = from.address(appends ? "k_new" : nullptr), from.integers(p.k_new_stride);
  p.v_new = from.address(appends ? "v_new" : nullptr), from.integers(p.v_new_stride);
}

const char* entry_of(int64_t rows) {
  switch (rows) {
    case 16:
      return "decode";
    case 32:
      return "decode_32_rows";
    default:
      throw std::invalid_argument("rows: the kernels have tiles of 16 and 32, got " +
                                  std::to_string(rows));
  }
}

// The order is that of pyfuse/backends/cuda_decode.py.
void attention_decode(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  AttentionDecode p{};
  static_cast<AttentionCall&>(p) = read_attention(from);
  p.o = from.address("o"), from.integers(p.o_stride);
  p.lse = static_cast<float*>(from.address());
  read_cache(from, p);
  const int64_t rows = from.integer();
  p.splits = narrow(from.integer());
  p.partial = static_cast<float*>(from.address(p.splits > 1 ? "partial" : nullptr));
  p.fold = p.scale > 0 && p.softcap == 0 && p.slopes == nullptr;
  const int d = head_size(p);
  Launch launch;
  launch.unit = unit_name("attention_decode", dtype, d);
  launch.entry = entry_of(rows);
  launch.grid[0] = ceil_div(int64_t(p.M) * p.group, rows) * (p.heads / p.group) * p.batch;
  launch.grid[1] = p.splits + (p.k_new != nullptr ? 1 : 0);
  const DecodeRing ring(size_of(dtype), d);
  launch.threads = 32 * ring.warps;
  launch.shared = ring.bytes(static_cast<int>(rows));
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  start(on, launch, p);
  if (p.splits == 1) return;
  Launch merge;
  merge.unit = std::string("attention_merge_") + name_of(dtype);
  merge.entry = "merge";
  merge.grid[0] = int64_t(p.batch) * p.heads * p.M;
  start(on, merge, p);
}

}  // namespace

void register_decode(py::module_& m) {
  m.def("attention_decode", attention_decode,
        "Attention over a cache; the order of `call` is in csrc/api.");
}

}  // namespace pyfuse::cuda
