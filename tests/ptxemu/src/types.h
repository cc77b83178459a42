// The scalar types and state spaces of PTX (PTX ISA, "Types" and "State Spaces").
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ptxemu {

constexpr int kLanes = 32;
using Mask = uint32_t;  // one bit a lane
constexpr Mask kAllLanes = 0xffffffffu;

enum class Type : uint8_t {
  None,
  Pred,
  B8,
  B16,
  B32,
  B64,
  B128,
  U8,
  U16,
  U32,
  U64,
  S8,
  S16,
  S32,
  S64,
  F16,
  F32,
  F64,
  BF16,
  TF32,
  F16x2,
  BF16x2,
  U16x2,
  S16x2,
  F32x2,
  E4M3,
  E5M2,
  E4M3x2,
  E5M2x2
};

enum class Space : uint8_t { Generic, Global, Shared, SharedCluster, Local, Const, Param };

/// Bits of one value; 0 for None. A predicate has one.
int bits_of(Type type);
inline int bytes_of(Type type) { return (bits_of(type) + 7) / 8; }
bool is_signed(Type type);
bool is_float(Type type);  // any floating-point format, packed ones too
/// The type that a modifier names ("f16x2"), None if it names none.
Type type_named(const std::string& name);
const char* name_of(Type type);

/// PTX that this emulator does not understand: refused at load, never guessed.
class PtxError : public std::runtime_error {
 public:
  PtxError(int line, const std::string& what)
      : std::runtime_error("line " + std::to_string(line) + ": " + what) {}
};

}  // namespace ptxemu
