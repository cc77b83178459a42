#include "attention_case.h"

#include <string.h>

#include <algorithm>
#include <cmath>

#include "random_factor.h"

namespace pyfuse::test {
namespace {

AttentionCase sized(int64_t queries, int64_t keys, int64_t d = 16, int64_t dv = 16) {
  AttentionCase c{std::to_string(queries) + "x" + std::to_string(keys) + " D" + std::to_string(d) +
                      " Dv" + std::to_string(dv),
                  queries, keys};
  c.d = d, c.dv = dv, c.scale = 1 / std::sqrt(static_cast<double>(d));
  return c;
}

template <class Change>
AttentionCase with(AttentionCase c, const char* what, const Change& change) {
  c.name += std::string(" ") + what;
  change(c);
  return c;
}

// Before the first sequence and after the last there is a row that belongs to none.
std::vector<int64_t> bounds(const std::vector<int64_t>& lengths) {
  if (lengths.empty()) return {};
  std::vector<int64_t> first = {1};
  for (const int64_t length : lengths) first.push_back(first.back() + length);
  return first;
}

void copy(const std::vector<int64_t>& from, const Memory& to) {
  if (!from.empty()) memcpy(to.data(), from.data(), from.size() * sizeof(int64_t));
}
int64_t bytes_of(const std::vector<int64_t>& v) {
  return static_cast<int64_t>(v.size() * sizeof(int64_t));
}
const int64_t* address(const std::vector<int64_t>& v, const Memory& memory) {
  return v.empty() ? nullptr : static_cast<const int64_t*>(memory.data());
}

Tensor rows_of(const AttentionCase& c, const std::vector<int64_t>& first, DType dtype,
               int64_t heads, int64_t rows, int64_t d) {
  if (first.empty()) return Tensor(dtype, c.batch, heads, rows, d, c.heads_first);
  return Tensor(dtype, 1, heads, first.back() + 1, d, c.heads_first);
}

void set_row_to_nan(Tensor& t, int64_t b, int64_t h, int64_t row) {
  for (int64_t j = 0; j < t.d; ++j) t.set(b, h, row, j, NAN);
}

}  // namespace

std::vector<AttentionCase> attention_cases() {
  typedef AttentionCase& Case;
  std::vector<AttentionCase> cases = {
      sized(1, 1, 1, 1),     sized(1, 0),           sized(3, 5, 3, 5),     sized(6, 128, 64, 64),
      sized(63, 65, 8, 9),   sized(65, 63, 33, 17), sized(7, 130, 80, 80), sized(5, 31, 65, 130),
      sized(1, 300, 64, 64), sized(49, 257, 15, 31)};
  const auto causal = [](Case c) { c.window_right = 0; };
  for (const AttentionCase& c : {sized(63, 65), sized(65, 63), sized(130, 130), sized(3, 300)})
    cases.push_back(with(c, "causal", causal));
  const AttentionCase odd = sized(11, 37, 16, 17), large = sized(50, 197);
  const auto add = [&](const AttentionCase& c, const char* what, void (*change)(Case)) {
    cases.push_back(with(c, what, change));
  };
  add(large, "window 4, 3", [](Case c) { c.window_left = 4, c.window_right = 3; });
  add(large, "window 16, 0", [](Case c) { c.window_left = 16, c.window_right = 0; });
  add(odd, "window 0, all", [](Case c) { c.window_left = 0; });
  add(sized(3, 300), "window 150, 0", [](Case c) { c.window_left = 150, c.window_right = 0; });
  add(odd, "heads 6/2", [](Case c) { c.heads_q = 6; });
  add(odd, "heads 4/1", [](Case c) { c.heads_q = 4, c.heads_k = 1; });
  add(odd, "many heads", [](Case c) { c.batch = 5, c.heads_q = c.heads_k = 3; });
  add(odd, "heads first", [](Case c) { c.heads_first = true; });
  add(odd, "softcap", [](Case c) { c.softcap = 0.7; });
  add(odd, "sinks", [](Case c) { c.sinks = true; });
  add(odd, "alibi", [](Case c) { c.alibi = true, c.window_right = 0; });
  add(odd, "scale -0.5", [](Case c) { c.scale = -0.5; });
  add(odd, "scale 0", [](Case c) { c.scale = 0; });
  add(odd, "seqlens", [](Case c) { c.seqlens = {0, 30}; });
  add(large, "seqlens, causal, aligned",
      [](Case c) { c.seqlens = {129, 20}, c.align_to_seqlens = true, c.window_right = 0; });
  add(large, "dropout", [](Case c) { c.dropout = 0.3; });
  add(odd, "packed", [](Case c) { c.packed_queries = {5, 0, 13}, c.packed_keys = {9, 3, 7}; });
  add(odd, "packed, causal, dropout", [](Case c) {
    c.packed_queries = {60, 1}, c.packed_keys = {60, 150};
    c.window_right = 0, c.dropout = 0.1;
  });
  add(odd, "bool mask", [](Case c) { c.mask = MaskKind::boolean; });
  add(large, "bool mask of the keys, causal", [](Case c) {
    c.mask = MaskKind::boolean, c.window_right = 0;
    c.mask_has[1] = c.mask_has[2] = false;
  });
  for (const DType dtype : dtypes)
    cases.push_back(with(odd, name_of(dtype), [&](Case c) {
      c.name += " mask", c.mask = MaskKind::additive, c.mask_dtype = dtype;
      c.mask_has[0] = dtype == DType::f32, c.mask_has[1] = dtype != DType::f16;
      c.mask_key_stride = dtype == DType::bf16 ? 2 : 1;
    }));
  add(large, "everything", [](Case c) {
    c.softcap = 3, c.dropout = 0.2, c.sinks = c.alibi = true, c.mask = MaskKind::additive;
    c.heads_q = 4, c.window_left = 100, c.window_right = 2, c.seqlens = {190, 3};
  });
  return cases;
}

AttentionInputs::MaskLayout::MaskLayout(const AttentionCase& c)
    : stride{0, 0, 0, c.mask_key_stride},
      size{1, 1, 1, c.keys},
      count((c.keys - 1) * c.mask_key_stride + 1) {
  const int64_t sizes[] = {c.batch, c.heads_q, c.queries};
  for (int i = 2; i >= 0; --i) {
    if (!c.mask_has[i]) continue;
    stride[i] = count;
    size[i] = sizes[i];
    count *= sizes[i];
  }
}

AttentionInputs::AttentionInputs(const AttentionCase& given, DType dtype)
    : c([&] {
        AttentionCase fitted = given;
        if (given.packed()) fitted.batch = static_cast<int64_t>(given.packed_queries.size());
        return fitted;
      }()),
      first_query(bounds(c.packed_queries)),
      first_key(bounds(c.packed_keys)),
      q(like_queries(dtype, c.d)),
      k(like_keys(dtype, c.d)),
      v(like_keys(dtype, c.dv)),
      mask_layout(c),
      mask_(c.mask_dtype, c.mask == MaskKind::additive ? mask_layout.count : 0),
      bool_mask_(c.mask == MaskKind::boolean ? mask_layout.count : 0),
      sinks_(DType::f64, c.sinks ? c.heads_q : 0),
      slopes_(DType::f64, c.alibi ? c.heads_q : 0),
      seqlens_(bytes_of(c.seqlens)),
      first_query_(bytes_of(first_query)),
      first_key_(bytes_of(first_key)),
      seed_(sizeof dropout_seed) {
  q.fill_random(2), k.fill_random(2), v.fill_random();
  for (int64_t h = 0; h < sinks_.count; ++h) sinks_.set(h, h == 1 ? -INFINITY : random_unit());
  for (int64_t h = 0; h < slopes_.count; ++h) slopes_.set(h, 0.1 + 0.1 * static_cast<double>(h));
  copy(c.seqlens, seqlens_), copy(first_query, first_query_), copy(first_key, first_key_);
  memcpy(seed_.data(), dropout_seed, sizeof dropout_seed);
  fill_mask();
  poison_hidden_keys();
}

// A quarter of the pairs is hidden, and with them all keys of the first query.
void AttentionInputs::fill_mask() {
  const int64_t row = (c.keys - 1) * c.mask_key_stride + 1;
  for (int64_t i = 0; i < mask_layout.count; ++i) {
    const bool hide = random_unit() > 0.5 || (c.mask_has[2] && i < row);
    if (c.mask == MaskKind::boolean)
      static_cast<uint8_t*>(bool_mask_.data())[i] = hide ? 0 : 1;
    else if (c.mask == MaskKind::additive && i % row % c.mask_key_stride == 0)
      mask_.set(i, hide ? -INFINITY : random_unit());
  }
}

// What no query sees must not matter, be it a hidden key or a row of no sequence.
void AttentionInputs::poison_hidden_keys() {
  const int64_t group = c.heads_q / c.heads_k;
  for (int64_t hk = 0; hk < c.heads_k; ++hk) {
    for (int64_t b = 0; b < c.batch; ++b)
      for (int64_t n = 0; n < keys(b); ++n) {
        bool seen = false;
        for (int64_t i = 0; i < group * queries(b) && !seen; ++i)
          seen = visible(b, hk * group + i / queries(b), i % queries(b), n);
        if (seen) continue;
        const int64_t row = c.packed() ? first_key[static_cast<size_t>(b)] + n : n;
        set_row_to_nan(k, c.packed() ? 0 : b, hk, row),
            set_row_to_nan(v, c.packed() ? 0 : b, hk, row);
      }
    for (Tensor* t : {&k, &v})
      if (c.packed()) set_row_to_nan(*t, 0, hk, 0), set_row_to_nan(*t, 0, hk, t->rows - 1);
  }
}

AttentionParams AttentionInputs::params() const {
  AttentionParams p{};
  p.q = q.array.data();
  p.k = k.rows > 0 ? k.array.data() : nullptr;  // as csrc/api does
  p.v = k.rows > 0 ? v.array.data() : nullptr;
  q.copy_strides(p.q_stride), k.copy_strides(p.k_stride), v.copy_strides(p.v_stride);
  p.batch = c.batch, p.heads_q = c.heads_q, p.heads_k = c.heads_k, p.d = c.d, p.dv = c.dv;
  for (int64_t b = 0; b < c.batch; ++b) {
    p.queries = std::max(p.queries, queries(b));
    p.keys = std::max(p.keys, keys(b));
  }
  if (c.packed()) p.q_stride[0] = p.k_stride[0] = p.v_stride[0] = 0;
  p.cu_seqlens_q = address(first_query, first_query_);
  p.cu_seqlens_k = address(first_key, first_key_);
  p.dtype = q.array.dtype;
  p.scale = c.scale, p.softcap = c.softcap;
  p.window_left = c.window_left, p.window_right = c.window_right;
  p.seqlens_k = address(c.seqlens, seqlens_);
  p.align_to_seqlens = c.align_to_seqlens;
  if (c.sinks) p.sinks = static_cast<const double*>(sinks_.data());
  if (c.alibi) p.alibi_slopes = static_cast<const double*>(slopes_.data());
  if (c.mask != MaskKind::none) {
    p.mask_is_bool = c.mask == MaskKind::boolean;
    p.mask = p.mask_is_bool ? bool_mask_.data() : mask_.data();
    p.mask_dtype = c.mask_dtype;
    for (int i = 0; i < 4; ++i) p.mask_stride[i] = mask_layout.stride[i];
  }
  p.dropout_p = c.dropout;
  if (c.dropout > 0) p.dropout_seed = static_cast<const int64_t*>(seed_.data());
  p.threads = 1;
  return p;
}

int64_t AttentionInputs::queries(int64_t b) const {
  return c.packed() ? c.packed_queries[static_cast<size_t>(b)] : c.queries;
}
int64_t AttentionInputs::keys(int64_t b) const {
  return c.packed() ? c.packed_keys[static_cast<size_t>(b)] : c.keys;
}

Tensor AttentionInputs::like_queries(DType dtype, int64_t d) const {
  return rows_of(c, first_query, dtype, c.heads_q, c.queries, d);
}
Tensor AttentionInputs::like_keys(DType dtype, int64_t d) const {
  return rows_of(c, first_key, dtype, c.heads_k, c.keys, d);
}
double AttentionInputs::of_query(const Tensor& t, int64_t b, int64_t h, int64_t m,
                                 int64_t j) const {
  return c.packed() ? t.get(0, h, first_query[static_cast<size_t>(b)] + m, j) : t.get(b, h, m, j);
}
double AttentionInputs::of_key(const Tensor& t, int64_t b, int64_t h, int64_t n, int64_t j) const {
  return c.packed() ? t.get(0, h, first_key[static_cast<size_t>(b)] + n, j) : t.get(b, h, n, j);
}
void AttentionInputs::set_lse_stride(int64_t (&stride)[2]) const {
  stride[0] = c.packed() ? 0 : c.heads_q * q.rows, stride[1] = q.rows;
}
int64_t AttentionInputs::lse_at(int64_t b, int64_t h, int64_t m) const {
  return c.packed() ? h * q.rows + first_query[static_cast<size_t>(b)] + m
                    : (b * c.heads_q + h) * q.rows + m;
}

double AttentionInputs::mask_term(int64_t b, int64_t h, int64_t m, int64_t n) const {
  if (c.mask == MaskKind::none) return 0;
  const int64_t* stride = mask_layout.stride;
  const int64_t at = b * stride[0] + h * stride[1] + m * stride[2] + n * stride[3];
  if (c.mask == MaskKind::additive) return mask_.get(at);
  return static_cast<const uint8_t*>(bool_mask_.data())[at] ? 0 : -INFINITY;
}

double AttentionInputs::distance(int64_t b, int64_t m, int64_t n) const {
  const int64_t length = c.align_to_seqlens ? c.seqlens[static_cast<size_t>(b)] : keys(b);
  return static_cast<double>(m + length - queries(b) - n);
}

bool AttentionInputs::visible(int64_t b, int64_t h, int64_t m, int64_t n) const {
  const int64_t length = c.seqlens.empty() ? keys(b) : c.seqlens[static_cast<size_t>(b)];
  const auto back = static_cast<int64_t>(distance(b, m, n));
  return n < length && (c.window_right < 0 || back >= -c.window_right) &&
         (c.window_left < 0 || back <= c.window_left) && mask_term(b, h, m, n) > -INFINITY;
}

double AttentionInputs::kept(int64_t b, int64_t h, int64_t m, int64_t n) const {
  return dropout_factor(c.dropout, b, h, m, n);
}

AttentionInputs::Softmax AttentionInputs::softmax(int64_t b, int64_t h, int64_t m) const {
  const auto count = static_cast<size_t>(keys(b));
  Softmax s{std::vector<double>(count, 0), std::vector<double>(count, 1), -INFINITY, 0};
  double top = sink(h);
  for (size_t i = 0; i < count; ++i) {
    const auto n = static_cast<int64_t>(i);
    s.probability[i] = -INFINITY;
    if (!visible(b, h, m, n)) continue;
    double score = 0, size = 0;
    for (int64_t j = 0; j < c.d; ++j) {
      const double term = c.scale * of_query(q, b, h, m, j) * of_key(k, b, key_head(h), n, j);
      score += term, size += std::fabs(term);
    }
    if (c.softcap > 0) {
      const double t = std::tanh(score / c.softcap);
      score = c.softcap * t, size += c.softcap, s.cap_slope[i] = 1 - t * t;
    }
    const double bias = mask_term(b, h, m, n);
    const double alibi = c.alibi ? -slopes_.get(h) * std::fabs(distance(b, m, n)) : 0;
    s.probability[i] = score + bias + alibi;
    s.score_size = std::max(s.score_size, size + std::fabs(bias) + std::fabs(alibi));
    top = std::max(top, score + bias + alibi);
  }
  double sum = top > -INFINITY ? std::exp(sink(h) - top) : 0;
  for (double& p : s.probability) {
    p = p > -INFINITY ? std::exp(p - top) : 0;
    sum += p;
  }
  if (sum > 0) s.lse = top + std::log(sum);
  for (double& p : s.probability) p = sum > 0 ? p / sum : 0;
  return s;
}

}  // namespace pyfuse::test
