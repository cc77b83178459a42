// A model as Python packs it -> StepModel, once; then a step of it for each call.
#include <vector>

#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

const float* floats(Arguments& from, const char* name = nullptr) {
  return static_cast<const float*>(from.address(name));
}

StepNorm read_norm(Arguments& from) {
  StepNorm norm{};
  norm.weight = floats(from, "norm");
  norm.bias = floats(from);
  return norm;
}

// (w, scale, bias, N, K); w 0: no such matrix.
StepMatrix read_matrix(Arguments& from, const char* name) {
  StepMatrix matrix{};
  matrix.w = from.address(name), matrix.scale = floats(from), matrix.bias = floats(from);
  matrix.n = from.integer(), matrix.k = from.integer();
  if (matrix.n < 0 || matrix.k < 0) throw std::invalid_argument("matrix: negative size");
  return matrix;
}

int64_t positive(int64_t value, const char* name) {
  if (value <= 0)
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) +
                                ", needs a positive number");
  return value;
}

// Holds addresses only: whoever makes it keeps the tensors alive.
class Model {
 public:
  StepModel model{};

  // The order is that of pyfuse/backends/cpu_step.py.
  Model(const py::tuple& sizes, const py::tuple& tables, const py::tuple& numbers,
        const py::tuple& norm, const py::tuple& head, const py::sequence& layers) {
    read_sizes(sizes);
    Arguments table(tables), number(numbers), last(norm), logits(head);
    model.tokens = table.address("tokens"), model.places = floats(table);
    model.cos = floats(table), model.sin = floats(table);
    model.embedding_scale = number.real(), model.head_scale = number.real();
    model.eps = number.real(), model.scale = number.real();
    model.activation = activation_of(static_cast<int>(number.integer()));
    model.window_left = number.integer();
    model.norm = read_norm(last), model.head = read_matrix(logits, "head");
    for (const auto& layer : layers) layers_.push_back(read_layer(layer.cast<py::tuple>()));
    model.layers = layers_.data(), model.layer_count = static_cast<int64_t>(layers_.size());
    check();
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

 private:
  std::vector<StepLayer> layers_;

  void read_sizes(const py::tuple& sizes) {
    Arguments from(sizes);
    model.width = positive(from.integer(), "width");
    model.heads_q = positive(from.integer(), "heads_q");
    model.heads_k = positive(from.integer(), "heads_k");
    model.d = positive(from.integer(), "d");
    model.hidden = positive(from.integer(), "hidden");
    model.vocabulary = positive(from.integer(), "vocabulary");
    const int64_t weights = from.integer();
    if (weights < 0 || weights > static_cast<int>(StepWeights::int8))
      throw std::invalid_argument("weights: no such code: " + std::to_string(weights));
    model.weights = static_cast<StepWeights>(weights);
    model.dtype = dtype_of(from.integer());
    model.positions = from.integer(), model.rotated = from.integer();
  }

  static StepLayer read_layer(const py::tuple& layer) {
    Arguments from(layer);
    StepLayer to{};
    to.norm1 = read_norm(from), to.norm2 = read_norm(from);
    to.qkv = read_matrix(from, "qkv"), to.out = read_matrix(from, "out");
    to.gate = read_matrix(from, nullptr);
    to.up = read_matrix(from, "up"), to.down = read_matrix(from, "down");
    return to;
  }

  static void fit(const StepMatrix& matrix, const char* name, int64_t n, int64_t k) {
    if (matrix.n == n && matrix.k == k) return;
    throw std::invalid_argument(std::string(name) + ": got [" + std::to_string(matrix.n) + ", " +
                                std::to_string(matrix.k) + "], needs [" + std::to_string(n) + ", " +
                                std::to_string(k) + "]");
  }

  void check() const {
    const StepModel& m = model;
    if (m.heads_q % m.heads_k != 0) throw std::invalid_argument("heads_q: no multiple of heads_k");
    if (m.rotated < 0 || m.rotated > m.d || m.rotated % 2 != 0)
      throw std::invalid_argument("rotated: got " + std::to_string(m.rotated));
    if (m.dtype != DType::f32 && m.dtype != DType::bf16)
      throw std::invalid_argument("dtype: needs float32 or bfloat16");
    for (const StepLayer& layer : layers_) {
      fit(layer.qkv, "qkv", (m.heads_q + 2 * m.heads_k) * m.d, m.width);
      fit(layer.out, "out", m.width, m.heads_q * m.d);
      if (layer.gate.w != nullptr) fit(layer.gate, "gate", m.hidden, m.width);
      fit(layer.up, "up", m.hidden, m.width);
      fit(layer.down, "down", m.width, m.hidden);
    }
    fit(m.head, "head", m.vocabulary, m.width);
  }
};

// Whatever would be read or written outside of its table or page.
void check_step(const StepParams& p) {
  const StepModel& m = *p.model;
  const int64_t group = m.heads_q / m.heads_k;
  if (!p.prompt && (p.queries > MOST_STEP_QUERIES || p.queries * group > MOST_STEP_ROWS) &&
      p.queries > 1)
    throw std::invalid_argument("ids: " + std::to_string(p.queries) +
                                " tokens of a sequence, more than a step takes");
  const bool placed = m.places != nullptr || m.cos != nullptr;
  for (int64_t i = 0; i < p.sequences * p.queries; ++i)
    if (p.ids[i] < 0 || p.ids[i] >= m.vocabulary)
      throw py::index_error("ids: got " + std::to_string(p.ids[i]) + ", but the vocabulary has " +
                            std::to_string(m.vocabulary));
  for (int64_t b = 0; b < p.sequences; ++b) {
    const int64_t length = p.lengths[b], first = length - p.queries;
    if (first < 0 || (placed && length > m.positions))
      throw std::invalid_argument("lengths: got " + std::to_string(length) + " with " +
                                  std::to_string(p.queries) + " new tokens and " +
                                  std::to_string(m.positions) + " positions");
    const int64_t lo = m.window_left >= 0 && first > m.window_left ? first - m.window_left : 0;
    if ((length + p.page_size - 1) / p.page_size > p.table_stride)
      throw std::invalid_argument("block_table: too short for a sequence of " +
                                  std::to_string(length));
    for (int64_t i = lo / p.page_size; i * p.page_size < length; ++i) {
      const int32_t page = p.block_table[b * p.table_stride + i];
      if (page < 0 || page >= p.pages)
        throw std::invalid_argument("block_table: entry [" + std::to_string(b) + ", " +
                                    std::to_string(i) + "] is " + std::to_string(page) +
                                    ", but the cache has " + std::to_string(p.pages) + " pages");
    }
  }
}

// (sequences, queries, ids, lengths, block_table, table_stride, page_size, pages, k, v, cache
// dtype, prompt, every, logits, logits_stride, threads)
void step(const Model& model, const py::tuple& call) {
  Arguments from(call);
  StepParams p{};
  p.model = &model.model;
  p.sequences = from.integer(), p.queries = from.integer();
  if (p.sequences <= 0 || p.queries <= 0) return;
  p.ids = static_cast<const int64_t*>(from.address("ids"));
  p.lengths = static_cast<const int64_t*>(from.address("lengths"));
  p.block_table = static_cast<const int32_t*>(from.address("block_table"));
  p.table_stride = from.integer();
  p.page_size = positive(from.integer(), "page_size"), p.pages = from.integer();
  p.k = from.address("k"), p.v = from.address("v");
  p.cache = dtype_of(from.integer());
  p.prompt = from.integer() != 0, p.every = from.integer() != 0;
  p.logits = static_cast<float*>(from.address("logits"));
  p.logits_stride = from.integer();
  p.threads = at_least_one(static_cast<int>(from.integer()));
  check_step(p);
  const py::gil_scoped_release release;
  cpu::kernels().decode_step(p);
}

}  // namespace

void register_decode_step(py::module_& m) {
  m.attr("most_step_queries") = MOST_STEP_QUERIES;
  m.attr("most_step_rows") = MOST_STEP_ROWS;
  py::class_<Model>(m, "StepModel", "A packed decoder; see csrc/api/decode_step.cpp.")
      .def(py::init<const py::tuple&, const py::tuple&, const py::tuple&, const py::tuple&,
                    const py::tuple&, const py::sequence&>())
      .def("step", &step, "One step: tokens of each sequence in, logits out; see params.h.");
}

}  // namespace pyfuse
