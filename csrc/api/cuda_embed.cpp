// Python arguments -> EmbedForward, EmbedBackward, RowSums -> the kernel for their rows.
#include <algorithm>

#include "api/cuda_arguments.h"
#include "cuda/embed_params.h"

namespace py = pybind11;

namespace pyfuse::cuda {
namespace {

constexpr int BLOCK = 256, MOST_THREADS = 512;

EmbedTable read_table(Arguments& from) {
  EmbedTable table{};
  table.weight = from.address();
  table.stride = from.integer(), table.rows = from.integer();
  table.ids = read_integers(from);
  return table;
}

EmbedVector read_vector(Arguments& from) {
  const void* const data = from.address();
  return {data, narrow(from.integer())};
}

EmbedDropout read_dropout(Arguments& from) {
  EmbedDropout dropout{};
  for (uint32_t& word : dropout.key) word = static_cast<uint32_t>(from.integer());
  dropout.threshold = narrow(from.integer());
  dropout.keep_scale = static_cast<float>(from.real());
  return dropout;
}

EmbedCall read_call(Arguments& from) {
  EmbedCall p{};
  p.tokens = narrow(from.integer()), p.d = narrow(from.integer());
  p.token = read_table(from), p.position = read_table(from), p.segment = read_table(from);
  p.length = narrow(from.integer());
  p.turns = static_cast<const uint64_t*>(from.address());
  p.norm_weight = read_vector(from), p.norm_bias = read_vector(from);
  p.scale = static_cast<float>(from.real()), p.eps = static_cast<float>(from.real());
  p.dropout = read_dropout(from);
  if (p.tokens < 1 || p.d < 1 || p.length < 1)
    throw std::invalid_argument("embed: there must be tokens, columns and a length");
  if (p.token.ids.data == nullptr) throw std::invalid_argument("token_ids: null data pointer");
  return p;
}

bool is_aligned(const void* data, int64_t stride, int bytes) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride % bytes == 0;
}

// Whether the rows that are looked up start at multiples of `unit` elements and are so long.
bool is_aligned(const EmbedCall& p, int unit, int size) {
  bool aligned = p.d % unit == 0;
  for (const EmbedTable* table : {&p.token, &p.position, &p.segment})
    aligned = aligned &&
              (table->rows < 0 || is_aligned(table->weight, table->stride * size, unit * size));
  return aligned;
}

// Threads of a row, each of which can have `parts` times `unit` columns: as many as read it at
// once, and a power of two.
int threads_of_row(int d, int unit, int parts) {
  const int64_t chunks = ceil_div(d, unit);
  int threads = 1;
  while (threads < chunks && (threads < 32 || threads * parts < chunks)) threads *= 2;
  return threads;
}

// Floats of Planes<V> (vector.cuh).
int64_t planes(int v, int64_t count) {
  return v <= 4 ? (count + 3) / 4 * 4 : v / 4 * ((count / (v / 4) + 31) / 32 * 32 + 16);
}

// Bytes of what a block keeps of `columns` columns: `vectors` of the norm's, and angles' steps.
int shared_bytes(const EmbedCall& p, int unit, int vectors, int64_t columns) {
  int64_t floats = 64 + vectors * planes(unit, columns);
  if (p.turns != nullptr) floats += planes(unit == 1 ? 2 : unit, (columns + 1) / 2 * 2);
  return static_cast<int>(4 * floats);
}

// The order is that of pyfuse/backends/cuda_embed.py.
void embed(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  EmbedForward p{};
  static_cast<EmbedCall&>(p) = read_call(from);
  p.y = from.address("y"), p.statistics = static_cast<float*>(from.address());
  const Gpu on = read_gpu(gpu);
  const bool norm = p.norm_weight.data != nullptr;
  const int vector = 16 / size_of(dtype);
  const bool aligned = is_aligned(p, vector, size_of(dtype)) && is_aligned(p.y, 0, 16);
  const int unit = aligned ? vector : 1, parts = aligned ? 4 : 8;
  p.threads = threads_of_row(p.d, unit, parts);
  const bool wide = norm && p.threads > MOST_THREADS;
  p.threads = std::min(p.threads, norm ? MOST_THREADS : BLOCK);
  const int64_t columns = wide ? 0 : std::min(p.d, p.threads * unit * parts);
  Launch launch;
  launch.unit = std::string("embed_") + name_of(dtype);
  launch.entry = std::string("gather") + (norm ? "_norm" : "") + (wide ? "_wide" : "") +
                 (aligned ? "" : "_elements");
  launch.threads = std::max(BLOCK, p.threads);
  launch.shared = wide ? 64 * 4 : shared_bytes(p, unit, norm ? 2 : 0, columns);
  // As many blocks as run at once: each reads what all tokens share.
  const int64_t resident =
      on.processors * (norm ? MOST_THREADS : 2 * MOST_THREADS) / launch.threads;
  const int64_t rows = launch.threads / p.threads;
  launch.grid[0] = std::min(ceil_div(p.tokens, rows), resident);
  launch.grid[1] = wide ? 1 : ceil_div(p.d, columns);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

}  // namespace

void register_embed(py::module_& m) {
  m.def("embed", embed, "The embedding sum; the order of `call` is in csrc/api.");
}

}  // namespace pyfuse::cuda
