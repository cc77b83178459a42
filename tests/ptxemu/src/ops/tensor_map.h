// Tensor maps: the 128 bytes that describe a tensor to the copy engine (PTX ISA, "Tensors").
//
// What NVIDIA's driver puts into the 128 bytes is not documented. The layout here is the emulator's
// own, made by tensormap.replace in a kernel and by tensor_map.py on the host.
#pragma once

#include "../decoder.h"

namespace ptxemu {

constexpr uint32_t kMagic = 0x50414d54;
constexpr uint64_t kMaxRank = 5;

struct TensorMap {
  uint32_t magic;
  uint8_t element, rank_minus_1, interleave, swizzle;
  uint64_t address;
  uint32_t size[kMaxRank];  // elements
  uint16_t box[kMaxRank];
  uint8_t element_stride[kMaxRank];
  uint8_t fill;  // 1: NaN outside
  uint32_t reserved;
  uint64_t stride[kMaxRank - 1];  // bytes, of dimensions 1 and up
  uint8_t unused[128 - 88];
};
static_assert(sizeof(TensorMap) == 128);

// By the codes of tensormap.replace's .elemtype.
constexpr Type kElements[] = {Type::U8,   Type::U16, Type::U32, Type::S32, Type::U64,
                              Type::S64,  Type::F16, Type::F32, Type::F32, Type::F64,
                              Type::BF16, Type::F32, Type::F32};
constexpr int kSwizzleBytes[] = {16, 32, 64, 128};

void decode_replace(Decoder& d);   // tensormap.replace
void decode_copy_map(Decoder& d);  // tensormap.cp_fenceproxy

}  // namespace ptxemu
