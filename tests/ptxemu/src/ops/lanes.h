// From a function of single values to a handler of 32 lanes: the semantics in ops/*.cpp are
// ordinary functions.
#pragma once

#include "../decoder.h"
#include "../machine.h"

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
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = F(s[lane]...);
  }
};

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

template <class F>
inline void each_lane(Mask lanes, F f) {
  for (Mask left = lanes; left; left &= left - 1) f(__builtin_ctz(left));
}

}  // namespace ptxemu
