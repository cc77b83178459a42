// Python arguments -> EmbedForward, EmbedBackward, RowSums -> the kernel for their rows.
#include <algorithm>

#include "api/cuda_arguments.h"
#include "cuda/embed_params.h"
#include "cuda/planes.h"

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

// Bytes of what a block keeps of `columns` columns: `vectors` of the norm's, and angles' steps.
int shared_bytes(const EmbedCall& p, int unit, int vectors, int columns) {
  int floats = vectors * planes_size(unit, columns);
  if (p.turns != nullptr) floats += planes_size(unit == 1 ? 2 : unit, (columns + 1) / 2 * 2);
  return 4 * floats;
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
  const int columns = wide ? 0 : std::min(p.d, p.threads * unit * parts);
  Launch launch;
  launch.unit = std::string("embed_") + name_of(dtype);
  launch.entry = std::string("gather") + (norm ? "_norm" : "") + (wide ? "_wide" : "") +
                 (aligned ? "" : "_elements");
  launch.threads = std::max(BLOCK, p.threads);
  launch.shared = wide ? 0 : shared_bytes(p, unit, norm ? 2 : 0, columns);
  // As many blocks as run at once: each reads what all tokens share.
  const int64_t resident =
      on.processors * (norm ? MOST_THREADS : 2 * MOST_THREADS) / launch.threads;
  const int64_t rows = launch.threads / p.threads;
  launch.grid[0] = std::min(ceil_div(p.tokens, rows), resident);
  launch.grid[1] = wide ? 1 : ceil_div(p.d, columns);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

// The order is that of pyfuse/backends/cuda_embed_gradient.py.
void embed_through_norm(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer());
  EmbedBackward p{};
  static_cast<EmbedCall&>(p) = read_call(from);
  p.dy = from.address("dy"), p.dy_stride = from.integer();
  p.statistics = static_cast<const float*>(from.address("statistics"));
  p.dsum = static_cast<float*>(from.address()), p.sums = static_cast<float*>(from.address());
  p.slots = narrow(from.integer());
  if (p.norm_weight.data == nullptr || p.slots < 1)
    throw std::invalid_argument("embed_through_norm: there must be a norm, and slots");
  const int size = size_of(dtype);
  const bool aligned = is_aligned(p, 4, size) && is_aligned(p.dy, p.dy_stride * size, 4 * size) &&
                       is_aligned(p.dsum, 0, 16) && is_aligned(p.sums, 0, 16);
  const int unit = aligned ? 4 : 1, parts = aligned ? 4 : 8;
  const int threads = threads_of_row(p.d, unit, parts);
  const char* const kind = aligned ? "" : "_elements";
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  Launch launch;
  launch.unit = std::string("embed_bwd_") + name_of(dtype);
  if (p.dsum != nullptr && threads > MOST_THREADS) {  // of wide rows, dsum apart from the sums
    launch.entry = std::string("through_norm_wide") + kind;
    launch.threads = MOST_THREADS;
    launch.grid[0] = std::min<int64_t>(p.tokens, 4 * on.processors);
    start(on, launch, p);
    p.dsum = nullptr;
    if (p.sums == nullptr) return;
  }
  p.threads = std::min(threads, p.dsum == nullptr ? BLOCK : MOST_THREADS);
  const int columns = std::min(p.d, p.threads * unit * parts);
  launch.entry = std::string("through_norm") + kind;
  launch.threads = std::max(BLOCK, p.threads);
  launch.shared = shared_bytes(p, unit, p.dsum != nullptr, columns);
  launch.grid[0] = ceil_div(p.slots, launch.threads / p.threads);
  launch.grid[1] = ceil_div(p.d, columns);
  start(on, launch, p);
}

// Rows that a warp of row_sums.cu adds up, and warps of a block.
constexpr int CHUNK = 64, SUM_WARPS = 4;

void row_sums(const py::tuple& gpu, const py::tuple& call) {
  Arguments from(call);
  const DType dtype = dtype_of(from.integer()), rows_dtype = dtype_of(from.integer());
  RowSums p{};
  p.rows = from.address("rows"), p.stride = from.integer();
  p.ids = from.address(), p.id_bytes = narrow(from.integer());
  p.order = static_cast<const int64_t*>(from.address());
  p.repeat = narrow(from.integer()), p.length = narrow(from.integer());
  p.count = narrow(from.integer()), p.d = narrow(from.integer());
  p.out = from.address("out"), p.height = from.integer();
  p.scale = static_cast<float>(from.real());
  p.edges = static_cast<float*>(from.address()), p.edge_ids = from.address();
  p.dropout = read_dropout(from);
  const int64_t chunks = ceil_div(p.count, CHUNK);
  if (p.repeat < 1 || p.count < 1 || (chunks > 1 && (p.edges == nullptr || p.edge_ids == nullptr)))
    throw std::invalid_argument("row_sums: there must be rows, and edges for many");
  const int size = size_of(rows_dtype);
  const bool aligned = p.d % 4 == 0 && is_aligned(p.rows, p.stride * size, 4 * size) &&
                       is_aligned(p.out, 0, 4 * size_of(dtype)) && is_aligned(p.edges, 0, 16);
  p.stretches = narrow(ceil_div(p.d, aligned ? 128 : 32));
  Launch launch;
  launch.unit = std::string("row_sums_") + name_of(dtype);
  if (rows_dtype != dtype && rows_dtype != DType::f32)
    throw std::invalid_argument("rows: must be of the table's dtype or float32");
  launch.entry =
      std::string(rows_dtype == dtype ? "sum_own" : "sum_f32") + (aligned ? "" : "_elements");
  launch.threads = 32 * SUM_WARPS;
  launch.grid[0] = ceil_div(chunks * p.stretches, SUM_WARPS);
  const Gpu on = read_gpu(gpu);
  const py::gil_scoped_release release;
  start(on, launch, p);
}

}  // namespace

void register_embed(py::module_& m) {
  m.def("embed", embed, "The embedding sum; the order of `call` is in csrc/api.");
  m.def("embed_through_norm", embed_through_norm, "Its gradient through dropout and norm.");
  m.def("row_sums", row_sums, "The gradient of a table of which rows were looked up.");
}

}  // namespace pyfuse::cuda
