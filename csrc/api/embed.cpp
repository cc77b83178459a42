// Python arguments -> EmbedParams and RowSumsParams, with the checks that the kernels leave to
// their caller.
#include "api/arguments.h"
#include "api/caches.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

// Every id is looked at before the first is used: the kernels read their tables unchecked.
void check_ids(const EmbedTable& table, const char* ids_name, const char* table_name) {
  if (table.weight == nullptr) return;
  if (table.id_count < 1) throw std::invalid_argument(std::string(ids_name) + ": none");
  if (table.ids == nullptr) {
    if (table.id_count > table.rows)
      throw std::out_of_range(std::string(table_name) + ": too few rows");
    return;
  }
  for (int64_t i = 0; i < table.id_count; ++i)
    if (table.ids[i] < 0 || table.ids[i] >= table.rows)
      throw std::out_of_range(std::string(ids_name) + ": index out of range: got " +
                              std::to_string(table.ids[i]) + ", but " + table_name + " has " +
                              std::to_string(table.rows) + " rows");
}

const int64_t* read_ids(const py::object& from) {
  if (from.is_none()) return nullptr;
  return static_cast<const int64_t*>(address(from.cast<uintptr_t>(), "ids"));
}

// None, or (weight, row stride, rows, ids or None, number of ids).
EmbedTable read_table(const py::object& from, int64_t d, const char* name) {
  EmbedTable table{};
  if (from.is_none()) return table;
  const py::tuple fields = from.cast<py::tuple>();
  if (fields.size() != 5) throw std::invalid_argument(std::string(name) + ": needs five numbers");
  table.rows = fields[2].cast<int64_t>();
  table.ids = read_ids(fields[3]);
  table.id_count = fields[4].cast<int64_t>();
  // A table without elements has no memory either, and yet ids are checked against its rows.
  static const char nothing = 0;
  table.weight = table.rows == 0 || d == 0 ? &nothing : address(fields[0].cast<uintptr_t>(), name);
  table.row_stride = fields[1].cast<int64_t>();
  return table;
}

// All that both directions are told. tables = (token, position, segment); norm = (weight, bias,
// eps) or None; dropout = (seed, p) or None.
EmbedParams read_embed(const py::tuple& tables, int64_t tokens, int64_t d, int dtype,
                       int position_dtype, double scale, const py::object& norm,
                       const py::object& dropout, uintptr_t statistics, int threads) {
  if (tables.size() != 3) throw std::invalid_argument("tables: needs three");
  EmbedParams p{};
  p.token = read_table(tables[0], d, "weight");
  p.position = read_table(tables[1], d, "position_weight");
  p.segment = read_table(tables[2], d, "segment_weight");
  if (p.token.weight == nullptr) throw std::invalid_argument("weight: None");
  p.tokens = tokens, p.d = d;
  p.dtype = dtype_of(dtype);
  p.position_dtype = dtype_of(position_dtype);
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  if (p.position_dtype != p.dtype && !(half && p.position_dtype == DType::f32))
    throw std::invalid_argument("embed: positions must be of weight's dtype or the computed one");
  p.scale = scale;
  if (!norm.is_none()) {
    const py::tuple fields = norm.cast<py::tuple>();
    p.norm_weight = address(fields[0].cast<uintptr_t>(), "norm_weight");
    p.norm_bias = optional_address(fields[1].cast<uintptr_t>());
    p.eps = fields[2].cast<double>();
  }
  if (!dropout.is_none()) {
    const py::tuple fields = dropout.cast<py::tuple>();
    p.dropout_seed =
        static_cast<const int64_t*>(address(fields[0].cast<uintptr_t>(), "dropout_seed"));
    p.dropout_p = fields[1].cast<double>();
    if (!(p.dropout_p >= 0.0 && p.dropout_p < 1.0))
      throw std::invalid_argument("dropout_p: needs 0 <= p < 1");
  }
  p.statistics = optional_address(statistics);
  p.threads = at_least_one(threads);
  return p;
}

void check_all_ids(const EmbedParams& p) {
  check_ids(p.token, "token_ids", "weight");
  check_ids(p.position, "positions", "position_weight");
  check_ids(p.segment, "segment_ids", "segment_weight");
}

void embed(const py::tuple& tables, int64_t tokens, int64_t d, int dtype, int position_dtype,
           double scale, const py::object& norm, const py::object& dropout, uintptr_t statistics,
           int threads, uintptr_t y) {
  if (tokens == 0) return;
  EmbedParams p = read_embed(tables, tokens, d, dtype, position_dtype, scale, norm, dropout,
                             statistics, threads);
  if (d > 0) p.y = address(y, "y");
  const py::gil_scoped_release release;
  check_all_ids(p);
  if (d > 0) cpu::kernels().embed(p);
}

void embed_gradient(const py::tuple& tables, int64_t tokens, int64_t d, int dtype,
                    int position_dtype, double scale, const py::object& norm,
                    const py::object& dropout, uintptr_t statistics, int threads, uintptr_t dy,
                    int64_t dy_stride, uintptr_t dsum, uintptr_t dnorm) {
  if (tokens == 0 || d == 0) return;
  EmbedGradientParams p{};
  p.forward = read_embed(tables, tokens, d, dtype, position_dtype, scale, norm, dropout, statistics,
                         threads);
  p.dy = address(dy, "dy");
  p.dy_stride = dy_stride;
  p.dsum = optional_address(dsum);
  p.dnorm = optional_address(dnorm);
  if (p.forward.norm_weight != nullptr && p.forward.statistics == nullptr)
    throw std::invalid_argument("statistics: null, but there is a norm");
  if (p.forward.norm_weight == nullptr && (p.dsum == nullptr || p.dnorm != nullptr))
    throw std::invalid_argument("embed_gradient: without a norm, dsum is all there is");
  const py::gil_scoped_release release;
  check_all_ids(p.forward);
  if (p.dsum != nullptr)
    prefer_huge_pages(p.dsum, tokens * d * (p.forward.dtype == DType::f64 ? 8 : 4));
  cpu::kernels().embed_gradient(p);
}

void row_sums(uintptr_t rows, int64_t row_stride, int64_t count, int64_t d, const py::object& ids,
              int64_t id_count, uintptr_t y, int64_t table_rows, int rows_dtype, int dtype,
              double scale, int threads) {
  if (d == 0 || (table_rows == 0 && count == 0)) return;
  RowSumsParams p{};
  p.rows = count > 0 ? address(rows, "rows") : nullptr;
  p.row_stride = row_stride, p.count = count, p.d = d;
  p.ids = count > 0 ? read_ids(ids) : nullptr;  // an empty tensor has no memory
  p.id_count = id_count;
  p.y = address(y, "y");
  p.table_rows = table_rows;
  p.rows_dtype = dtype_of(rows_dtype);
  p.dtype = dtype_of(dtype);
  p.scale = scale;
  p.threads = at_least_one(threads);
  const bool half = p.dtype == DType::bf16 || p.dtype == DType::f16;
  if (p.rows_dtype != p.dtype && !(half && p.rows_dtype == DType::f32))
    throw std::invalid_argument("row_sums: rows must be of y's dtype or the computed one");
  const py::gil_scoped_release release;
  const EmbedTable table = {p.y, d, table_rows, p.ids, id_count};
  if (count > 0) check_ids(table, "ids", "the table");
  const int64_t element = p.dtype == DType::f64 ? 8 : half ? 2 : 4;
  prefer_huge_pages(p.y, table_rows * d * element);
  cpu::kernels().row_sums(p);
}

}  // namespace

void register_embed(py::module_& m) {
  m.def("embed", &embed, "Sum of table rows, norm, dropout into y [tokens, d]; see params.h.");
  m.def("embed_gradient", &embed_gradient, "Gradient of the sum and of the norm's parameters.");
  m.def("row_sums", &row_sums, "Gradient of a table of which rows were looked up; see params.h.");
}

}  // namespace pyfuse
