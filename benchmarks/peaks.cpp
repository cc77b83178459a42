// What this machine can do at best: reading memory, multiply-adds, dot products of bf16 pairs.
// Compiled on demand and called by benchmarks/peaks.py.
#include <stdint.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

typedef float lanes4 __attribute__((vector_size(16), aligned(1), may_alias));
typedef float lanes8 __attribute__((vector_size(32), aligned(1), may_alias));
typedef float lanes16 __attribute__((vector_size(64), aligned(1), may_alias));

volatile float start = 0;  // unknown to the compiler, which would make one chain of equal ones
volatile float sink;       // results go here, so that no loop is left out as useless

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class Body>
double seconds_of(int threads, const Body& body) {
  const double start = now();
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) body(thread);
  return now() - start;
}

// Eight loads at a time, added up: the additions are far from being the limit. The prefetch reaches
// over the end of a page, where the hardware's own stops.
#define PYFUSE_READ(NAME, LANES, TARGET)                                               \
  TARGET void NAME(const char* p, int64_t bytes) {                                     \
    constexpr int64_t STEP = sizeof(LANES), BLOCK = 8 * STEP;                          \
    LANES sum[8] = {};                                                                 \
    for (int64_t i = 0; i + BLOCK <= bytes; i += BLOCK) {                              \
      _Pragma("GCC unroll 8") for (int64_t j = 0; j < 8; ++j) {                        \
        if (j * STEP % 64 == 0) __builtin_prefetch(p + i + j * STEP + 2048);           \
        sum[j] += *reinterpret_cast<const LANES*>(p + i + j * STEP);                   \
      }                                                                                \
    }                                                                                  \
    sink = (sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7])[0]; \
  }
// Independent chains, as many as hide the latency of two units and still fit the registers.
#define PYFUSE_FMA(NAME, LANES, CHAINS, TARGET)                                           \
  TARGET double NAME(int64_t rounds) {                                                    \
    LANES x[CHAINS] = {}, half = x[0] + 0.5f, one = x[0] + 1.0f;                          \
    for (int j = 0; j < CHAINS; ++j) x[j] += start;                                       \
    for (int64_t i = 0; i < rounds; ++i) {                                                \
      _Pragma("GCC unroll 32") for (int j = 0; j < CHAINS; ++j) x[j] = x[j] * half + one; \
    }                                                                                     \
    LANES sum = x[0];                                                                     \
    for (int j = 1; j < CHAINS; ++j) sum += x[j];                                         \
    sink = sum[0];                                                                        \
    return 2.0 * sizeof(LANES) / sizeof(float) * CHAINS * static_cast<double>(rounds);    \
  }

PYFUSE_READ(read_128, lanes4, )
PYFUSE_FMA(fma_128, lanes4, 12, )
#if defined(__x86_64__)
#define PYFUSE_AVX2 __attribute__((target("avx2,fma")))
#define PYFUSE_AVX512 __attribute__((target("avx512f")))
PYFUSE_READ(read_256, lanes8, PYFUSE_AVX2)
PYFUSE_FMA(fma_256, lanes8, 12, PYFUSE_AVX2)
PYFUSE_READ(read_512, lanes16, PYFUSE_AVX512)
PYFUSE_FMA(fma_512, lanes16, 24, PYFUSE_AVX512)

// 32 products and as many sums an instruction.
__attribute__((target("avx512f,avx512bf16"))) double bf16_dot(int64_t rounds) {
  constexpr int CHAINS = 24;
  __m512 sum[CHAINS];
  for (int j = 0; j < CHAINS; ++j) sum[j] = _mm512_set1_ps(start);
  const __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80);  // 1.0
  for (int64_t i = 0; i < rounds; ++i) {
    _Pragma("GCC unroll 32") for (int j = 0; j < CHAINS; ++j) sum[j] =
        _mm512_dpbf16_ps(sum[j], x, x);
  }
  for (int j = 1; j < CHAINS; ++j) sum[0] = _mm512_add_ps(sum[0], sum[j]);
  sink = _mm512_cvtss_f32(sum[0]);
  return 64.0 * CHAINS * static_cast<double>(rounds);
}
#endif

struct Isa {
  void (*read)(const char*, int64_t);
  double (*fma)(int64_t);  // returns the operations that it did
};

// bits: 128, 256 or 512; nulls where this CPU has no such vectors.
Isa isa_of(int bits) {
#if defined(__x86_64__)
  if (bits == 512 && __builtin_cpu_supports("avx512f")) return {read_512, fma_512};
  if (bits == 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {read_256, fma_256};
#endif
  return bits == 128 ? Isa{read_128, fma_128} : Isa{nullptr, nullptr};
}

// Operations per second on all threads together.
double rate(double (*work)(int64_t), int threads) {
  constexpr int64_t ROUNDS = 1 << 18;  // a millisecond or two
  double done = 0;
  const double seconds = seconds_of(threads, [&](int thread) {
    const double own = work(ROUNDS);
    if (thread == 0) done = own;
  });
  return done * threads / seconds;
}

}  // namespace

extern "C" {

int has_vectors(int bits) { return isa_of(bits).fma != nullptr; }

int has_bf16_dot() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return 0;
#endif
}

// Seconds to read these pieces of memory once, each split evenly over the threads.
double read_seconds(const char* const* piece, const int64_t* bytes, int count, int threads) {
  const Isa isa = isa_of(has_vectors(512) ? 512 : has_vectors(256) ? 256 : 128);
  return seconds_of(threads, [&](int thread) {
    for (int i = 0; i < count; ++i) {
      const int64_t share = bytes[i] / threads / 512 * 512, first = share * thread;
      isa.read(piece[i] + first, thread == threads - 1 ? bytes[i] - first : share);
    }
  });
}

double fma_rate(int bits, int threads) { return rate(isa_of(bits).fma, threads); }

double bf16_dot_rate(int threads) {
#if defined(__x86_64__)
  return rate(bf16_dot, threads);
#else
  (void)threads;
  return 0;
#endif
}

}  // extern "C"
