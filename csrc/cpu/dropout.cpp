// Activation and dropout in one pass, and their gradient in another. Of the random numbers nothing
// is kept: the backward pass draws them again, at less than a mask's way through memory would cost.
#include "cpu/activation.h"
#include "cpu/parallel.h"
#include "cpu/philox.h"
#include "cpu/row_vectors.h"
#include "cpu/types.h"

namespace pyfuse::cpu::PYFUSE_ISA {
namespace {

constexpr int64_t piece = 512;            // elements of a row that are held at a time
constexpr int64_t task_elements = 16384;  // less than two tasks are not worth a parallel region

// What all pieces of a call share. `fixed`: every factor is the same, no random numbers are drawn.
struct Call {
  DropoutRule rule;
  bool fixed;
  double factor;
};

Call make_call(const DropoutParams& p) {
  if (p.seed == nullptr) return {{}, true, 1.0};
  const Call call = {dropout_rule(p.seed, p.p), false, 0.0};
  // relu's result is 0 where it was dropped, which says all.
  const bool known = p.flow != nullptr && p.activation == Activation::relu;
  return known ? Call{{}, true, call.rule.factor} : call;
}

// A piece of a row on its way, in whole vectors, in the first cache level.
template <class C>
struct Piece {
  alignas(64) C value[piece], flow[piece], factor[piece];
};

template <class T>
PYFUSE_INLINE const T* element(const void* base, int64_t i) {
  return base == nullptr ? nullptr : static_cast<const T*>(base) + i;
}

// Beyond `count` elements there are zeros, up to a whole vector.
template <class T>
PYFUSE_INLINE void read(const T* from, int64_t count, compute_t<T>* to) {
  for_vectors<compute_t<T>, 1>(
      count, [&](const auto& at, int) PYFUSE_INLINE_BODY { store(to + at.i, at(from)); });
}

template <class C, class Step>
PYFUSE_INLINE void change(C* values, int64_t count, const Step& step) {
  for (int64_t i = 0; i < count; i += Vec<C>::width) store(values + i, step(load(values + i), i));
}

// value becomes act(value), or with a flow the flow · act'(value).
template <Activation activation, class C>
void act(Piece<C>& at, int64_t count, bool backward) {
  typedef typename Vec<C>::type V;
  if (backward)
    change(at.value, count, [&](V v, int64_t i) PYFUSE_INLINE_BODY {
      return activation_gradient<activation, C>(v, load(at.flow + i));
    });
  else
    change(at.value, count,
           [&](V v, int64_t) PYFUSE_INLINE_BODY { return activate<C>(activation, v); });
}

template <class C>
void act(Activation activation, Piece<C>& at, int64_t count, bool backward) {
  switch (activation) {
    case Activation::none:
      return;  // backward, the flow has been read as the value
    case Activation::relu:
      return act<Activation::relu>(at, count, backward);
    case Activation::gelu:
      return act<Activation::gelu>(at, count, backward);
    case Activation::gelu_tanh:
      return act<Activation::gelu_tanh>(at, count, backward);
    case Activation::silu:
      return act<Activation::silu>(at, count, backward);
    default:
      bad_switch_value("activation", static_cast<int>(activation));
  }
}

// y = the values times their factors, past the caches if `streamed`.
template <bool streamed, class T, class C>
PYFUSE_INLINE void write(const Piece<C>& from, int64_t count, T* y) {
  for_vectors<C, 1>(count, [&](const auto& at, int) PYFUSE_INLINE_BODY {
    at.template put<streamed>(y, apply_dropout(at(from.value), at(from.factor)));
  });
}

// `count` elements from `column` of `row` on.
template <class T, class C>
void pass(const DropoutParams& p, int64_t row, int64_t column, int64_t count, Piece<C>& at) {
  const T* x = element<T>(p.x, row * p.x_stride + column);
  const T* flow = element<T>(p.flow, row * p.flow_stride + column);
  const bool backward = flow != nullptr;
  read(backward && p.activation == Activation::none ? flow : x, count, at.value);
  if (backward && p.activation != Activation::none) read(flow, count, at.flow);
  act(p.activation, at, count, backward);
  T* y = static_cast<T*>(p.y) + row * p.d + column;
  p.stream ? write<true>(at, count, y) : write<false>(at, count, y);
}

// All pieces, in tasks of about task_elements.
template <class T>
void run(const DropoutParams& p) {
  typedef compute_t<T> C;
  const Call call = make_call(p);
  const int64_t per_row = (p.d + piece - 1) / piece, pieces = p.rows * per_row;
  const int64_t per_task = task_elements / (p.d < piece ? p.d : piece) + 1;
  parallel_for((pieces + per_task - 1) / per_task, p.threads, [&](int64_t task, int) {
    Piece<C> at;
    if (call.fixed)
      for (C& factor : at.factor) factor = static_cast<C>(call.factor);
    const int64_t end = (task + 1) * per_task < pieces ? (task + 1) * per_task : pieces;
    for (int64_t i = task * per_task; i < end; ++i) {
      const int64_t row = i / per_row, column = i % per_row * piece;
      const int64_t count = p.d - column < piece ? p.d - column : piece;
      if (!call.fixed)
        dropout_row(call.rule, 0, 0, static_cast<uint32_t>(row), column, count, at.factor);
      pass<T>(p, row, column, count, at);
    }
    if (p.stream) end_stream();
  });
}

}  // namespace

void dropout(const DropoutParams& p) {
  with_type(p.dtype, [&](auto type) { run<decltype(type)>(p); });
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
