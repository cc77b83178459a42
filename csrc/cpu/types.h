// From a dtype that is known at run time to the type that it means.
#pragma once
#include "cpu/isa.h"
#include "cpu/vec.h"

namespace pyfuse::cpu::PYFUSE_ISA {

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// body(an object of the type that dtype means), of those that are computed in C.
template <class C, class Body>
PYFUSE_INLINE void with_type_of(DType dtype, const Body& body) {
  if constexpr (same<C, double>) {
    body(double{});
  } else {
    switch (dtype) {
      case DType::f32:
        return body(float{});
      case DType::bf16:
        return body(bf16{});
      case DType::f16:
        return body(f16{});
      default:
        bad_switch_value("dtype", static_cast<int>(dtype));
    }
  }
}
// The same of all types.
template <class Body>
PYFUSE_INLINE void with_type(DType dtype, const Body& body) {
  dtype == DType::f64 ? body(double{}) : with_type_of<float>(dtype, body);
}

}  // namespace pyfuse::cpu::PYFUSE_ISA
