// Matrix fragments: which element of a tile a lane's register holds (PTX ISA, "Matrix Fragments for
// mma").
//
// For every element size one register of 32 bits over the 32 lanes is a tile of 8 rows by 32 bits x
// 4: lane l holds row l / 4, and in it the 32 bits number l % 4. Read as memory, such a register
// row IS that tile, row after row. Larger fragments are several such tiles. Accumulators hold
// columns 2 * (l % 4) and the next one, in two registers.
#pragma once

#include <cstring>
#include <stdexcept>

#include "../types.h"
#include "formats.h"

namespace ptxemu {

/// The formats that matrix instructions multiply.
enum class Element : uint8_t { F16, BF16, TF32, E4M3, E5M2, S8, U8, F64 };
class Decoder;
/// By a matrix instruction's type; refuses what it does not multiply.
Element matrix_element(Decoder& d, Type type);

inline int bits_of(Element e) {
  switch (e) {
    case Element::F16:
    case Element::BF16:
      return 16;
    case Element::TF32:
      return 32;
    case Element::F64:
      return 64;
    default:
      return 8;
  }
}

/// n elements, packed in memory, to float. Every one is exact.
inline void to_floats(Element e, const void* from, int n, float* to) {
  switch (e) {
    case Element::BF16: {
      const auto* s = static_cast<const uint16_t*>(from);
      for (int i = 0; i < n; ++i) to[i] = bf16_to_float(s[i]);
      return;
    }
    case Element::F16: {
      const auto* s = static_cast<const uint16_t*>(from);
      for (int i = 0; i < n; ++i) to[i] = f16_to_float(s[i]);
      return;
    }
    case Element::TF32: {  // the hardware reads the upper 19 bits and no more
      const auto* s = static_cast<const uint32_t*>(from);
      for (int i = 0; i < n; ++i) to[i] = bit_cast<float>(s[i] & 0xffffe000u);
      return;
    }
    case Element::E4M3:
    case Element::E5M2: {
      static const struct Table {
        float value[2][256];
        Table() {
          for (uint32_t i = 0; i < 256; ++i) {
            value[0][i] = static_cast<float>(decode<E4M3>(i));
            value[1][i] = static_cast<float>(decode<E5M2>(i));
          }
        }
      } kTable;
      const auto* s = static_cast<const uint8_t*>(from);
      const float* table = kTable.value[e == Element::E5M2];
      for (int i = 0; i < n; ++i) to[i] = table[s[i]];
      return;
    }
    case Element::S8: {
      const auto* s = static_cast<const int8_t*>(from);
      for (int i = 0; i < n; ++i) to[i] = s[i];
      return;
    }
    case Element::U8: {
      const auto* s = static_cast<const uint8_t*>(from);
      for (int i = 0; i < n; ++i) to[i] = s[i];
      return;
    }
    case Element::F64:
      break;
  }
  throw std::logic_error("no element of a float matrix");
}

}  // namespace ptxemu
