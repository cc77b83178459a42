// Tensor maps made and moved by kernels (PTX ISA, "tensormap.replace", "tensormap.cp_fenceproxy").
#include <algorithm>
#include <cstddef>

#include "async.h"
#include "pick.h"
#include "tensor_map.h"

namespace ptxemu {
namespace {

enum class Field : uint8_t {
  Address,
  Rank,
  Box,
  Size,
  Stride,
  ElementStride,
  Element,
  Interleave,
  Swizzle,
  Fill
};

struct ReplaceDetail : Detail {
  Pointer at;
  Field field = Field::Address;
  int index = 0;
  Operand value;
  int value_bytes = 4;
};

// Which bytes of the map a field is.
std::pair<size_t, size_t> place_of(const ReplaceDetail& detail) {
  const auto i = static_cast<size_t>(detail.index);
  switch (detail.field) {
    case Field::Address:
      return {offsetof(TensorMap, address), 8};
    case Field::Rank:
      return {offsetof(TensorMap, rank_minus_1), 1};
    case Field::Box:
      return {offsetof(TensorMap, box) + 2 * i, 2};
    case Field::Size:
      return {offsetof(TensorMap, size) + 4 * i, 4};
    case Field::Stride:
      return {offsetof(TensorMap, stride) + 8 * i, 8};
    case Field::ElementStride:
      return {offsetof(TensorMap, element_stride) + i, 1};
    case Field::Element:
      return {offsetof(TensorMap, element), 1};
    case Field::Interleave:
      return {offsetof(TensorMap, interleave), 1};
    case Field::Swizzle:
      return {offsetof(TensorMap, swizzle), 1};
    case Field::Fill:
      return {offsetof(TensorMap, fill), 1};
  }
  throw std::logic_error("a field of a tensor map without a place");
}

// The whole map counts as written, but what was never defined stays so but for the field: in words,
// the size of the largest.
void run_replace(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const ReplaceDetail&>(*inst.detail);
  w.require_defined(detail.at.base, lanes, inst, "an address");
  w.require_defined(detail.value, lanes, inst, "a field of a tensor map");
  const auto [place, bytes] = place_of(detail);
  each_lane(lanes, [&](int lane) {
    const uint8_t* value = w.row<uint8_t>(detail.value) + lane * detail.value_bytes;
    if (std::any_of(value + bytes, value + detail.value_bytes,
                    [](uint8_t byte) { return byte != 0; }))
      w.report(Kind::Invalid, inst, 1u << lane, "the value is too large for the field");
    const uint64_t address = detail.at.at(w, lane);
    if (locate(w, inst, lane, inst.space, address, sizeof(TensorMap), 64, true).host == nullptr)
      return;
    for (uint64_t at = 0; at < sizeof(TensorMap); at += 8) {
      const Location word = locate(w, inst, lane, inst.space, address + at, 8, 8, true);
      uint8_t data[8];
      bool known = read_memory(w, inst, lane, word, 8, data);
      if (at == 0) std::memcpy(data, &kMagic, sizeof kMagic);
      if (at == place / 8 * 8) {
        std::memcpy(data + place % 8, value, bytes);
        known = true;
      }
      write_memory(w, inst, lane, word, 8, data, known);
    }
  });
}

// The codes that a field may have; none: not an enumeration ("tensormap.replace", validity of
// new_val).
uint64_t codes_of(Field field) {
  switch (field) {
    case Field::Element:
      return std::size(kElements);
    case Field::Interleave:
      return 3;
    case Field::Swizzle:
      return std::size(kSwizzleBytes);
    case Field::Fill:
      return 2;
    default:
      return 0;
  }
}

// tensormap.cp_fenceproxy: a warp copies a map from shared to global memory.
struct CopyMapDetail : Detail {
  Pointer to, from;
};

void run_copy_map(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const CopyMapDetail&>(*inst.detail);
  const int lane = __builtin_ctz(lanes);
  const Location from =
      locate(w, inst, lane, Space::Shared, detail.from.at(w, lane), sizeof(TensorMap), 64, false);
  const Location to =
      locate(w, inst, lane, Space::Global, detail.to.at(w, lane), sizeof(TensorMap), 64, true);
  if (from.host == nullptr || to.host == nullptr) return;
  TensorMap m;
  const bool known = read_memory(w, inst, lane, from, sizeof m, &m);
  if (!known)
    w.report(Kind::Uninitialised, inst, 1u << lane,
             "copies a tensor map of which some was never written");
  write_memory(w, inst, lane, to, sizeof m, &m, known);
}

}  // namespace

void decode_replace(Decoder& d) {
  auto& detail = d.detail<ReplaceDetail>();
  d.take_one({"tile"});
  detail.field = static_cast<Field>(
      d.take_one({"global_address", "rank", "box_dim", "global_dim", "global_stride",
                  "element_stride", "elemtype", "interleave_layout", "swizzle_mode", "fill_mode"}));
  static constexpr Space kSpaces[] = {Space::Global, Space::Shared, Space::Generic};
  d.inst.space = kSpaces[d.take_one({"global", "shared::cta"}, 2)];
  d.take_one({"b1024"});
  const Type type = d.take_type();
  const bool is_wide = detail.field == Field::Address || detail.field == Field::Stride;
  if (type != (is_wide ? Type::B64 : Type::B32)) d.refuse(is_wide ? "needs .b64" : "needs .b32");
  const bool indexed = detail.field >= Field::Box && detail.field <= Field::ElementStride;
  d.need_args(indexed ? 3 : 2, indexed ? 3 : 2);
  detail.at = Pointer::decode(d, d.arg(0));
  if (indexed) {
    const uint64_t index = d.integer(d.arg(1));
    if (index >= (detail.field == Field::Stride ? kMaxRank - 1 : kMaxRank))
      d.refuse("a tensor has at most 5 dimensions");
    detail.index = static_cast<int>(index);
  }
  const Arg& value = d.arg(indexed ? 2 : 1);
  const uint64_t codes = codes_of(detail.field);
  if (codes && d.integer(value) >= codes)
    d.refuse("value " + std::to_string(d.integer(value)) + " is not supported");
  detail.value = d.src(value, type);
  detail.value_bytes = bytes_of(type);
  d.inst.run = &run_replace;
  d.touches_shared(16);
}

void decode_copy_map(Decoder& d) {
  auto& detail = d.detail<CopyMapDetail>();
  d.take_one({"global"});
  d.take_one({"shared::cta"});
  d.take_one({"tensormap::generic"});
  d.take_one({"release"});
  d.take_one({"cta", "cluster", "gpu", "sys"});
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.need_args(3, 3);
  if (d.integer(d.arg(2)) != sizeof(TensorMap)) d.refuse("copies 128 bytes");
  detail.to = Pointer::decode(d, d.arg(0));
  detail.from = Pointer::decode(d, d.arg(1));
  d.inst.flow = Flow::Sync;
  d.inst.run = &run_copy_map;
}

}  // namespace ptxemu
