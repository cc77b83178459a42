// Choosing tokens by their logits, as pyfuse/generation/sampling.py defines it. Beside the floats
// of sample_row.h all is exact arithmetic of integers, so that the order of sums, which depends on
// the instruction set, does not matter.
//
// Nothing is sorted. A first walk over a row keeps the maxima of short stretches. They bound the
// k-th largest logit from below, and say which stretches have anything above a bound; few tokens
// are left then.
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/sample_candidates.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t shared_tokens = 131072;  // fewer are not worth a parallel region
constexpr int64_t one = int64_t(1) << 40;

struct Scratch {
  float* maxima;  // [stretches][lane_count], of logits
  int64_t* sums;  // [stretches], of weights up to the end of each
  Candidates candidates;
};

Scratch carve(Carver& from, int64_t size) {
  const int64_t stretches = (size + stretch - 1) / stretch, room = size + lane_count;
  Scratch s{};
  s.maxima = from.take<float>(stretches * lane_count);
  s.sums = from.take<int64_t>(stretches);
  s.candidates.id = from.take<int32_t>(room);
  s.candidates.x = from.take<float>(room);
  s.candidates.weight = from.take<int64_t>(room);
  return s;
}

// What SampleResult::token is where there is none.
int64_t objection(float largest) {
  if (largest != largest) return sample_nan;
  return largest > 0 ? sample_infinite : sample_nothing;
}

int64_t first_of(const LogitRow& row, const float* maxima, float largest) {
  int64_t s = 0;
  const auto has = [&](int64_t of) {
    for (int i = 0; i < lane_count; ++i)
      if (maxima[of * lane_count + i] == largest) return true;
    return false;
  };
  while (!has(s)) ++s;
  int64_t i = s * stretch;
  while (row.logits[i] != largest) ++i;
  return i;
}

// ---- fewer tokens ----------------------------------------------------------------------------

// A bound that no more than a rounding of x = logit / divisor separates from `logit`.
float just_below(float logit) { return logit - fabsf(logit) * 1e-6f - 1e-37f; }

// No logit that is among the k largest is below it.
float bound_of(const LogitRow& row, const float* maxima, int64_t k) {
  const int64_t count = row.stretches() * lane_count;
  return k <= count ? just_below(find_edge(maxima, nullptr, count, k).x) : minus_infinity;
}

void keep_top_k(const LogitRow& row, const Scratch& s, int64_t k, Candidates& c) {
  gather(row, s.maxima, bound_of(row, s.maxima, k), c);
  const float least = find_edge(c.x, nullptr, c.count, k).x;
  filter(c, [&](int64_t i) { return c.x[i] >= least; });
}

void keep_top_p(const Edge& edge, int64_t limit, Candidates& c) {
  int64_t above = edge.above;
  filter(c, [&](int64_t i) {
    const bool is_edge = c.x[i] == edge.x, kept = is_edge ? above < limit : c.x[i] > edge.x;
    above += is_edge ? c.weight[i] : 0;
    return kept;
  });
}

// The edge where all tokens are looked at; c gets those that are no smaller, and others.
Edge find_edge_of_all(const LogitRow& row, const Scratch& s, float largest, int64_t limit,
                      Candidates& c) {
  const float x_max = largest / row.divisor;
  for (float below = 2.f; below < -least_exponent; below *= 1.5f) {
    const float least = largest - below * row.divisor;
    gather(row, s.maxima, least, c);
    if (weigh(c, x_max) < limit) continue;
    const Edge edge = find_edge(c.x, c.weight, c.count, limit);
    if (edge.x > least / row.divisor) return edge;  // else some equals may not be among them
  }
  gather(row, s.maxima, minus_infinity, c);
  weigh(c, x_max);
  return find_edge(c.x, c.weight, c.count, limit);
}

// ---- the draw --------------------------------------------------------------------------------

uint64_t random_bits(const SampleRow& of) {
  const int64_t key[2] = {static_cast<int64_t>(of.seed), static_cast<int64_t>(of.sequence)};
  const DropoutRule rule = dropout_rule(key, 0.0);
  vuint words[2];
  philox_words<1>(rule, philox_row(rule, of.step, 0, 0), static_cast<uint32_t>(of.seed >> 32),
                  words);
  return static_cast<uint64_t>(words[0][0]) << 32 | words[0][1];
}

int64_t share_of(uint64_t random, int64_t total) {
  typedef unsigned __int128 Product;
  return static_cast<int64_t>(Product(random) * static_cast<uint64_t>(total) >> 64);
}

int64_t draw_from(const Candidates& c, uint64_t random) {
  int64_t total = 0;
  for (int64_t i = 0; i < c.count; ++i) total += c.weight[i];
  int64_t left = share_of(random, total), i = 0;
  while (left >= c.weight[i]) left -= c.weight[i++];
  return c.id[i];
}

int64_t draw_from_all(const LogitRow& row, const Scratch& s, float largest, uint64_t random) {
  const float x_max = largest / row.divisor;
  const int64_t target = share_of(random, weigh_row(row, x_max, s.sums));
  int64_t at = 0;
  while (s.sums[at] <= target) ++at;
  int64_t left = target - (at == 0 ? 0 : s.sums[at - 1]), token = -1;
  for_logits(row, at * stretch, row.end(at), [&](vfloat l, int64_t i, int) PYFUSE_INLINE_BODY {
    int64_t weight[lane_count];
    store_weights(weight, weigh(l / row.divisor, x_max));
    for (int lane = 0; token < 0 && lane < lane_count; ++lane) {
      if (left < weight[lane]) token = i + lane;
      left -= weight[lane];
    }
  });
  return token;
}

int64_t draw(const SampleParams& p, const LogitRow& row, const Scratch& s, float largest,
             uint64_t random) {
  const bool some_k = p.top_k > 0 && p.top_k < row.size, some_p = p.top_p < 1;
  if (!some_k && !some_p && p.least_weight <= 0) return draw_from_all(row, s, largest, random);
  const float x_max = largest / row.divisor;
  Candidates c = s.candidates;
  int64_t total = 0;
  if (some_k) {
    keep_top_k(row, s, p.top_k, c);
    total = weigh(c, x_max);
  } else if (some_p) {
    total = weigh_row(row, x_max, s.sums);
  } else {
    const float below = 1e-3f - logf(static_cast<float>(p.least_weight) / static_cast<float>(one));
    gather(row, s.maxima, just_below(largest) - below * row.divisor, c);
    weigh(c, x_max);
  }
  if (some_p) {
    const int64_t share = static_cast<int64_t>(static_cast<double>(total) * p.top_p);
    const int64_t limit = share < 1 ? 1 : share < total ? share : total;
    keep_top_p(some_k ? find_edge(c.x, c.weight, c.count, limit)
                      : find_edge_of_all(row, s, largest, limit, c),
               limit, c);
  }
  filter(c, [&](int64_t i) { return c.weight[i] >= p.least_weight; });
  return draw_from(c, random);
}

// ---- log-probabilities -----------------------------------------------------------------------

void tell(const LogitRow& row, const Scratch& s, float largest, int64_t top, SampleResult& result,
          SampleTop* best) {
  result.logit = row.logits[result.token];
  result.largest = largest;
  result.total = weigh_row(row, largest, s.sums);
  if (top == 0) return;
  Candidates c = s.candidates;
  gather(row, s.maxima, bound_of(row, s.maxima, top), c);
  const Edge edge = find_edge(c.x, nullptr, c.count, top);
  int64_t equals = top - edge.above;
  for (int64_t i = 0; i < c.count; ++i)
    if (c.x[i] > edge.x || (c.x[i] == edge.x && equals-- > 0)) *best++ = {c.id[i], c.x[i]};
}

void sample_row(const SampleParams& p, int64_t r, const Scratch& s) {
  const float divisor = p.temperature > 0 ? p.temperature : 1.f;
  LogitRow row{p.logits + r * p.stride, p.vocabulary, divisor};
  SampleResult& result = p.results[r];
  float largest = find_maxima(row, s.maxima);
  if (!isfinite(largest / divisor)) {
    result.token = objection(largest / divisor);
    return;
  }
  result.token = p.temperature > 0 ? draw(p, row, s, largest, random_bits(p.of[r]))
                                   : first_of(row, s.maxima, largest);
  if (p.raw == nullptr) return;
  const bool other = p.raw != p.logits;
  row = {p.raw + r * p.raw_stride, p.vocabulary, 1.f};
  if (other) largest = find_maxima(row, s.maxima);
  if (isfinite(largest))
    tell(row, s, largest, p.top, result, p.best + r * p.top);
  else
    result.token = objection(largest);
}

}  // namespace

void sample(const SampleParams& p) {
  const bool is_shared = p.rows > 1 && p.rows * p.vocabulary > shared_tokens;
  const int threads = is_shared ? p.threads : 1;
  Carver sizes(nullptr);
  carve(sizes, p.vocabulary);
  Workspace memory(threads * sizes.used());
  parallel_for(p.rows, threads, [&](int64_t r, int thread) {
    Carver own(memory.data() + thread * sizes.used());
    sample_row(p, r, carve(own, p.vocabulary));
  });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
