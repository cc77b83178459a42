// Python arguments -> AttentionParams -> the kernel that fits the number of queries.
#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

// Packed sequences: bounds that do not fit the tensors would be read beyond their end. Returns the
// longest.
int64_t check_sequences(const int64_t* cu_seqlens, int64_t batch, int64_t rows, const char* name) {
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    if (length < 0 || cu_seqlens[b] < 0 || cu_seqlens[b + 1] > rows) {
      throw std::invalid_argument(std::string(name) + ": sequence " + std::to_string(b) +
                                  " has the rows " + std::to_string(cu_seqlens[b]) + " to " +
                                  std::to_string(cu_seqlens[b + 1]) +
                                  ", needs 0 <= first <= end <= " + std::to_string(rows));
    }
    longest = length > longest ? length : longest;
  }
  return longest;
}

// The order is that of pyfuse/backends/cpu_attention.py, `call_arguments`.
AttentionParams read_call(const py::tuple& call) {
  Arguments from(call);
  AttentionParams p{};
  int64_t size[7];
  from.integers(size);
  p.batch = size[0], p.heads_q = size[1], p.heads_k = size[2], p.queries = size[3];
  p.keys = size[4], p.d = size[5], p.dv = size[6];
  const bool any_key = p.keys > 0;
  p.dtype = dtype_of(from.integer());
  p.q = from.address(p.d > 0 ? "q" : nullptr), from.integers(p.q_stride);
  p.k = from.address(any_key && p.d > 0 ? "k" : nullptr), from.integers(p.k_stride);
  p.v = from.address(any_key ? "v" : nullptr), from.integers(p.v_stride);
  p.o = from.address("o"), from.integers(p.o_stride);
  p.lse = from.address(), from.integers(p.lse_stride);
  p.lse_dtype = dtype_of(from.integer());
  p.scale = from.real(), p.softcap = from.real();
  p.window_left = from.integer(), p.window_right = from.integer();
  p.seqlens_k = static_cast<const int64_t*>(from.address());
  p.sinks = static_cast<const double*>(from.address());
  p.alibi_slopes = static_cast<const double*>(from.address());
  p.dropout_p = from.real();
  p.dropout_seed =
      static_cast<const int64_t*>(from.address(p.dropout_p > 0 ? "dropout_seed" : nullptr));
  p.threads = at_least_one(static_cast<int>(from.integer()));
  p.mask = from.address();
  if (p.mask != nullptr) {
    from.integers(p.mask_stride);
    const int64_t dtype = from.integer();
    p.mask_is_bool = dtype < 0;
    p.mask_dtype = dtype < 0 ? DType::f32 : dtype_of(dtype);
  }
  return p;
}

AttentionParams read_packed_call(const py::tuple& call, uintptr_t cu_seqlens_q,
                                 uintptr_t cu_seqlens_k) {
  AttentionParams p = read_call(call);
  p.cu_seqlens_q = static_cast<const int64_t*>(address(cu_seqlens_q, "cu_seqlens_q"));
  p.cu_seqlens_k = static_cast<const int64_t*>(address(cu_seqlens_k, "cu_seqlens_k"));
  p.queries = check_sequences(p.cu_seqlens_q, p.batch, p.queries, "cu_seqlens_q");
  p.keys = check_sequences(p.cu_seqlens_k, p.batch, p.keys, "cu_seqlens_k");
  return p;
}

AttentionGradientParams read_gradient(const AttentionParams& call, const py::tuple& gradient) {
  Arguments from(gradient);
  AttentionGradientParams g{};
  g.call = call;
  g.d_o = from.address("do"), from.integers(g.do_stride);
  g.d_lse = from.address(), from.integers(g.dlse_stride);
  g.dq = from.address(), from.integers(g.dq_stride);
  g.dk = from.address(), from.integers(g.dk_stride);
  g.dv = from.address(), from.integers(g.dv_stride);
  g.d_sinks = static_cast<double*>(from.address());
  g.d_alibi_slopes = static_cast<double*>(from.address());
  g.d_mask = from.address();
  if (g.d_mask != nullptr) from.integers(g.mask_size);
  return g;
}

// A query against a few keys at a time is bound by reading K and V: nothing is worth packing.
bool few_queries(const AttentionParams& p) {
  return p.dropout_p == 0 && (p.queries * (p.heads_q / p.heads_k) <= 16 || p.queries <= 4);
}

void attention(const py::tuple& call) {
  const AttentionParams p = read_call(call);
  const py::gil_scoped_release release;
  if (few_queries(p)) {
    cpu::kernels().attention_decode(DecodeParams{p});
  } else {
    cpu::kernels().attention(p);
  }
}

void varlen_attention(const py::tuple& call, uintptr_t cu_seqlens_q, uintptr_t cu_seqlens_k) {
  const AttentionParams p = read_packed_call(call, cu_seqlens_q, cu_seqlens_k);
  const py::gil_scoped_release release;
  if (p.queries > 0) cpu::kernels().attention(p);
}

void run_gradient(const AttentionGradientParams& g) {
  if (g.call.lse_dtype != DType::f64 || g.call.lse == nullptr)
    throw std::invalid_argument("lse: the gradient needs it in float64");
  const py::gil_scoped_release release;
  if (g.dq != nullptr) cpu::kernels().attention_gradient(g);
  if (g.d_sinks != nullptr || g.d_mask != nullptr || g.d_alibi_slopes != nullptr)
    cpu::kernels().attention_score_gradient(g);
}

void attention_gradient(const py::tuple& call, const py::tuple& gradient) {
  run_gradient(read_gradient(read_call(call), gradient));
}

void varlen_attention_gradient(const py::tuple& call, uintptr_t cu_seqlens_q,
                               uintptr_t cu_seqlens_k, const py::tuple& gradient) {
  run_gradient(read_gradient(read_packed_call(call, cu_seqlens_q, cu_seqlens_k), gradient));
}

}  // namespace

void register_attention(py::module_& m) {
  m.def("attention", attention, "Attention forward; the order of `call` is in csrc/api.");
  m.def("varlen_attention", varlen_attention, "The same for packed sequences.");
  m.def("attention_gradient", attention_gradient, "Attention backward.");
  m.def("varlen_attention_gradient", varlen_attention_gradient, "The same for packed sequences.");
}

}  // namespace pyfuse
