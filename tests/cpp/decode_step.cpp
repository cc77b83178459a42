// A whole decoding step against the same in double: a prompt, then tokens one by one and several at
// once, of two sequences in shuffled pages.
#include <cmath>
#include <cstring>
#include <memory>

#include "array.h"
#include "cpu/isa.h"

namespace pyfuse::test {
namespace {

constexpr int64_t PANEL = 64, PAGE = 4, PAGES = 11, SEQUENCES = 2, LAYERS = 2, LONGEST = 20;

int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

struct Case {
  StepWeights weights;
  DType dtype;
  int64_t width, heads_q, heads_k, d, hidden, vocabulary;
  bool rms, gated, rope;
  int64_t window_left = -1;
  Activation activation = Activation::silu;
};

// W [N, K] in double, as the panels hold it.
class Matrix {
 public:
  Matrix(const Case& c, int64_t n, int64_t k)
      : n_(n),
        k_(k),
        values_(static_cast<size_t>(n * k)),
        panels_(padded(n) * padded(k) * size(c.weights)),
        scale_(DType::f32, padded(n)),
        bias_(DType::f32, padded(n)) {
    const bool narrow = c.weights == StepWeights::int8;
    memset(panels_.data(), 0, static_cast<size_t>(padded(n) * padded(k) * size(c.weights)));
    for (int64_t i = 0; i < padded(n); ++i) {
      scale_.set(i, i < n && narrow ? 0.002 * (1.5 + random_unit()) : 0);
      bias_.set(i, i < n ? random_unit() : 0);
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < k; ++j) {
        const double x = random_unit() / std::sqrt(static_cast<double>(k));
        value(i, j) = narrow ? std::round(127 * random_unit()) : rounded(x, dtype(c.weights));
        put(c.weights, i, j, value(i, j));
        if (narrow) value(i, j) *= scale_.get(i);
      }
    matrix = {panels_.data(), narrow ? floats(scale_) : nullptr, floats(bias_), n, k};
  }

  double times(const std::vector<double>& x, int64_t i) const {
    double sum = bias_.get(i);
    for (int64_t j = 0; j < k_; ++j) sum += values_[static_cast<size_t>(i * k_ + j)] * x[size_t(j)];
    return sum;
  }
  std::vector<double> times(const std::vector<double>& x) const {
    std::vector<double> y(static_cast<size_t>(n_));
    for (int64_t i = 0; i < n_; ++i) y[static_cast<size_t>(i)] = times(x, i);
    return y;
  }

  StepMatrix matrix;

 private:
  static const float* floats(const Array& a) { return static_cast<const float*>(a.data()); }
  static int64_t size(StepWeights w) {
    return w == StepWeights::f32 ? 4 : w == StepWeights::bf16 ? 2 : 1;
  }
  static DType dtype(StepWeights w) { return w == StepWeights::bf16 ? DType::bf16 : DType::f32; }
  double& value(int64_t i, int64_t j) { return values_[static_cast<size_t>(i * k_ + j)]; }

  void put(StepWeights w, int64_t i, int64_t j, double x) {
    const int64_t unit = w == StepWeights::f32 ? 1 : 2;
    const int64_t at =
        ((i / PANEL * padded(k_) / unit + j / unit) * PANEL + i % PANEL) * unit + j % unit;
    if (w == StepWeights::f32) static_cast<float*>(panels_.data())[at] = static_cast<float>(x);
    if (w == StepWeights::bf16)
      static_cast<uint16_t*>(panels_.data())[at] = to_half(x, DType::bf16);
    if (w == StepWeights::int8) static_cast<int8_t*>(panels_.data())[at] = static_cast<int8_t>(x);
  }

  int64_t n_, k_;
  std::vector<double> values_;
  Memory panels_;
  Array scale_, bias_;
};

struct Layer {
  Layer(const Case& c)
      : norm1(DType::f32, 2 * c.width),
        norm2(DType::f32, 2 * c.width),
        qkv(c, (c.heads_q + 2 * c.heads_k) * c.d, c.width),
        out(c, c.width, c.heads_q * c.d),
        gate(c, c.hidden, c.width),
        up(c, c.hidden, c.width),
        down(c, c.width, c.hidden) {
    norm1.fill_random(), norm2.fill_random();
  }
  Array norm1, norm2;  // weight, then bias
  Matrix qkv, out, gate, up, down;
};

class Model {
 public:
  explicit Model(const Case& c)
      : c(c),
        tokens_(c.dtype, c.vocabulary * c.width),
        places_(DType::f32, LONGEST * c.width),
        cos_(DType::f32, LONGEST * (c.d / 2)),
        sin_(DType::f32, LONGEST * (c.d / 2)),
        norm_(DType::f32, 2 * c.width),
        head_(c, c.vocabulary, c.width) {
    tokens_.fill_random(), places_.fill_random(), norm_.fill_random();
    cos_.fill_random(), sin_.fill_random();
    for (int64_t i = 0; i < LAYERS; ++i) {
      layers_.push_back(std::make_unique<Layer>(c));
      const Layer& l = *layers_.back();
      steps_.push_back({norm(l.norm1), norm(l.norm2), l.qkv.matrix, l.out.matrix,
                        c.gated ? l.gate.matrix : StepMatrix{}, l.up.matrix, l.down.matrix});
    }
    StepModel& m = model;
    m.layers = steps_.data(), m.layer_count = LAYERS;
    m.width = c.width, m.heads_q = c.heads_q, m.heads_k = c.heads_k, m.d = c.d;
    m.hidden = c.hidden, m.vocabulary = c.vocabulary, m.weights = c.weights, m.dtype = c.dtype;
    m.tokens = tokens_.data(), m.places = c.rope ? nullptr : floats(places_);
    m.cos = c.rope ? floats(cos_) : nullptr, m.sin = c.rope ? floats(sin_) : nullptr;
    m.positions = LONGEST, m.rotated = c.rope ? c.d / 2 * 2 : 0;
    m.norm = norm(norm_), m.head = head_.matrix;
    m.embedding_scale = 1.25, m.head_scale = 0.75, m.eps = 1e-5, m.scale = 0.4;
    m.activation = c.activation, m.window_left = c.window_left;
  }

  // Logits [T][V] of a text, all at once.
  std::vector<std::vector<double>> logits(const std::vector<int64_t>& ids) const {
    std::vector<std::vector<double>> x;
    for (size_t t = 0; t < ids.size(); ++t) {
      x.emplace_back(static_cast<size_t>(c.width));
      for (int64_t j = 0; j < c.width; ++j)
        x[t][static_cast<size_t>(j)] =
            1.25 * tokens_.get(ids[t] * c.width + j) +
            (c.rope ? 0 : places_.get(static_cast<int64_t>(t) * c.width + j));
    }
    for (const auto& layer : layers_) run_layer(*layer, x);
    for (auto& row : x) {
      row = normed(norm_, row);
      for (double& value : row) value *= 0.75;
      row = head_.times(row);
    }
    return x;
  }

  StepModel model{};
  const Case c;

 private:
  static const float* floats(const Array& a) { return static_cast<const float*>(a.data()); }
  StepNorm norm(const Array& a) const { return {floats(a), c.rms ? nullptr : floats(a) + c.width}; }

  std::vector<double> normed(const Array& parameters, const std::vector<double>& x) const {
    double mean = 0, squares = 0;
    const double count = static_cast<double>(c.width);
    if (!c.rms)
      for (const double value : x) mean += value / count;
    for (const double value : x) squares += (value - mean) * (value - mean) / count;
    std::vector<double> y(x.size());
    for (size_t j = 0; j < x.size(); ++j) {
      const int64_t at = static_cast<int64_t>(j);
      y[j] = (x[j] - mean) / std::sqrt(squares + 1e-5) * parameters.get(at) +
             (c.rms ? 0 : parameters.get(c.width + at));
    }
    return y;
  }

  void turn(double* head, int64_t t) const {
    const int64_t half = c.d / 2;
    for (int64_t i = 0; c.rope && i < half; ++i) {
      const double cos = cos_.get(t * half + i), sin = sin_.get(t * half + i);
      const double a = head[i], b = head[i + half];
      head[i] = a * cos - b * sin, head[i + half] = b * cos + a * sin;
    }
  }

  void run_layer(const Layer& layer, std::vector<std::vector<double>>& x) const {
    std::vector<std::vector<double>> qkv;
    for (size_t t = 0; t < x.size(); ++t) {
      qkv.push_back(layer.qkv.times(normed(layer.norm1, x[t])));
      for (int64_t h = 0; h < c.heads_q + c.heads_k; ++h)
        turn(qkv[t].data() + h * c.d, static_cast<int64_t>(t));
    }
    for (size_t t = 0; t < x.size(); ++t) {
      std::vector<double> o(static_cast<size_t>(c.heads_q * c.d));
      for (int64_t h = 0; h < c.heads_q; ++h) attend(qkv, static_cast<int64_t>(t), h, &o[0]);
      add(x[t], layer.out.times(o));
      const auto n = normed(layer.norm2, x[t]);
      auto up = layer.up.times(n);
      const auto gate = layer.gate.times(n);
      for (size_t j = 0; j < up.size(); ++j)
        up[j] = c.gated ? activate(gate[j]) * up[j] : activate(up[j]);
      add(x[t], layer.down.times(up));
    }
  }
  static void add(std::vector<double>& x, const std::vector<double>& y) {
    for (size_t j = 0; j < x.size(); ++j) x[j] += y[j];
  }
  double activate(double x) const {
    return c.activation == Activation::relu ? (x > 0 ? x : 0) : x / (1 + std::exp(-x));
  }

  void attend(const std::vector<std::vector<double>>& qkv, int64_t t, int64_t h, double* o) const {
    const int64_t hk = h / (c.heads_q / c.heads_k);
    const int64_t k_at = (c.heads_q + hk) * c.d, v_at = k_at + c.heads_k * c.d;
    const int64_t first = c.window_left >= 0 && t > c.window_left ? t - c.window_left : 0;
    std::vector<double> weights;
    double sum = 0;
    for (int64_t n = first; n <= t; ++n) {
      double score = 0;
      for (int64_t j = 0; j < c.d; ++j)
        score += qkv[size_t(t)][size_t(h * c.d + j)] * qkv[size_t(n)][size_t(k_at + j)];
      weights.push_back(std::exp(0.4 * score)), sum += weights.back();
    }
    for (int64_t n = first; n <= t; ++n)
      for (int64_t j = 0; j < c.d; ++j)
        o[h * c.d + j] += weights[size_t(n - first)] / sum * qkv[size_t(n)][size_t(v_at + j)];
  }

  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<StepLayer> steps_;
  Array tokens_, places_, cos_, sin_, norm_;
  Matrix head_;
};

// The logits of both texts, by calls of so many tokens of each; negative: a prompt.
void run(const Model& model, const std::vector<std::vector<int64_t>>& texts,
         const std::vector<int64_t>& parts, int threads, Array& all) {
  const Case& c = model.c;
  const int32_t table[SEQUENCES][5] = {{3, 9, 0, 7, 5}, {10, 1, 8, 2, 6}};
  Array k(c.dtype, LAYERS * PAGES * c.heads_k * PAGE * c.d), v(c.dtype, k.count);
  int64_t at = 0;
  for (const int64_t part : parts) {
    const int64_t count = std::abs(part);
    std::vector<int64_t> ids;
    for (const auto& text : texts)
      ids.insert(ids.end(), &text[size_t(at)], &text[size_t(at)] + count);
    const std::vector<int64_t> lengths(SEQUENCES, at + count);
    Array y(DType::f32, SEQUENCES * count * c.vocabulary);
    StepParams p{};
    p.model = &model.model, p.sequences = SEQUENCES, p.queries = count;
    p.ids = ids.data(), p.lengths = lengths.data();
    p.block_table = &table[0][0], p.table_stride = 5, p.page_size = PAGE, p.pages = PAGES;
    p.k = k.data(), p.v = v.data(), p.cache = c.dtype;
    p.prompt = part < 0, p.every = true;
    p.logits = static_cast<float*>(y.data()), p.logits_stride = c.vocabulary;
    p.threads = threads;
    cpu::kernels().decode_step(p);
    for (int64_t b = 0; b < SEQUENCES; ++b)
      for (int64_t i = 0; i < count * c.vocabulary; ++i)
        all.set((b * LONGEST + at) * c.vocabulary + i, y.get(b * count * c.vocabulary + i));
    at += count;
  }
}

void check_case(const Case& c) {
  const Model model(c);
  std::vector<std::vector<int64_t>> texts(SEQUENCES);
  for (auto& text : texts)
    for (int64_t t = 0; t < LONGEST; ++t)
      text.push_back(static_cast<int64_t>((random_unit() + 1) / 2 * double(c.vocabulary)));
  // Rounding of keys, values and rows (to 16 bits beside int8), over a few layers.
  const double relative = c.dtype == DType::bf16           ? 0.03
                          : c.weights == StepWeights::int8 ? 1e-3
                                                           : 2e-5;
  const int64_t count = SEQUENCES * LONGEST * c.vocabulary;
  Array first(DType::f32, count), other(DType::f32, count);
  run(model, texts, {-7, 1, 1, 3, -8}, 2, first);
  for (int64_t b = 0; b < SEQUENCES; ++b) {
    const auto exact = model.logits(texts[size_t(b)]);
    double largest = 0;
    for (const auto& row : exact)
      for (const double value : row) largest = std::fmax(largest, std::fabs(value));
    for (int64_t t = 0; t < LONGEST; ++t)
      for (int64_t i = 0; i < c.vocabulary; ++i) {
        const double y = first.get((b * LONGEST + t) * c.vocabulary + i);
        const double needs = exact[size_t(t)][size_t(i)];
        CHECK(close(y, needs, relative * largest),
              "sequence %d, token %d, logit %d: %.9g, needs %.9g", int(b), int(t), int(i), y,
              needs);
      }
  }
  for (const int threads : {1, 3}) {
    run(model, texts, {-7, 1, 1, 3, -8}, threads, other);
    CHECK(same_bytes(first, other), "%d threads", threads);
  }
  run(model, texts, {-4, -3, 4, 1, -3, -5}, 2, other);
  CHECK(same_bytes(first, other), "other parts");
}

TEST(a_step_is_that_of_double) {
  for (const StepWeights weights : {StepWeights::f32, StepWeights::bf16, StepWeights::int8}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      check_case({weights, dtype, 70, 6, 2, 10, 99, 67, true, true, true});
      check_case({weights, dtype, 33, 3, 3, 7, 40, 131, false, false, false, 5, Activation::relu});
      check_case({weights, dtype, 128, 2, 1, 64, 64, 64, true, true, true, 2});
    }
  }
}

}  // namespace
}  // namespace pyfuse::test
