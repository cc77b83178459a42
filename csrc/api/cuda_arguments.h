// What the bindings of the CUDA kernels share, beside api/arguments.h.
#pragma once
#include "api/arguments.h"
#include "cuda/attention_params.h"
#include "cuda/attention_tiles.h"
#include "cuda/launch.h"

namespace pyfuse::cuda {

// (compute capability, multiprocessors, stream)
inline Gpu read_gpu(const pybind11::tuple& from) {
  return {from[0].cast<int>(), from[1].cast<int>(), from[2].cast<uint64_t>()};
}

// 32-bit sizes are what the kernels count with; pyfuse/backends refuses larger ones beforehand.
inline int32_t narrow(int64_t x) {
  if (x != static_cast<int32_t>(x))
    throw std::invalid_argument("size: " + std::to_string(x) + " does not fit 32 bits");
  return static_cast<int32_t>(x);
}

// (address, whether the integers have 64 bits)
inline Integers read_integers(Arguments& from) {
  const void* const data = from.address();
  return {data, from.integer() != 0};
}

inline AttentionCall read_attention(Arguments& from) {
  AttentionCall p{};
  int64_t size[7];
  from.integers(size);
  p.batch = narrow(size[0]), p.heads = narrow(size[1]), p.group = narrow(size[2]);
  p.M = narrow(size[3]), p.N = narrow(size[4]), p.d = narrow(size[5]), p.dv = narrow(size[6]);
  p.q = from.address("q"), from.integers(p.q_stride);
  p.k = from.address(p.N > 0 ? "k" : nullptr), from.integers(p.k_stride);
  p.v = from.address(p.N > 0 ? "v" : nullptr), from.integers(p.v_stride);
  p.aligned = from.integer() != 0;
  p.scale = static_cast<float>(from.real()), p.softcap = static_cast<float>(from.real());
  p.left = narrow(from.integer()), p.right = narrow(from.integer());
  p.slopes = static_cast<const float*>(from.address());
  p.sinks = static_cast<const float*>(from.address());
  p.lengths = read_integers(from);
  p.cu_q = read_integers(from), p.cu_k = read_integers(from);
  p.mask = from.address();
  p.mask_kind = narrow(from.integer());
  from.integers(p.mask_stride);
  p.key[0] = static_cast<uint32_t>(from.integer()),
  p.key[1] = static_cast<uint32_t>(from.integer());
  p.threshold = narrow(from.integer());
  p.keep_scale = static_cast<float>(from.real());
  return p;
}

// The head size that kernels are compiled for which holds both of the call's.
inline int head_size(const AttentionCall& p) {
  const int largest = p.d > p.dv ? p.d : p.dv;
  for (const int d : {32, 64, 96, 128, 256}) {
    if (largest <= d) return d;
  }
  throw std::invalid_argument("head size: the kernels have up to 256, got " +
                              std::to_string(largest));
}

// Whether kernels without options do, as far as scores go.
inline bool is_plain(const AttentionCall& p) {
  return p.scale > 0 && p.softcap == 0 && p.slopes == nullptr && p.mask == nullptr &&
         p.threshold == 0;
}

// How many blocks of `rows` rows a call has: of each sequence, or of packed ones together, which
// may all end within a block.
inline int64_t block_count(const AttentionCall& p, int64_t count, int64_t rows) {
  return p.cu_q.data == nullptr ? ceil_div(count, rows) * p.batch : count / rows + p.batch + 2;
}

inline std::string unit_name(const char* kernel, DType dtype, int d) {
  return std::string(kernel) + "_" + name_of(dtype) + "_d" + std::to_string(d);
}

}  // namespace pyfuse::cuda
