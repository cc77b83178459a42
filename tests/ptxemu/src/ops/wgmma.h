// Matrix products of a warpgroup: what is known of one when it is decoded, and when it has been
// issued.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "../decoder.h"
#include "../machine.h"
#include "fragments.h"
#include "tensor_core.h"

namespace ptxemu {

constexpr int kWarpRows = 16;  // of the 64 rows, those of one of the four warps

/// Where a matrix lies in shared memory (PTX ISA, "Matrix Descriptor Format").
struct MatrixDescriptor {
  uint64_t start, leading, stride;  // bytes
  int width;                        // of the swizzle: 16 (none), 32, 64 or 128 bytes
  bool transposed;                  // the rows (M or N), not k, are contiguous

  MatrixDescriptor(uint64_t bits, bool transposed_)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        width(std::array<int, 4>{16, 128, 64, 32}[bits >> 62]),
        transposed(transposed_) {}

  /// Bits that have to be zero: unused ones, and the base offset, which moves the swizzle's
  /// pattern.
  static constexpr uint64_t kUnsupported = ~0xc0003fff3fff3fffu;

  /// The shared address of element (row, k), of `bytes` each. Core matrices are 8 rows of 16 bytes;
  /// with a swizzle, of `width` bytes, and the number of a 16-byte chunk is XORed with bits 7.. of
  /// its address.
  uint64_t at(uint64_t row, uint64_t k, uint64_t bytes) const {
    const auto w = static_cast<uint64_t>(width);
    uint64_t a = start;
    if (!transposed) {
      const uint64_t along = k * bytes;
      a += row / 8 * stride + row % 8 * w +
           (width == 16 ? along / 16 * leading + along % 16 : along);
    } else {
      const uint64_t along = row * bytes;
      const uint64_t repeat = width == 16 ? stride : leading, next = width == 16 ? leading : stride;
      a += along / w * repeat + along % w + k % 8 * w + k / 8 * next;
    }
    return a ^ (((a >> 7) & (w / 16 - 1)) << 4);
  }
};

struct WgmmaDetail : Detail {
  Element a = Element::BF16, b = Element::BF16;
  Type result = Type::F32;
  int n = 0, k = 0;
  bool a_in_registers = false, scale_d_negated = false, transposed_a = false, transposed_b = false,
       saturate = false;
  float sign_a = 1, sign_b = 1;
  int d_count = 0;
  SumRule rule{};  // of a result in float32
};

/// One that was issued. The descriptors' values and scale-d are read at issue, the rest when it is
/// carried out.
struct AsyncMatrix {
  const Inst* inst;
  Frame* frame;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool accumulate = true;
  std::vector<std::pair<uint64_t, uint64_t>> read;  // shared bytes that it reads: where, how many
};

/// inst.more: D, then A's registers if it has such; o: A's descriptor, B's descriptor, scale-d
inline const WgmmaDetail& detail_of(const AsyncMatrix& m) {
  return static_cast<const WgmmaDetail&>(*m.inst->detail);
}
inline const Operand* sources(const Inst& inst) {
  return inst.more.data() + static_cast<const WgmmaDetail&>(*inst.detail).d_count;
}

/// Checks and notes the shared memory that a product reads, which from now on is being read.
void begin_reading(Warp& w, AsyncMatrix& m);
/// The warp's rows of D.
void carry_out(Warp& w, const AsyncMatrix& m);

}  // namespace ptxemu
