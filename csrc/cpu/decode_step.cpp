// A whole decoding step of a Transformer in one call: a few tokens of each sequence in, logits out.
//
//   x = embedding(ids)
//   for each layer:  qkv = norm(x)·W;  q, k = rope(q, k);  cache <- k, v
//                    x += attention(q, cache)·W;  x += feed_forward(norm(x))
//   logits = norm(x)·W
//
// A token costs one reading of all weights, and little else: so threads are started once, matrices
// are packed into panels (panel_rows.h), which threads take as they are free, and what lies between
// the matrices is computed by whoever needs it, several times over rather than waited for. x stays
// in float; keys and values are rounded to the cache's type. Each row's result is the same whatever
// rows are beside it, and for every number of threads.
//
// With many tokens of a sequence (its prompt) the same code is bound by arithmetic, and attention
// is left to the tiled kernel.
#include "cpu/activation.h"
#include "cpu/attention_decode.h"
#include "cpu/norm_row.h"
#include "cpu/panel_rows.h"
#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {

void attention(const AttentionParams& p);

namespace {

constexpr int64_t ROW_BLOCK = 48;  // rows of a task: they stay in the second-level cache
static_assert(MOST_STEP_ROWS <= MOST_ROWS, "one pass of Decode serves them");

int64_t padded(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// x in units of its largest magnitude / 32767; the scale, NaN where x is not finite.
float quantize(const float* x, int64_t count, int16_t* to) {
  constexpr int W = Vec<float>::width;
  vfloat top{}, odd{};
  for (int64_t i = 0; i < count; i += W) {
    const vfloat v = load(x + i), magnitude = v < 0.f ? -v : v;
    top = max(magnitude, top);
    odd += v - v;  // NaN for what is not finite
  }
  const float most = reduce_max(top), bad = reduce_add(odd);
  const float up = most > 0.f && bad == 0.f ? 32767.f / most : 0.f;
  for (int64_t i = 0; i < count; i += W) {
    const vfloat scaled = bad == 0.f ? round_to_integer(load(x + i) * up) : vfloat{};
    PYFUSE_UNROLL for (int j = 0; j < W; ++j) to[i + j] = static_cast<int16_t>(scaled[j]);
  }
  return most / 32767.f + bad;
}

// A row of floats as a matrix of S takes it; count is a multiple of a vector.
float convert_row(const float* x, int64_t count, float* to) {
  memcpy(to, x, static_cast<size_t>(count) * sizeof *to);
  return 1.f;
}
float convert_row(const float* x, int64_t count, int16_t* to) { return quantize(x, count, to); }
#if defined(__AVX512BF16__)
float convert_row(const float* x, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += Vec<float>::width) store(to + i, load(x + i));
  return 1.f;
}
#endif

// S: what weights are stored as; T: the cache's type.
template <class S, class T>
class Step {
  typedef typename Panels<S>::Row Row;
  static constexpr int W = Vec<float>::width;

  const StepParams& p;
  const StepModel& m = *p.model;
  const int64_t rows = p.sequences * p.queries;
  const int64_t width = padded(m.width), hidden = padded(m.hidden);
  const int64_t q_width = m.heads_q * m.d, kv_width = m.heads_k * m.d;
  const int64_t qkv_width = padded(q_width + 2 * kv_width), o_width = padded(q_width);
  const int64_t longest = longest_row();
  const int64_t layer_stride = p.pages * m.heads_k * p.page_size * m.d;

  // Rows of one product, ready for it; `tag` says of which.
  struct Own {
    int64_t* tag;
    Row* rows;
    float *scales, *row, *sums;
  };
  float *x, *qkv, *h;
  T *q, *o, *k_row, *v_row;  // k_row, v_row: all of a sequence's, where it brings its prompt
  char *own_memory, *attention_memory;
  int64_t own_size;
  DecodeParams decode_params{};

  int64_t longest_row() const {
    const int64_t most = o_width > width ? o_width : width;
    return most > hidden ? most : hidden;
  }
  int64_t block() const { return rows < ROW_BLOCK ? rows : ROW_BLOCK; }

  Own take_own(Carver& carver) const {
    Own own;
    own.tag = carver.take<int64_t>(1);
    own.rows = carver.take<Row>(block() * longest);
    own.scales = carver.take<float>(block());
    own.row = carver.take<float>(longest);
    own.sums = carver.take<float>(2 * block() * PANEL);
    return own;
  }
  Own own(int thread) const {
    Carver carver(own_memory + thread * own_size);
    return take_own(carver);
  }

  // ---- the cache --------------------------------------------------------------------------------

  int64_t page(int64_t b, int64_t position) const {
    return p.block_table[b * p.table_stride + position / p.page_size];
  }
  // Where the cache holds a key or value of a layer.
  T* slot(void* cache, int64_t layer, int64_t b, int64_t hk, int64_t position) const {
    return static_cast<T*>(cache) + layer * layer_stride +
           ((page(b, position) * m.heads_k + hk) * p.page_size + position % p.page_size) * m.d;
  }
  int64_t position(int64_t row) const {
    return p.lengths[row / p.queries] - p.queries + row % p.queries;
  }

  static void round_row(const float* from, int64_t count, T* to) {
    for_vectors<float, 1>(count, [&](const auto& at, int) { at.put(to, at(from)); });
  }

  // x1·cos - x2·sin, x2·cos + x1·sin of the halves of the first R elements.
  void turn(float* head, int64_t at) const {
    const int64_t half = m.rotated / 2;
    const float *cos = m.cos + at * half, *sin = m.sin + at * half;
    for_vectors<float, 1>(half, [&](const auto& lane, int) PYFUSE_INLINE_BODY {
      const vfloat a = lane(head), b = lane(head + half), c = lane(cos), s = lane(sin);
      lane.put(head, a * c - b * s);
      lane.put(head + half, b * c + a * s);
    });
  }

  // Of one row: a key head, its value head and its queries.
  void append(int64_t layer, int64_t row, int64_t hk) const {
    const int64_t group = m.heads_q / m.heads_k, at = position(row), b = row / p.queries;
    float* const of_row = qkv + row * qkv_width;
    for (int64_t head = hk * group; head < (hk + 1) * group; ++head) {
      if (m.cos != nullptr) turn(of_row + head * m.d, at);
      round_row(of_row + head * m.d, m.d, q + row * q_width + head * m.d);
    }
    float* const key = of_row + q_width + hk * m.d;
    if (m.cos != nullptr) turn(key, at);
    round_row(key, m.d, slot(p.k, layer, b, hk, at));
    round_row(key + kv_width, m.d, slot(p.v, layer, b, hk, at));
  }

  // Keys and values of a sequence one after another, [Hk][length][D], for the tiled kernel.
  void gather(int64_t layer, int64_t b, int64_t hk) const {
    const int64_t length = p.lengths[b];
    const int64_t first = first_seen(b);
    for (int64_t at = first; at < length;) {
      const int64_t end = (at / p.page_size + 1) * p.page_size;
      const int64_t count = (end < length ? end : length) - at;
      const size_t bytes = static_cast<size_t>(count * m.d) * sizeof(T);
      memcpy(k_row + (hk * length + at) * m.d, slot(p.k, layer, b, hk, at), bytes);
      memcpy(v_row + (hk * length + at) * m.d, slot(p.v, layer, b, hk, at), bytes);
      at += count;
    }
  }
  // Pages before the window may belong to another sequence.
  int64_t first_seen(int64_t b) const {
    const int64_t first = p.lengths[b] - p.queries - m.window_left;
    return m.window_left >= 0 && first > 0 ? first / p.page_size * p.page_size : 0;
  }

  void attend_tiled(int64_t layer) const {
    for (int64_t b = 0; b < p.sequences; ++b) {
      const int64_t length = p.lengths[b], first = first_seen(b), row = b * p.queries;
      parallel_for(m.heads_k, p.threads, [&](int64_t hk, int) { gather(layer, b, hk); });
      const int64_t q_bounds[] = {0, p.queries}, k_bounds[] = {0, length - first};
      AttentionParams a{};  // as packed sequences: a query's bits are the same in any part of them
      a.cu_seqlens_q = q_bounds, a.cu_seqlens_k = k_bounds;
      a.q = q + row * q_width, a.k = k_row + first * m.d, a.v = v_row + first * m.d;
      a.o = o + row * q_width;
      a.q_stride[1] = a.o_stride[1] = m.d, a.q_stride[2] = a.o_stride[2] = q_width;
      a.k_stride[1] = a.v_stride[1] = length * m.d, a.k_stride[2] = a.v_stride[2] = m.d;
      a.batch = 1, a.heads_q = m.heads_q, a.heads_k = m.heads_k;
      a.queries = p.queries, a.keys = length - first, a.d = a.dv = m.d;
      a.dtype = p.cache, a.lse_dtype = DType::f32;
      a.scale = m.scale, a.window_left = m.window_left, a.window_right = 0;
      a.threads = p.threads;
      attention(a);
    }
  }

  DecodeParams paged_attention(int64_t layer) const {
    DecodeParams a = decode_params;
    a.k = static_cast<T*>(p.k) + layer * layer_stride;
    a.v = static_cast<T*>(p.v) + layer * layer_stride;
    return a;
  }
  DecodeParams make_decode_params() const {
    DecodeParams a{};
    a.q = q, a.o = o;
    a.q_stride[0] = a.o_stride[0] = p.queries * q_width;
    a.q_stride[1] = a.o_stride[1] = m.d, a.q_stride[2] = a.o_stride[2] = q_width;
    a.k_stride[0] = a.v_stride[0] = m.heads_k * p.page_size * m.d;
    a.k_stride[1] = a.v_stride[1] = p.page_size * m.d, a.k_stride[2] = a.v_stride[2] = m.d;
    a.batch = p.sequences, a.heads_q = m.heads_q, a.heads_k = m.heads_k;
    a.queries = p.queries, a.d = a.dv = m.d;
    for (int64_t b = 0; b < p.sequences; ++b)
      a.keys = p.lengths[b] > a.keys ? p.lengths[b] : a.keys;
    a.dtype = p.cache, a.lse_dtype = DType::f32;
    a.scale = m.scale, a.window_left = m.window_left, a.window_right = 0;
    a.seqlens_k = p.lengths, a.align_to_seqlens = true;
    a.block_table = p.block_table, a.table_stride[0] = p.table_stride, a.table_stride[1] = 1;
    a.page_size = p.page_size, a.pages = p.pages;
    a.threads = p.threads;
    return a;
  }

  // ---- products ---------------------------------------------------------------------------------

  void norm_row(const StepNorm& norm, const float* from, float factor, float* to) const {
    const int64_t d = m.width;
    float mean[1] = {}, sum[1];
    if (norm.bias != nullptr) {
      sum_along<1, float>(
          d, [&](const auto& at, int) PYFUSE_INLINE_BODY { return at(from); }, mean);
      mean[0] /= static_cast<float>(d);
    }
    const float* const one[1] = {from};
    sum_squared_deviations<1, float>(one, mean, d, sum);
    const float variance = sum[0] / static_cast<float>(d) + static_cast<float>(m.eps);
    const float scale = reciprocal_root(variance) * factor;
    for_vectors<float, 1>(d, [&](const auto& at, int) PYFUSE_INLINE_BODY {
      const vfloat y = (at(from) - mean[0]) * scale * at(norm.weight);
      at.put(to, norm.bias == nullptr ? y : y + at(norm.bias) * factor);
    });
    memset(to + d, 0, static_cast<size_t>(width - d) * sizeof *to);
  }

  // [first, first + count) of the rows of a product's left side, unless they are at hand.
  template <class Fill>
  void prepare(const Own& own, int64_t tag, int64_t k, int64_t first, int64_t count,
               const Fill& fill) const {
    if (*own.tag == tag) return;
    for (int64_t r = 0; r < count; ++r) {
      const float* const row = fill(first + r, own.row);
      own.scales[r] = convert_row(row, k, own.rows + r * k);
    }
    *own.tag = tag;
  }

  // Products of `count` prepared rows with outputs [first, last) of a panel, as floats.
  void multiply(const StepMatrix& w, const Own& own, int64_t k, int64_t count, int64_t panel,
                int first, int last, float* sums) const {
    const int64_t elements = PANEL * k;
    const S* const weights = static_cast<const S*>(w.w) + panel * elements;
    const int64_t after = p.threads * elements * static_cast<int64_t>(sizeof(S));
    multiply_rows<S>(own.rows, k, count, weights, k, first, last, after, sums);
    if (w.scale == nullptr && w.bias == nullptr) return;
    for (int64_t r = 0; r < count; ++r) {
      for (int j = first; j < last; j += W) {
        vfloat y = load(sums + r * PANEL + j);
        if (w.scale != nullptr) y = y * own.scales[r] * load(w.scale + panel * PANEL + j);
        if (w.bias != nullptr) y += load(w.bias + panel * PANEL + j);
        store(sums + r * PANEL + j, y);
      }
    }
  }

  // finish(row, n, sums, sums of `second`) for vectors of outputs n of w (and second, where it has
  // a matrix) times rows of what fill(row, room) gives, [0, count).
  template <class Fill, class Finish>
  void product(int64_t id, const StepMatrix& w, const StepMatrix& second, int64_t count,
               const Fill& fill, const Finish& finish) const {
    const int64_t k = padded(w.k), panels = padded(w.n) / PANEL;
    const int64_t blocks = (count + ROW_BLOCK - 1) / ROW_BLOCK;
    // The last panels are cut into slices, so that the threads end at about the same time: with one
    // row, which memory bounds, as few and as wide as can be.
    const int64_t rounds = panels / p.threads, slice = count == 1 ? 2 * SLICE : SLICE;
    const int64_t whole = (count == 1 ? rounds : rounds > 1 ? rounds - 1 : 0) * p.threads;
    const int64_t slices = PANEL / slice;
    const int64_t tasks = whole + (panels - whole) * slices;
    share(blocks * tasks, [&](int64_t i, int thread) {
      const Own mine = own(thread);
      const int64_t b = i / tasks, task = i % tasks, left = task - whole;
      const int64_t panel = left < 0 ? task : whole + left / slices;
      const int first = left < 0 ? 0 : static_cast<int>(left % slices * slice);
      const int last = left < 0 ? PANEL : first + static_cast<int>(slice);
      const int64_t begin = b * ROW_BLOCK, most = count - begin;
      const int64_t some = most < ROW_BLOCK ? most : ROW_BLOCK;
      prepare(mine, (id << 32) + b + 1, k, begin, some, fill);
      float *const sums = mine.sums, *const others = sums + block() * PANEL;
      multiply(w, mine, k, some, panel, first, last, sums);
      if (second.w != nullptr) multiply(second, mine, k, some, panel, first, last, others);
      for (int64_t r = 0; r < some; ++r)
        for (int j = first; j < last; j += W)
          finish(begin + r, panel * PANEL + j, load(sums + r * PANEL + j),
                 second.w == nullptr ? vfloat{} : load(others + r * PANEL + j));
    });
  }

  // ---- the parts --------------------------------------------------------------------------------

  void embed() const {
    share(rows, [&](int64_t row, int) {
      float* const to = x + row * width;
      const auto read = [&](const auto* table) {
        const auto* from = table + p.ids[row] * m.width;
        const float* const place =
            m.places == nullptr ? nullptr : m.places + position(row) * m.width;
        const float scale = static_cast<float>(m.embedding_scale);
        for_vectors<float, 1>(m.width, [&](const auto& at, int) PYFUSE_INLINE_BODY {
          const vfloat y = at(from) * scale;
          at.put(to, place == nullptr ? y : y + at(place));
        });
      };
      m.dtype == DType::bf16 ? read(static_cast<const bf16*>(m.tokens))
                             : read(static_cast<const float*>(m.tokens));
      memset(to + m.width, 0, static_cast<size_t>(width - m.width) * sizeof *to);
    });
  }

  void before_attention(int64_t i) const {
    const StepLayer& layer = m.layers[i];
    const auto norm = [&](int64_t row, float* room) {
      norm_row(layer.norm1, x + row * width, 1.f, room);
      return static_cast<const float*>(room);
    };
    product(4 * i, layer.qkv, {}, rows, norm,
            [&](int64_t row, int64_t n, vfloat y, vfloat) { store(qkv + row * qkv_width + n, y); });
    share(rows * m.heads_k,
          [&](int64_t task, int) { append(i, task / m.heads_k, task % m.heads_k); });
  }

  void after_attention(int64_t i) const {
    const StepLayer& layer = m.layers[i];
    const auto add = [&](int64_t row, int64_t n, vfloat y, vfloat) PYFUSE_INLINE_BODY {
      float* const to = x + row * width + n;
      store(to, load(to) + y);
    };
    const auto attended = [&](int64_t row, float* room) {
      const T* const from = o + row * q_width;
      for_vectors<float, 1>(q_width, [&](const auto& at, int) { at.put(room, at(from)); });
      memset(room + q_width, 0, static_cast<size_t>(o_width - q_width) * sizeof *room);
      return static_cast<const float*>(room);
    };
    product(4 * i + 1, layer.out, {}, rows, attended, add);
    const auto norm = [&](int64_t row, float* room) {
      norm_row(layer.norm2, x + row * width, 1.f, room);
      return static_cast<const float*>(room);
    };
    const bool gated = layer.gate.w != nullptr;
    product(4 * i + 2, layer.up, layer.gate, rows, norm,
            [&](int64_t row, int64_t n, vfloat up, vfloat gate) {
              const vfloat y = activate<float>(m.activation, gated ? gate : up);
              store(h + row * hidden + n, gated ? y * up : y);
            });
    const auto as_is = [&](int64_t row, float*) {
      return static_cast<const float*>(h + row * hidden);
    };
    product(4 * i + 3, layer.down, {}, rows, as_is, add);
  }

  void head() const {
    const int64_t count = p.every ? rows : p.sequences;
    const auto norm = [&](int64_t row, float* room) {
      const int64_t from = p.every ? row : (row + 1) * p.queries - 1;
      norm_row(m.norm, x + from * width, static_cast<float>(m.head_scale), room);
      return static_cast<const float*>(room);
    };
    product(4 * m.layer_count, m.head, {}, count, norm,
            [&](int64_t row, int64_t n, vfloat y, vfloat) {
              float* const to = p.logits + row * p.logits_stride + n;
              if (n + W <= m.vocabulary) {
                store(to, y);
              } else if (n < m.vocabulary) {
                store(to, y, m.vocabulary - n);
              }
            });
  }

  void run_prompt() const {
    as_team(p.threads, [&] { embed(); });
    for (int64_t i = 0; i < m.layer_count; ++i) {
      as_team(p.threads, [&] { before_attention(i); });
      attend_tiled(i);
      as_team(p.threads, [&] { after_attention(i); });
    }
    as_team(p.threads, [&] { head(); });
  }

  void run_few() const {
    const auto plan = Decode<T>(decode_params, 0, p.queries);
    const auto shared = plan.set_up(attention_memory, p.threads);
    const int64_t tasks = plan.tasks();
    as_team(p.threads, [&] {
      embed();
      for (int64_t i = 0; i < m.layer_count; ++i) {
        before_attention(i);
        const DecodeParams a = paged_attention(i);
        const Decode<T> pass(a, 0, p.queries);
        share(tasks, [&](int64_t task, int thread) { pass.run_task(shared, task, thread); });
        after_attention(i);
      }
      head();
    });
  }

 public:
  explicit Step(const StepParams& params) : p(params) {}

  void run() {
    int64_t keys = 0;
    for (int64_t b = 0; b < p.sequences; ++b) keys = p.lengths[b] > keys ? p.lengths[b] : keys;
    Carver one(nullptr);
    take_own(one);
    own_size = one.used();
    const auto carve = [&](char* memory) {
      Carver carver(memory);
      x = carver.take<float>(rows * width);
      qkv = carver.take<float>(rows * qkv_width);
      h = carver.take<float>(rows * hidden);
      q = carver.take<T>(rows * q_width);
      o = carver.take<T>(rows * q_width);
      k_row = carver.take<T>(p.prompt ? keys * kv_width : 0);
      v_row = carver.take<T>(p.prompt ? keys * kv_width : 0);
      own_memory = carver.take<char>(p.threads * own_size);
      decode_params = make_decode_params();
      const int64_t size = p.prompt ? 0 : Decode<T>(decode_params, 0, p.queries).size(p.threads);
      attention_memory = carver.take<char>(size);
      return carver.used();
    };
    Workspace memory(carve(nullptr));
    carve(memory.data());
    for (int t = 0; t < p.threads; ++t) *own(t).tag = 0;
    p.prompt ? run_prompt() : run_few();
  }
};

template <class S>
void run_step(const StepParams& p) {
  if (p.cache == DType::bf16) return Step<S, bf16>(p).run();
  if (p.cache == DType::f32) return Step<S, float>(p).run();
  bad_switch_value("decode_step: cache", static_cast<int>(p.cache));
}

}  // namespace

void decode_step(const StepParams& p) {
  switch (p.model->weights) {
    case StepWeights::f32:
      return run_step<float>(p);
    case StepWeights::bf16:
      return run_step<bf16>(p);
    case StepWeights::int8:
      return run_step<int8_t>(p);
  }
  bad_switch_value("decode_step: weights", static_cast<int>(p.model->weights));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
