// Tokens by their logits against pyfuse/generation/sampling.py's definition, step by step, with a
// sort; logits in memory of their exact size.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "array.h"
#include "cpu/isa.h"
#include "random_factor.h"

namespace pyfuse::test {
namespace {

struct Case {
  int64_t size;
  double scale, grid;  // grid: logits are multiples of it; 0: any
  float temperature;
  int64_t top_k;
  double top_p, min_p;
  int64_t top;
};

constexpr double one = 1099511627776;  // 2^40

// Of an operation on floats, its double being exact or close enough to round twice.
float f32(double x) { return static_cast<float>(x); }

int64_t weight(float x, float largest) {
  const float d = std::max(f32(double{x} - largest), -32.f), y = f32(double{d} * 1.442695f);
  const float n = std::nearbyint(y), f = f32(double{y} - n), f2 = f32(double{f} * f);
  const auto line = [&](float a, float b) { return f32(double{a} + f32(double{b} * f)); };
  const auto plus = [&](float a, float b) { return f32(double{a} + f32(double{f2} * b)); };
  const float e =
      line(1.f, plus(line(0.6931472f, 0.24022648f),
                     plus(line(0.055503324f, 0.009618438f), line(0.0013398888f, 0.00015353352f))));
  return static_cast<int64_t>(double{e} * (1 << 24)) << 16 >> static_cast<int>(-n);
}

class Checked {
 public:
  explicit Checked(const Case& c) : c(c), logits(DType::f32, rows, c.size, 3, 0, c.scale) {
    if (c.grid > 0)
      for (int64_t i = 0; i < logits.array.count; ++i)
        logits.array.set(i, std::round(logits.array.get(i) / c.grid) * c.grid);
    for (int threads : {1, 2}) {
      run(threads);
      for (int64_t r = 0; r < rows; ++r) check(r);
    }
  }

 private:
  static constexpr int64_t rows = 3;

  SampleRow of(int64_t r) const {
    return {static_cast<uint64_t>(r * c.size) << 32 | static_cast<uint32_t>(dropout_seed[0]),
            static_cast<uint32_t>(dropout_seed[1]), static_cast<uint32_t>(17 * r)};
  }

  void run(int threads) {
    std::vector<SampleRow> given;
    for (int64_t r = 0; r < rows; ++r) given.push_back(of(r));
    results.assign(rows, {});
    best.assign(static_cast<size_t>(rows * c.top), {});
    SampleParams p{};
    p.logits = p.raw = static_cast<const float*>(logits.array.data());
    p.rows = rows, p.vocabulary = c.size, p.stride = p.raw_stride = logits.stride;
    p.temperature = c.temperature, p.top_k = c.top_k, p.top_p = c.top_p;
    p.least_weight = least();
    p.of = given.data(), p.results = results.data(), p.top = c.top, p.best = best.data();
    p.threads = threads;
    cpu::kernels().sample(p);
  }

  int64_t least() const { return static_cast<int64_t>(std::ceil(c.min_p * one)); }

  // The ids of row r, the likeliest first, of equals the lower id.
  std::vector<int64_t> sorted(const std::vector<float>& x) const {
    std::vector<int64_t> ids(x.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](int64_t a, int64_t b) {
      return x[static_cast<size_t>(a)] > x[static_cast<size_t>(b)];
    });
    return ids;
  }

  int64_t draw(int64_t r, const std::vector<float>& x) const {
    const auto at = [&](int64_t i) { return x[static_cast<size_t>(i)]; };
    std::vector<int64_t> ids = sorted(x);
    const float largest = at(ids[0]);
    if (c.top_k > 0 && c.top_k < c.size) {
      const float last = at(ids[static_cast<size_t>(c.top_k - 1)]);
      while (at(ids.back()) < last) ids.pop_back();
    }
    const auto total = [&] {
      return std::accumulate(ids.begin(), ids.end(), int64_t{0},
                             [&](int64_t sum, int64_t i) { return sum + weight(at(i), largest); });
    };
    const int64_t limit = static_cast<int64_t>(static_cast<double>(total()) * c.top_p);
    int64_t above = 0;
    std::vector<int64_t> kept;
    for (int64_t i : ids) {
      if (c.top_p < 1 && above >= limit && !kept.empty()) break;
      above += weight(at(i), largest);
      if (weight(at(i), largest) >= least()) kept.push_back(i);
    }
    std::sort(kept.begin(), kept.end());
    ids = kept;
    const SampleRow& row = of(r);
    const int64_t word = static_cast<int64_t>(row.seed >> 32) * 4;
    const uint64_t u =
        uint64_t{random_word(row.step, 0, 0, word)} << 32 | random_word(row.step, 0, 0, word + 1);
    int64_t left = static_cast<int64_t>(static_cast<unsigned __int128>(u) * total() >> 64);
    for (int64_t i : ids) {
      left -= weight(at(i), largest);
      if (left < 0) return i;
    }
    return -1;
  }

  void check(int64_t r) const {
    std::vector<float> raw, x;
    for (int64_t i = 0; i < c.size; ++i) {
      raw.push_back(f32(logits.get(r, i)));
      x.push_back(c.temperature > 0 ? f32(double{raw.back()} / c.temperature) : raw.back());
    }
    const std::vector<int64_t> order = sorted(raw);
    const SampleResult& result = results[static_cast<size_t>(r)];
    const int64_t token = c.temperature > 0 ? draw(r, x) : order[0];
    CHECK(result.token == token, "row %d of %d: %d, not %d", int(r), int(c.size), int(result.token),
          int(token));
    int64_t total = 0;
    for (float logit : raw) total += weight(logit, raw[static_cast<size_t>(order[0])]);
    CHECK(result.total == total && result.largest == raw[static_cast<size_t>(order[0])]);
    std::vector<int64_t> likeliest(order.begin(), order.begin() + c.top), told;
    std::sort(likeliest.begin(), likeliest.end());
    for (int64_t i = 0; i < c.top; ++i)
      told.push_back(best[static_cast<size_t>(r * c.top + i)].token);
    CHECK(told == likeliest, "row %d of %d: other tokens are the likeliest", int(r), int(c.size));
  }

  const Case c;
  Rows logits;
  std::vector<SampleResult> results;
  std::vector<SampleTop> best;
};

constexpr int64_t sizes[] = {1, 2, 3, 7, 9, 16, 63, 65, 257, 1025, 4099, 30011};

TEST(sample_greedy) {
  for (int64_t size : sizes)
    for (double grid : {0., 0.5}) Checked({size, 3, grid, 0, 0, 1, 0, std::min<int64_t>(size, 5)});
}

TEST(sample_draws) {
  for (int64_t size : sizes)
    for (double scale : {0.5, 8., 100.})
      for (double grid : {0., 0.25}) {
        Checked({size, scale, grid, 1, 0, 1, 0, 0});
        Checked({size, scale, grid, 0.7f, 40, 1, 0, 1});
        Checked({size, scale, grid, 0.7f, 0, 0.9, 0, size});
        Checked({size, scale, grid, 1.3f, 0, 1, 0.05, 0});
        Checked({size, scale, grid, 0.9f, 2000, 0.8, 0.01, 0});
      }
}

TEST(sample_objects) {
  Rows logits(DType::f32, 3, 100);
  const auto token_of_row_1 = [&] {
    SampleRow of[3] = {};
    SampleResult results[3];
    SampleParams p{};
    p.logits = static_cast<const float*>(logits.array.data());
    p.rows = 3, p.vocabulary = 100, p.stride = logits.stride;
    p.temperature = 1, p.top_p = 1;
    p.of = of, p.results = results, p.threads = 1;
    cpu::kernels().sample(p);
    CHECK(results[0].token >= 0 && results[2].token >= 0);
    return results[1].token;
  };
  CHECK(token_of_row_1() >= 0);
  logits.array.set(logits.stride + 99, INFINITY);
  CHECK(token_of_row_1() == sample_infinite);
  logits.array.set(logits.stride, NAN);
  CHECK(token_of_row_1() == sample_nan);
  for (int64_t i = 0; i < 100; ++i) logits.array.set(logits.stride + i, -INFINITY);
  CHECK(token_of_row_1() == sample_nothing);
}

}  // namespace
}  // namespace pyfuse::test
