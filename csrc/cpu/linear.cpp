// y = act(x·wᵀ + bias) · multiply + residual for few rows of x: bound by reading w [N, K], which
// happens once, as it lies in memory. Layers that share x can run in one call: waking the threads
// costs as much as a small layer. For many rows see linear_packed.cpp.
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t SERIAL_BYTES =
    128 * 1024;  // of w: below this one thread is done before two have woken

// One dot product step: acc += x·w over a vector of w.
template <class T>
struct Step {
  static constexpr int lanes = width<T>;
  typedef vec_t<T> Acc;
  static PYFUSE_INLINE Acc run(Acc acc, const T* x, const T* w) { return acc + load(x) * load(w); }
  static PYFUSE_INLINE Acc run(Acc acc, const T* x, const T* w, int64_t n) {
    return acc + load(x, n) * load(w, n);
  }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
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

template <class T>
class Linear {
  typedef compute_t<T> C;
  typedef vec_t<T> V;
  static constexpr int W = width<T>;
  static constexpr int GROUP = W;  // outputs of a task: one vector of y per row of x
  // Rows of w in flight at a time: enough streams to keep the memory busy, few enough for
  // registers.
  static constexpr int STREAMS = W < 8 ? W : 8;

  const LinearParams& p;

  const T* w_row(int64_t n) const {
    return static_cast<const T*>(p.w) + (n < p.n ? n : p.n - 1) * p.w_stride;
  }

  // Products of R rows of x with STREAMS rows of w from row n on: sums[r][i].
  template <int R>
  void dots(int64_t row, int64_t n, C (*sums)[GROUP]) const {
    constexpr int L = Step<T>::lanes;
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* w[STREAMS];
    PYFUSE_UNROLL for (int i = 0; i < STREAMS; ++i) w[i] = w_row(n + i);
    V acc[R][STREAMS] = {};
    int64_t k = 0;
    for (; k + L <= p.k; k += L) {
      PYFUSE_UNROLL for (int i = 0; i < STREAMS; ++i) {
        PYFUSE_UNROLL for (int r = 0; r < R; ++r) acc[r][i] =
            Step<T>::run(acc[r][i], x + r * p.x_stride + k, w[i] + k);
      }
    }
    if (k < p.k) {
      PYFUSE_UNROLL for (int i = 0; i < STREAMS; ++i) {
        PYFUSE_UNROLL for (int r = 0; r < R; ++r) acc[r][i] =
            Step<T>::run(acc[r][i], x + r * p.x_stride + k, w[i] + k, p.k - k);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < STREAMS; ++i) sums[r][i] = reduce_add(acc[r][i]);
  }

  template <int R>
  void run_rows(int64_t row, int64_t n) const {
    C sums[R][GROUP];
    for (int i = 0; i < GROUP; i += STREAMS) {
      C part[R][GROUP];
      dots<R>(row, n + i, part);
      for (int r = 0; r < R; ++r)
        for (int j = 0; j < STREAMS; ++j) sums[r][i + j] = part[r][j];
    }
    for (int r = 0; r < R; ++r) finish_outputs<T>(p, row + r, n, sums[r], GROUP);
  }

 public:
  explicit Linear(const LinearParams& params) : p(params) {}

  int64_t groups() const { return (p.n + GROUP - 1) / GROUP; }
  int64_t bytes() const { return p.n * p.k * static_cast<int64_t>(sizeof(T)); }

  void run(int64_t first_group, int64_t last_group) const {
    for (int64_t g = first_group; g < last_group; ++g) {
      int64_t row = 0;
      for (; row + 2 <= p.rows; row += 2) run_rows<2>(row, g * GROUP);
      if (row < p.rows) run_rows<1>(row, g * GROUP);
    }
  }
};

template <class T>
void run_all(const LinearParams* layers, int count) {
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += Linear<T>(layers[i]).bytes();
  const int threads = bytes < SERIAL_BYTES ? 1 : layers[0].threads;
  // A few dozen pieces of each layer, each contiguous in w: memory is read in long streams.
  const int64_t most = 8 * threads;
  parallel_for(count * most, threads, [&](int64_t i, int) {
    const Linear<T> layer(layers[i / most]);
    const int64_t groups = layer.groups(), piece = i % most;
    layer.run(groups * piece / most, groups * (piece + 1) / most);
  });
}

}  // namespace

void linear(const LinearParams* layers, int count) {
  switch (layers[0].dtype) {
    case DType::f32:
      return run_all<float>(layers, count);
    case DType::bf16:
      return run_all<bf16>(layers, count);
    case DType::f16:
      return run_all<f16>(layers, count);
    case DType::f64:
      return run_all<double>(layers, count);
  }
  bad_switch_value("linear: dtype", static_cast<int>(layers[0].dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
