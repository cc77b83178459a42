// y = act(x·wᵀ + bias) · multiply + residual for many rows: bound by arithmetic.
//
// w is packed once into panels of 64 outputs, [N/64][K][64] (bf16: [N/64][K/2][64][2], pairs for
// the bf16 dot product), the same for every instruction set. A task is a block of rows, small
// enough that its part of x stays in the second-level cache, against a few panels: each panel is
// fetched once per task and used by all of its rows, six at a time (tile_product.h).
#include "cpu/linear_finish.h"
#include "cpu/parallel.h"
#include "cpu/tile_product.h"
#include "cpu/transpose.h"
#include "cpu/workspace.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int PANEL = packed_linear_panel;
constexpr int64_t BLOCK_BYTES = 320 * 1024;  // of x, as it is multiplied

// Terms of a dot product added one after the other; then these sums are added. A sum of sums loses
// less than one long sum: its rounding errors grow with the length of both, not with their product.
constexpr int64_t SUM = 256;

// How rows of x are multiplied with a panel: Row is their element type there.
template <class T>
struct Product {
  typedef compute_t<T> Row;
  static constexpr int pair = 1;  // elements of K that lie together in a panel
  static void run(const Row* rows, int64_t stride, const T* panel, int64_t length,
                  compute_t<T>* sums) {
    constexpr int step = NV * width<T>;
    static_assert(PANEL % step == 0, "a panel is a whole number of register tiles");
    for (int j = 0; j < PANEL; j += step) {
      for (int64_t k = 0; k == 0 || k < length; k += SUM) {
        const int64_t terms = length - k < SUM ? length - k : SUM;
        multiply_panel(rows + k, stride, panel + k * PANEL + j, PANEL, terms, sums + j, PANEL,
                       k > 0);
      }
    }
  }
};
template <>
struct Product<bf16> {
  typedef pair_row Row;
  static constexpr int pair = 2;
  static void run(const Row* rows, int64_t stride, const bf16* panel, int64_t length, float* sums) {
    constexpr int step = NV * width<bf16>;
    for (int j = 0; j < PANEL; j += step) {
      for (int64_t k = 0; k == 0 || k < length; k += SUM) {
        const int64_t terms = length - k < SUM ? length - k : SUM;
        multiply_pairs(rows + k, stride, panel + k * PANEL + 2 * j, PANEL, terms / 2, sums + j,
                       PANEL, k > 0);
      }
    }
  }
};

PYFUSE_INLINE void copy_element(bf16 from, bf16& to) { to = from; }
template <class T>
PYFUSE_INLINE void copy_element(T from, compute_t<T>& to) {
  to = to_compute(from);
}

template <class T>
class PackedLinear {
  typedef compute_t<T> C;
  typedef typename Product<T>::Row Row;

  const LinearParams& p;
  const int64_t length = (p.k + Product<T>::pair - 1) / Product<T>::pair * Product<T>::pair;
  const int64_t panels = (p.n + PANEL - 1) / PANEL;
  const int64_t blocks = block_count();
  const int64_t block = ((p.rows + blocks - 1) / blocks + MR - 1) / MR * MR;  // of equal size
  const int64_t groups = group_count();
  // Rows of x are used where they lie if nothing has to be converted or padded.
  const bool in_place = sizeof(T) == sizeof(Row) && length == p.k;

  int64_t block_count() const {
    const int64_t fit =
        BLOCK_BYTES / (static_cast<int64_t>(sizeof(Row)) * (length > 0 ? length : 1));
    const int64_t most = fit < 2 * MR ? 2 * MR : fit > 42 * MR ? 42 * MR : fit / MR * MR;
    return (p.rows + most - 1) / most;
  }
  // Groups of panels: enough tasks to balance the threads, as few as that needs.
  int64_t group_count() const {
    const int64_t wanted = (8 * p.threads + blocks - 1) / blocks;
    return wanted < 1 ? 1 : wanted < panels ? wanted : panels;
  }

  void multiply(const Row* rows, int64_t stride, int64_t first, int64_t count, int64_t panel,
                C* sums) const {
    Product<T>::run(rows, stride, static_cast<const T*>(p.w) + panel * length * PANEL, length,
                    sums);
    for (int64_t r = 0; r < count; ++r)
      finish_outputs<T>(p, first + r, panel * PANEL, sums + r * PANEL, PANEL);
  }

  // `count` rows of x as Row, padded with zeros to the length, then zero rows up to a block of six.
  void convert(int64_t first, int64_t count, Row* to) const {
    for (int64_t r = 0; r < count; ++r, to += length) {
      const T* x = static_cast<const T*>(p.x) + (first + r) * p.x_stride;
      for (int64_t k = 0; k < p.k; ++k) copy_element(x[k], to[k]);
      if (length > p.k) to[p.k] = Row{};
    }
    const int64_t missing = (MR - count % MR) % MR;
    memset(static_cast<void*>(to), 0, static_cast<size_t>(missing * length) * sizeof(Row));
  }

  void run_task(int64_t i, int64_t g, Row* scratch, C* sums) const {
    const int64_t first = i * block, rows = p.rows - first < block ? p.rows - first : block;
    const int64_t usable = in_place ? rows / MR * MR : 0;  // read from x itself
    if (usable < rows) convert(first + usable, rows - usable, scratch);
    for (int64_t panel = panels * g / groups; panel < panels * (g + 1) / groups; ++panel) {
      for (int64_t r = 0; r < usable; r += MR) {
        const T* x = static_cast<const T*>(p.x) + (first + r) * p.x_stride;
        multiply(reinterpret_cast<const Row*>(x), p.x_stride, first + r, MR, panel, sums);
      }
      for (int64_t r = usable; r < rows; r += MR) {
        const int64_t count = rows - r < MR ? rows - r : MR;
        multiply(scratch + (r - usable) * length, length, first + r, count, panel, sums);
      }
    }
  }

 public:
  explicit PackedLinear(const LinearParams& params) : p(params) {}

  void run() const {
    Carver size(nullptr);
    size.take<Row>((in_place ? MR : block) * length), size.take<C>(MR * PANEL);
    Workspace memory(p.threads * size.used());
    const int64_t tasks =
        (p.rows + block - 1) / block * groups;  // rounding up may have emptied a block
    parallel_for(tasks, p.threads, [&](int64_t task, int thread) {
      Carver carver(memory.data() + thread * size.used());
      Row* scratch = carver.take<Row>((in_place ? MR : block) * length);
      run_task(task / groups, task % groups, scratch, carver.take<C>(MR * PANEL));
    });
  }
};

// w transposed, panel by panel, in units of `pair` elements; outputs past N and elements past K are
// zeros.
template <class T>
void pack_plainly(const LinearParams& p, int64_t panel, int64_t from, T* to) {
  constexpr int pair = Product<T>::pair;
  to += from * PANEL;
  for (int64_t k = from; k < p.k; k += pair) {
    for (int64_t j = 0; j < PANEL; ++j) {
      const int64_t n = panel * PANEL + j;
      for (int i = 0; i < pair; ++i, ++to)
        *to = n < p.n && k + i < p.k ? static_cast<const T*>(p.w)[n * p.w_stride + k + i] : T{};
    }
  }
}

// The same where a unit is four bytes, by squares of W units in registers; the units it has done.
template <class T>
int64_t pack_squares(const LinearParams& p, int64_t panel, T* to) {
  constexpr int W = Vec<float>::width, pair = Product<T>::pair;
  const int64_t units = p.k / pair / W * W;
  for (int64_t k = 0; k < units; k += W) {
    for (int64_t j = 0; j < PANEL; j += W) {
      vuint square[W];
      PYFUSE_UNROLL for (int i = 0; i < W; ++i) {
        const int64_t n = panel * PANEL + j + i;
        square[i] = vuint{};
        if (n < p.n)
          memcpy(&square[i], static_cast<const T*>(p.w) + n * p.w_stride + k * pair, sizeof(vuint));
      }
      transpose(square);
      PYFUSE_UNROLL for (int i = 0; i < W; ++i)
          memcpy(static_cast<void*>(to + ((k + i) * PANEL + j) * pair), &square[i], sizeof(vuint));
    }
  }
  return units * pair;
}

template <class T>
void pack(const LinearParams& p) {
  constexpr int pair = Product<T>::pair;
  const int64_t length = (p.k + pair - 1) / pair * pair;
  parallel_for((p.n + PANEL - 1) / PANEL, p.threads, [&](int64_t panel, int) {
    T* to = static_cast<T*>(p.y) + panel * length * PANEL;
    int64_t done = 0;
    if constexpr (sizeof(T) * pair == 4) done = pack_squares(p, panel, to);
    pack_plainly(p, panel, done, to);
  });
}

}  // namespace

void linear_packed(const LinearParams& p) {
  switch (p.dtype) {
    case DType::f32:
      return PackedLinear<float>(p).run();
    case DType::bf16:
      return PackedLinear<bf16>(p).run();
    case DType::f16:
      return PackedLinear<f16>(p).run();
    case DType::f64:
      return PackedLinear<double>(p).run();
  }
  bad_switch_value("linear_packed: dtype", static_cast<int>(p.dtype));
}

void pack_linear(const LinearParams& p) {
  switch (p.dtype) {
    case DType::f32:
      return pack<float>(p);
    case DType::bf16:
      return pack<bf16>(p);
    case DType::f16:
      return pack<f16>(p);
    case DType::f64:
      return pack<double>(p);
  }
  bad_switch_value("pack_linear: dtype", static_cast<int>(p.dtype));
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
