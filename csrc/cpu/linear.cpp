// y = act(x·wᵀ + bias) · multiply + residual for few rows of x: bound by reading w [N, K], which
// happens once, as it lies in memory. (For many rows a packed matrix product wins; see pyfuse/linear.py.)
#include "cpu/parallel.h"
#include "cpu/transpose.h"
#include "cpu/vec_math.h"
#include "cpu/isa.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t SERIAL_BYTES = 128 * 1024;  // of w: below this one thread is done before two have woken

PYFUSE_INLINE vfloat polynomial(vfloat x, const float* c, int degree) {
  vfloat p = splat(c[0]);
  PYFUSE_UNROLL for (int i = 1; i <= degree; ++i) p = c[i] + x * p;
  return p;
}

// GELU, x·Φ(x) = x/2·erfc(-x/√2). The tail is computed as erfc(t) = exp(-t²)/t·P(1/t²), never as
// 1 - erf, which would lose it; below t = 1 erf is t·T(t²). Coefficients: S. Moshier, Cephes, ndtrf.
PYFUSE_INLINE vfloat gelu(vfloat x) {
  static const float near_zero[] = {7.853861353153693e-5f,  -8.010193625184903e-4f,
                                    5.188327685732524e-3f,  -2.685381193529856e-2f,
                                    1.128358514861418e-1f,  -3.761262582423300e-1f,
                                    1.128379165726710e+0f};
  static const float middle[] = {2.326819970068386e-2f,  -1.387039388740657e-1f,
                                 3.687424674597105e-1f,  -5.824733027278666e-1f,
                                 6.210004621745983e-1f,  -4.944515323274145e-1f,
                                 3.404879937665872e-1f,  -2.741127028184656e-1f,
                                 5.638259427386472e-1f};
  static const float far[] = {-1.047766399936249e+1f, 1.297719955372516e+1f,
                              -7.495518717768503e+0f, 2.921019019210786e+0f,
                              -1.015265279202700e+0f, 4.218463358204948e-1f,
                              -2.820767439740514e-1f, 5.641895067754075e-1f};
  const vfloat t = (x < 0.f ? -x : x) * 0.70710678f, square = t * t;
  const vfloat inverse = 1.f / (t < 1.f ? splat(1.f) : t), y = inverse * inverse;
  const vfloat tail =
      exp(-square) * inverse * (t < 2.f ? polynomial(y, middle, 8) : polynomial(y, far, 7));
  const vfloat erf = t * polynomial(square, near_zero, 6);
  const vfloat erfc = t < 1.f ? (x < 0.f ? 1.f - erf : 1.f + erf) : (x < 0.f ? tail : 2.f - tail);
  return 0.5f * x * erfc;
}
PYFUSE_INLINE vdouble gelu(vdouble x) {
  PYFUSE_UNROLL for (int i = 0; i < Vec<double>::width; ++i)
    x[i] = 0.5 * x[i] * ::erfc(-x[i] * 0.70710678118654752440);
  return x;
}

template <class C, class V> PYFUSE_INLINE V activate(Activation activation, V x) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x < C(0) ? V{} : x;  // NaN stays NaN
    case Activation::silu: return x / (C(1) + exp(-x));
    case Activation::gelu: return gelu(x);
    case Activation::gelu_tanh:  // x/2·(1 + tanh u) = x / (1 + e^-2u), which keeps the tail's digits
      return x / (C(1) + exp(C(-1.5957691216057307118) * (x + C(0.044715) * x * x * x)));
  }
  return x;
}

// One dot product step: acc += x·w over a vector of w.
template <class T> struct Step {
  static constexpr int lanes = width<T>;
  typedef vec_t<T> Acc;
  static PYFUSE_INLINE Acc run(Acc acc, const T* x, const T* w) { return acc + load(x) * load(w); }
  static PYFUSE_INLINE Acc run(Acc acc, const T* x, const T* w, int64_t n) {
    return acc + load(x, n) * load(w, n);
  }
};
#if defined(__AVX512BF16__)
template <> struct Step<bf16> {
  static constexpr int lanes = 32;
  typedef vfloat Acc;
  static PYFUSE_INLINE Acc run(Acc acc, const bf16* x, const bf16* w) {
    return (Acc)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(x),
                                 (__m512bh)_mm512_loadu_si512(w));
  }
  static PYFUSE_INLINE Acc run(Acc acc, const bf16* x, const bf16* w, int64_t n) {
    const __mmask32 present = n >= 32 ? ~0u : (1u << n) - 1;
    return (Acc)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_maskz_loadu_epi16(present, x),
                                 (__m512bh)_mm512_maskz_loadu_epi16(present, w));
  }
};
#endif

template <class T> class Linear {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  static constexpr int W = width<T>;
  static constexpr int GROUP = W;  // outputs of a task: one vector of y per row of x
  // Rows of w in flight at a time: enough streams to keep the memory busy, few enough for registers.
  static constexpr int STREAMS = W < 8 ? W : 8;

  const LinearParams& p;

  const T* w_row(int64_t n) const {
    return static_cast<const T*>(p.w) + (n < p.n ? n : p.n - 1) * p.w_stride;
  }

  // Products of R rows of x with STREAMS rows of w from row n on: sums[r][i].
  template <int R> void dots(int64_t row, int64_t n, C (*sums)[GROUP]) const {
    constexpr int L = Step<T>::lanes;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* w[STREAMS];
    PYFUSE_UNROLL for (int i = 0; i < STREAMS; ++i) w[i] = w_row(n + i);
    V acc[R][STREAMS] = {};
    int64_t k = 0;
    for (; k + L <= p.k; k += L) {
      PYFUSE_UNROLL for (int i = 0; i < STREAMS; ++i) {
        PYFUSE_UNROLL for (int r = 0; r < R; ++r)
          acc[r][i] = Step<T>::run(acc[r][i], x + r * p.x_stride + k, w[i] + k);
      }
    }
    if (k < p.k) {
      PYFUSE_UNROLL for (int i = 0; i < STREAMS; ++i) {
        PYFUSE_UNROLL for (int r = 0; r < R; ++r)
          acc[r][i] = Step<T>::run(acc[r][i], x + r * p.x_stride + k, w[i] + k, p.k - k);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < STREAMS; ++i) sums[r][i] = reduce_add(acc[r][i]);
  }

  V read(const void* base, int64_t at, int64_t count) const {
    const T* from = static_cast<const T*>(base) + at;
    return count == W ? load(from) : load(from, count);
  }

  void finish(int64_t row, int64_t n, const C* sums) const {
    const int64_t count = p.n - n < W ? p.n - n : W;
    V y = load(sums);
    if (p.bias != nullptr) y += read(p.bias, n, count);
    y = activate<C>(p.activation, y);
    if (p.multiply != nullptr) y *= read(p.multiply, row * p.multiply_stride + n, count);
    if (p.residual != nullptr) y += read(p.residual, row * p.residual_stride + n, count);
    T* out = static_cast<T*>(p.y) + row * p.y_stride + n;
    count == W ? store(out, y) : store(out, y, count);
  }

  template <int R> void run_rows(int64_t row, int64_t n) const {
    C sums[R][GROUP];
    for (int i = 0; i < GROUP; i += STREAMS) {
      C part[R][GROUP];
      dots<R>(row, n + i, part);
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < STREAMS; ++j) sums[r][i + j] = part[r][j];
    }
    for (int r = 0; r < R; ++r) finish(row + r, n, sums[r]);
  }

 public:
  explicit Linear(const LinearParams& params) : p(params) {}

  void run() const {
    const int64_t groups = (p.n + GROUP - 1) / GROUP;
    const bool serial = p.n * p.k * static_cast<int64_t>(sizeof(T)) < SERIAL_BYTES;
    const int threads = serial ? 1 : p.threads;
    // A few dozen pieces, each contiguous in w: memory is read in long streams.
    const int64_t pieces = groups < 8 * threads ? groups : 8 * threads;
    parallel_for(pieces, threads, [&](int64_t piece, int) {
      for (int64_t g = groups * piece / pieces; g < groups * (piece + 1) / pieces; ++g) {
        int64_t row = 0;
        for (; row + 2 <= p.rows; row += 2) run_rows<2>(row, g * GROUP);
        if (row < p.rows) run_rows<1>(row, g * GROUP);
      }
    });
  }
};

}  // namespace

void linear(const LinearParams& p) {
  switch (p.dtype) {
    case DType::f32: return Linear<float>(p).run();
    case DType::bf16: return Linear<bf16>(p).run();
    case DType::f16: return Linear<f16>(p).run();
    case DType::f64: return Linear<double>(p).run();
  }
  bad_switch_value("linear: dtype", static_cast<int>(p.dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
