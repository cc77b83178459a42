// Python arguments -> AttentionParams -> the kernel that fits the number of queries.
#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

AttentionParams attention_params(uintptr_t q, const py::tuple& q_stride, uintptr_t k,
                                 const py::tuple& k_stride, uintptr_t v, const py::tuple& v_stride,
                                 uintptr_t o, const py::tuple& o_stride, uintptr_t lse,
                                 const py::tuple& sizes, int dtype, double scale, double softcap,
                                 int64_t window_left, int64_t window_right, uintptr_t seqlens_k,
                                 uintptr_t sinks, uintptr_t alibi_slopes, int threads) {
  AttentionParams p{};
  int64_t size[7];
  read_strides(sizes, size);
  p.batch = size[0], p.heads_q = size[1], p.heads_k = size[2], p.queries = size[3];
  p.keys = size[4], p.d = size[5], p.dv = size[6];
  const bool any_key = p.keys > 0;
  p.q = p.d > 0 ? address(q, "q") : nullptr;
  p.k = any_key && p.d > 0 ? address(k, "k") : nullptr;
  p.v = any_key ? address(v, "v") : nullptr;
  p.o = address(o, "o");
  p.lse = optional_address(lse);
  read_strides(q_stride, p.q_stride);
  read_strides(k_stride, p.k_stride);
  read_strides(v_stride, p.v_stride);
  read_strides(o_stride, p.o_stride);
  p.dtype = dtype_of(dtype);
  p.scale = scale, p.softcap = softcap;
  p.window_left = window_left, p.window_right = window_right;
  p.seqlens_k = static_cast<const int64_t*>(optional_address(seqlens_k));
  p.sinks = static_cast<const float*>(optional_address(sinks));
  p.alibi_slopes = static_cast<const float*>(optional_address(alibi_slopes));
  p.threads = at_least_one(threads);
  return p;
}

void set_mask(AttentionParams& p, uintptr_t mask, const py::tuple& stride, int dtype) {
  p.mask = address(mask, "mask");
  read_strides(stride, p.mask_stride);
  p.mask_is_bool = dtype < 0;
  p.mask_dtype = dtype < 0 ? DType::f32 : dtype_of(dtype);
}

// A query against a few keys at a time is bound by reading K and V: nothing is worth packing.
bool few_queries(const AttentionParams& p) {
  return p.queries * (p.heads_q / p.heads_k) <= 16 || p.queries <= 4;
}

void run(const AttentionParams& p) {
  const py::gil_scoped_release release;
  few_queries(p) ? cpu::kernels().attention_decode(DecodeParams{p}) : cpu::kernels().attention(p);
}

}  // namespace

void register_attention(py::module_& m) {
  m.def(
      "attention",
      [](uintptr_t q, const py::tuple& q_stride, uintptr_t k, const py::tuple& k_stride,
         uintptr_t v, const py::tuple& v_stride, uintptr_t o, const py::tuple& o_stride,
         uintptr_t lse, const py::tuple& sizes, int dtype, double scale, double softcap,
         int64_t window_left, int64_t window_right, uintptr_t seqlens_k, uintptr_t sinks,
         uintptr_t alibi_slopes, int threads, bool align_to_seqlens, uintptr_t mask,
         const py::object& mask_stride, int mask_dtype) {
        AttentionParams p = attention_params(q, q_stride, k, k_stride, v, v_stride, o, o_stride,
                                             lse, sizes, dtype, scale, softcap, window_left,
                                             window_right, seqlens_k, sinks, alibi_slopes, threads);
        p.align_to_seqlens = align_to_seqlens && p.seqlens_k != nullptr;
        if (!mask_stride.is_none()) set_mask(p, mask, mask_stride, mask_dtype);
        run(p);
      },
      "Attention forward. sizes = (B, Hq, Hk, M, N, D, Dv); mask_dtype -1 = bool; see params.h.");
}

}  // namespace pyfuse
