// From a function of single values to a handler of 32 lanes: the semantics in ops/*.cpp are
// ordinary functions.
#pragma once

#include <tuple>

#include "../decoder.h"
#include "../machine.h"
#include "formats.h"

namespace ptxemu {

/// Keeps the new values of the lanes of `mask`.
template <class T>
inline void merge(T* into, const T* values, Mask mask) {
  for (int lane = 0; lane < kLanes; ++lane)
    into[lane] = mask >> lane & 1 ? values[lane] : into[lane];
}

/// o[0] <- F(o[1], ...) in each active lane.
template <auto F>
struct Lanewise;

template <class D, class... S, D (*F)(S...)>
struct Lanewise<F> {
  static void run(Warp& w, const Inst& inst, Mask lanes) {
    run_with(w, inst, lanes, std::index_sequence_for<S...>());
  }

 private:
  template <size_t... I>
  static void run_with(Warp& w, const Inst& inst, Mask lanes, std::index_sequence<I...>) {
    D* d = w.row<D>(inst.o[0]);
    if (lanes == kAllLanes) {
      apply(d, w.row<S>(inst.o[I + 1])...);
    } else {
      alignas(64) D values[kLanes];
      apply(values, w.row<S>(inst.o[I + 1])...);
      merge(d, values, lanes);
    }
    w.flow(inst.o[0], lanes, inst, inst.o[I + 1]...);
  }
  static void apply(D* d, const S*... s) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = as_on_gpu(F(s[lane]...));
  }
};

template <class F>
inline void each_lane(Mask lanes, F f) {
  for (Mask left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
}

/// The same for an F that moves or combines single bits of its first kData operands, as its other
/// operands say: a half of the result is defined whatever was undefined in what it takes no bit of.
/// of.
template <auto F, size_t kData>
struct Bitwise;

template <class D, class... S, D (*F)(S...), size_t kData>
struct Bitwise<F, kData> {
  static void run(Warp& w, const Inst& inst, Mask lanes) {
    Mask low = lanes, high = lanes, all = kAllLanes;
    for (size_t i = 1; i <= sizeof...(S); ++i) all &= w.defined[inst.o[i].row];
    const Mask doubtful = lanes & ~all;
    if (doubtful)
      each_lane(doubtful, [&](int lane) {  // before the values: o[0] may be a source
        const D open = undefined_bits(w, inst, lane, std::index_sequence_for<S...>());
        if (open & lower<D>()) low &= ~(Mask{1} << lane);
        if (open & static_cast<D>(~lower<D>())) high &= ~(Mask{1} << lane);
      });
    Lanewise<F>::run(w, inst, lanes);
    if (doubtful == 0) return;
    w.defined[inst.o[0].row] |= low & high;
    w.define_halves(inst.o[0], lanes, low, high);
  }

 private:
  template <class T>
  static constexpr T lower() {
    return static_cast<T>((uint64_t{1} << 4 * sizeof(T)) - 1);
  }
  /// A bit depends on undefined ones if it is not the same for all 0 and all 1 in each operand.
  template <size_t... I>
  static D undefined_bits(Warp& w, const Inst& inst, int lane, std::index_sequence<I...>) {
    const std::tuple<S...> values{w.row<S>(inst.o[I + 1])[lane]...};
    const std::tuple<S...> open{undefined_in<S>(w, inst.o[I + 1], lane)...};
    if (((I >= kData && std::get<I>(open) != 0) || ...)) return static_cast<D>(~D{0});
    const auto at = [&](unsigned ones) {
      return F(static_cast<S>((std::get<I>(values) & ~std::get<I>(open)) |
                              (ones >> I & 1 ? std::get<I>(open) : S{0}))...);
    };
    D differs = 0;
    for (unsigned ones = 1; ones < 1u << kData; ++ones) differs |= at(0) ^ at(ones);
    return differs;
  }
  template <class T>
  static T undefined_in(Warp& w, Operand o, int lane) {
    T open = 0;
    if (!(w.low_defined(o.row) >> lane & 1)) open |= lower<T>();
    if (!(w.high_defined(o.row) >> lane & 1)) open |= static_cast<T>(~lower<T>());
    return open;
  }
};

template <auto F>
using OfOne = Bitwise<F, 1>;
template <auto F>
using OfTwo = Bitwise<F, 2>;

/// o[0], a predicate, <- F(o[1], ...) in each active lane.
template <auto F>
struct LanewiseTest;

template <class... S, bool (*F)(S...)>
struct LanewiseTest<F> {
  static Mask apply(Warp& w, const Inst& inst, size_t first) {
    return apply_with(w, inst, first, std::index_sequence_for<S...>());
  }

 private:
  template <size_t... I>
  static Mask apply_with(Warp& w, const Inst& inst, size_t first, std::index_sequence<I...>) {
    return mask_of(w.row<S>(inst.o[first + I])...);
  }
  static Mask mask_of(const S*... s) {
    uint8_t truth[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) truth[lane] = F(s[lane]...);
    Mask mask = 0;
    for (int lane = 0; lane < kLanes; ++lane) mask |= Mask{truth[lane]} << lane;
    return mask;
  }
};

}  // namespace ptxemu
