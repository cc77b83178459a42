// PTXEMU_BY_*: the handler of a function template, instantiated for the type that an opcode names.
// Macros, since a template cannot take a function template as its argument.
#pragma once

#include "formats.h"
#include "lanes.h"

#define PTXEMU_CASE(type, f, T) \
  case Type::type:              \
    return &Lanewise<&f<T>>::run;

/// Integers of 16, 32 and 64 bits, signed and not.
#define PTXEMU_BY_INTEGER(d, type, f)                                            \
  [&]() -> Handler {                                                             \
    switch (type) {                                                              \
      PTXEMU_CASE(U16, f, uint16_t)                                              \
      PTXEMU_CASE(U32, f, uint32_t)                                              \
      PTXEMU_CASE(U64, f, uint64_t)                                              \
      PTXEMU_CASE(S16, f, int16_t)                                               \
      PTXEMU_CASE(S32, f, int32_t)                                               \
      PTXEMU_CASE(S64, f, int64_t)                                               \
      default:                                                                   \
        (d).refuse(std::string("type .") + name_of(type) + " is not supported"); \
    }                                                                            \
  }()

/// Bits of 16, 32 and 64.
#define PTXEMU_BY_BITS(d, type, f) PTXEMU_HANDLE_BITS(d, type, Lanewise, f)
#define PTXEMU_HANDLE_BITS(d, type, Handles, f)                                  \
  [&]() -> Handler {                                                             \
    switch (bits_of(type)) {                                                     \
      case 16:                                                                   \
        return &Handles<&f<uint16_t>>::run;                                      \
      case 32:                                                                   \
        return &Handles<&f<uint32_t>>::run;                                      \
      case 64:                                                                   \
        return &Handles<&f<uint64_t>>::run;                                      \
      default:                                                                   \
        (d).refuse(std::string("type .") + name_of(type) + " is not supported"); \
    }                                                                            \
  }()

namespace ptxemu {

/// d, a, b, ... all of one type.
inline void same_type_operands(Decoder& d, Type type, size_t sources) {
  d.need_args(sources + 1, sources + 1);
  d.inst.o[0] = d.dst(d.arg(0), type);
  for (size_t i = 1; i <= sources; ++i) d.inst.o[i] = d.src(d.arg(i), type);
}

}  // namespace ptxemu
