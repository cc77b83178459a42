// Python arguments -> SampleParams -> kernel -> tokens and log-probabilities.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "api/arguments.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace pyfuse {
namespace {

constexpr int64_t most_tokens = int64_t(1) << 22;  // their weights have to add up to 63 bits
typedef std::vector<std::pair<uint64_t, uint32_t>> Seeds;

void check(const std::vector<SampleResult>& results) {
  for (size_t r = 0; r < results.size(); ++r) {
    const int64_t token = results[r].token;
    if (token >= 0) continue;
    const char* what = token == sample_nan        ? "NaN"
                       : token == sample_infinite ? "+inf"
                                                  : "nothing but -inf, so no token is left,";
    throw std::invalid_argument(std::string("logits: ") + what + " in row " + std::to_string(r));
  }
}

// (token, its log-probability, ((token, log-probability), ...) of the likeliest) of each row.
py::list log_probabilities(const SampleParams& p) {
  py::list rows;
  for (int64_t r = 0; r < p.rows; ++r) {
    const SampleResult& of = p.results[r];
    const double shift = std::log(static_cast<double>(of.total) / 1099511627776.0);  // 2^40
    const auto logprob = [&](float logit) {
      return static_cast<double>(logit) - static_cast<double>(of.largest) - shift;
    };
    SampleTop* best = p.best + r * p.top;
    std::stable_sort(best, best + p.top, [](const SampleTop& a, const SampleTop& b) {
      return a.logit > b.logit;  // of equals the lower id is first already
    });
    py::tuple top(static_cast<size_t>(p.top));
    for (int64_t i = 0; i < p.top; ++i)
      top[static_cast<size_t>(i)] = py::make_tuple(best[i].token, logprob(best[i].logit));
    rows.append(py::make_tuple(of.token, logprob(of.logit), top));
  }
  return rows;
}

py::tuple sample(uintptr_t logits, int64_t rows, int64_t vocabulary, int64_t stride,
                 double temperature, int64_t top_k, double top_p, int64_t least_weight,
                 const Seeds& seeds, const std::vector<uint32_t>& steps, uintptr_t raw,
                 int64_t raw_stride, int64_t top, int threads) {
  if (vocabulary < 1 || vocabulary > most_tokens || top < 0 || top > vocabulary)
    throw std::invalid_argument("logits: needs 1 to 2^22 tokens, and no less than are told of");
  const size_t count = static_cast<size_t>(rows);
  if (seeds.size() != count || steps.size() != count)
    throw std::invalid_argument("seeds, steps: needs one for each row");
  std::vector<SampleRow> of(count);
  for (size_t r = 0; r < count; ++r) of[r] = {seeds[r].first, seeds[r].second, steps[r]};
  std::vector<SampleResult> results(count);
  std::vector<SampleTop> best(count * static_cast<size_t>(top));
  SampleParams p{};
  p.rows = rows, p.vocabulary = vocabulary, p.stride = stride, p.raw_stride = raw_stride;
  if (rows > 0) p.logits = static_cast<const float*>(address(logits, "logits"));
  p.raw = static_cast<const float*>(optional_address(raw));
  p.temperature = static_cast<float>(temperature);
  p.top_k = top_k, p.top_p = top_p, p.least_weight = least_weight;
  p.of = of.data(), p.results = results.data(), p.best = best.data(), p.top = top;
  p.threads = at_least_one(threads);
  {
    const py::gil_scoped_release release;
    cpu::kernels().sample(p);
  }
  check(results);
  py::list tokens;
  for (const SampleResult& result : results) tokens.append(result.token);
  return py::make_tuple(tokens, raw == 0 ? py::object(py::none()) : log_probabilities(p));
}

}  // namespace

void register_sample(py::module_& m) {
  m.def("sample", &sample, "Tokens of rows of logits, and log-probabilities; see params.h.");
}

}  // namespace pyfuse
