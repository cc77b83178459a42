// Python arguments -> DecodeParams; new keys and values are written into the cache on the way.
#include <cstring>
#include <vector>

#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

constexpr int64_t SERIAL_BYTES = 64 * 1024;  // to copy; below it waking a thread costs more
constexpr int64_t MOST_QUERIES = 16;         // of what counts as decoding

// Rows to write into a cache: [B, Hk, M, row] at the last M keys of every sequence.
struct NewRows {
  const char* from;  // null: none
  int64_t stride[3];
  char* cache;
  const int64_t* cache_stride;
  int64_t row_bytes, element_bytes;
};

struct DecodeCall {
  DecodeParams params;
  std::vector<int64_t> lengths;
  NewRows k, v;
};

std::vector<int64_t> read_lengths(Arguments& from, int64_t batch) {
  const void* at = from.address(batch > 0 ? "seqlens_k" : nullptr);
  const bool is_64_bit = from.integer() != 0;
  const int64_t stride = from.integer();
  std::vector<int64_t> lengths(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) {
    lengths[static_cast<size_t>(b)] = is_64_bit ? static_cast<const int64_t*>(at)[b * stride]
                                                : static_cast<const int32_t*>(at)[b * stride];
  }
  return lengths;
}

NewRows read_new_rows(Arguments& from, const char* name, const void* cache, const int64_t* stride,
                      int64_t row, int64_t element_bytes) {
  NewRows rows{};
  rows.from = static_cast<const char*>(from.address(name));
  from.integers(rows.stride);
  rows.cache = static_cast<char*>(const_cast<void*>(cache));
  rows.cache_stride = stride;
  rows.row_bytes = row * element_bytes, rows.element_bytes = element_bytes;
  return rows;
}

// The order is that of pyfuse/backends/cpu_decode.py.
void read_call(const py::tuple& call, DecodeCall& to) {
  Arguments from(call);
  DecodeParams& p = to.params;
  int64_t size[7];
  from.integers(size);
  p.batch = size[0], p.heads_q = size[1], p.heads_k = size[2], p.queries = size[3];
  p.keys = size[4], p.d = size[5], p.dv = size[6];
  p.dtype = dtype_of(from.integer());
  p.q = from.address("q"), from.integers(p.q_stride);
  p.k = from.address(), from.integers(p.k_stride);
  p.v = from.address(), from.integers(p.v_stride);
  p.o = from.address("o"), from.integers(p.o_stride);
  p.lse = from.address();
  p.lse_stride[0] = p.heads_q * p.queries, p.lse_stride[1] = p.queries;
  p.lse_dtype = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  p.scale = from.real(), p.softcap = from.real();
  p.window_left = from.integer(), p.window_right = from.integer();
  p.sinks = static_cast<const double*>(from.address());
  p.alibi_slopes = static_cast<const double*>(from.address());
  p.threads = at_least_one(static_cast<int>(from.integer()));
  to.lengths = read_lengths(from, p.batch);
  p.seqlens_k = to.lengths.data(), p.align_to_seqlens = true;
  if (from.integer() != 0) {
    p.block_table = from.address();
    from.integers(p.table_stride);
    p.table_is_64_bit = from.integer() != 0;
    p.page_size = from.integer(), p.pages = from.integer();
  }
  if (from.integer() != 0) {
    const int64_t bytes = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
    to.k = read_new_rows(from, "k_new", p.k, p.k_stride, p.d, bytes);
    to.v = read_new_rows(from, "v_new", p.v, p.v_stride, p.dv, bytes);
  }
}

std::string text(int64_t x) { return std::to_string(x); }

// A length or a page that does not exist would be read, or written, outside of the cache.
void check_lengths(const DecodeCall& call) {
  const DecodeParams& p = call.params;
  const int64_t least = call.k.from != nullptr ? p.queries : 0;
  for (const int64_t length : call.lengths) {
    if (length < least || length > p.keys)
      throw std::invalid_argument("seqlens_k: a sequence has " + text(length) + " keys, needs " +
                                  text(least) + " to " + text(p.keys));
    if (length > 0) {
      pyfuse::address(reinterpret_cast<uintptr_t>(p.k), "k_cache");
      pyfuse::address(reinterpret_cast<uintptr_t>(p.v), "v_cache");
    }
  }
}
void check_pages(const DecodeParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.seqlens_k[b] > 0) address(reinterpret_cast<uintptr_t>(p.block_table), "block_table");
    // Pages before the first query's window may have been given to another sequence.
    const int64_t first_query = p.seqlens_k[b] - p.queries;
    const int64_t lo = p.window_left >= 0 ? first_query - p.window_left : 0;
    for (int64_t i = lo > 0 ? lo / p.page_size : 0; i * p.page_size < p.seqlens_k[b]; ++i) {
      const int64_t page = p.page_of(b, i);
      if (page < 0 || page >= p.pages)
        throw std::invalid_argument("block_table: entry [" + text(b) + ", " + text(i) + "] is " +
                                    text(page) + ", but the cache has " + text(p.pages) + " pages");
    }
  }
}

void append(const DecodeParams& p, const NewRows& rows, int64_t b, int64_t hk) {
  for (int64_t m = 0; m < p.queries; ++m) {
    const int64_t key = p.seqlens_k[b] - p.queries + m;
    const bool paged = p.block_table != nullptr;
    const int64_t block = paged ? p.page_of(b, key / p.page_size) : b;
    const int64_t row = paged ? key % p.page_size : key;
    const int64_t to =
        block * rows.cache_stride[0] + hk * rows.cache_stride[1] + row * rows.cache_stride[2];
    const int64_t at = b * rows.stride[0] + hk * rows.stride[1] + m * rows.stride[2];
    std::memmove(rows.cache + to * rows.element_bytes, rows.from + at * rows.element_bytes,
                 static_cast<size_t>(rows.row_bytes));
  }
}

// Every (b, hk) has rows of its own, so that threads do not meet.
void append(const DecodeCall& call) {
  const DecodeParams& p = call.params;
  const int64_t heads = p.batch * p.heads_k;
  const int64_t all = heads * p.queries * (call.k.row_bytes + call.v.row_bytes);
  const int threads = all < SERIAL_BYTES ? 1 : p.threads;
  (void)threads;  // without OpenMP
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads; ++i) {
    append(p, call.k, i / p.heads_k, i % p.heads_k);
    append(p, call.v, i / p.heads_k, i % p.heads_k);
  }
}

void attention_decode(const py::tuple& arguments) {
  DecodeCall call{};
  read_call(arguments, call);
  const py::gil_scoped_release release;
  check_lengths(call);
  if (call.params.block_table != nullptr) check_pages(call.params);
  if (call.k.from != nullptr) append(call);
  // The tiled kernel knows no pages; the other one takes many queries in passes.
  const DecodeParams& p = call.params;
  p.block_table == nullptr&& p.queries > MOST_QUERIES ? cpu::kernels().attention(p)
                                                      : cpu::kernels().attention_decode(p);
}

}  // namespace

void register_attention_decode(py::module_& m) {
  m.def("attention_decode", attention_decode, "Attention of few queries over a cache.");
}

}  // namespace pyfuse
