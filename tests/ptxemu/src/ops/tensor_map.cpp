// Tensor maps: the 128 bytes that describe a tensor to the copy engine, and copies of boxes of it (PTX ISA,
// "Tensors", "tensormap.replace", "cp.async.bulk.tensor").
//
// What NVIDIA's driver puts into the 128 bytes is not documented. The layout here is the emulator's own, made by
// tensormap.replace in a kernel and by tensor_map.py on the host.
#include <algorithm>

#include "async.h"
#include "pick.h"

namespace ptxemu {
namespace {

constexpr uint32_t kMagic = 0x50414d54;
constexpr int kMaxRank = 5;

struct TensorMap {
  uint32_t magic;
  uint8_t element, rank_minus_1, interleave, swizzle;
  uint64_t address;
  uint32_t size[kMaxRank];         // elements
  uint16_t box[kMaxRank];
  uint8_t element_stride[kMaxRank];
  uint8_t fill;                    // 1: NaN outside
  uint32_t reserved;
  uint64_t stride[kMaxRank - 1];   // bytes, of dimensions 1 and up
  uint8_t unused[128 - 88];
};
static_assert(sizeof(TensorMap) == 128);

// By the codes of tensormap.replace's .elemtype.
constexpr Type kElements[] = {Type::U8, Type::U16, Type::U32, Type::S32, Type::U64, Type::S64, Type::F16,
                              Type::F32, Type::F32, Type::F64, Type::BF16, Type::F32, Type::F32};
constexpr int kSwizzleBytes[] = {16, 32, 64, 128};

// ---- tensormap.replace

enum class Field : uint8_t { Address, Rank, Box, Size, Stride, ElementStride, Element, Interleave, Swizzle, Fill };

struct ReplaceDetail : Detail {
  Pointer at;
  Field field = Field::Address;
  int index = 0;
  Operand value;
  int value_bytes = 4;
};

void set_field(TensorMap& m, const ReplaceDetail& detail, uint64_t value) {
  const auto i = static_cast<size_t>(detail.index);
  switch (detail.field) {
    case Field::Address: m.address = value; return;
    case Field::Rank: m.rank_minus_1 = static_cast<uint8_t>(value); return;
    case Field::Box: m.box[i] = static_cast<uint16_t>(value); return;
    case Field::Size: m.size[i] = static_cast<uint32_t>(value); return;
    case Field::Stride: m.stride[i] = value; return;
    case Field::ElementStride: m.element_stride[i] = static_cast<uint8_t>(value); return;
    case Field::Element: m.element = static_cast<uint8_t>(value); return;
    case Field::Interleave: m.interleave = static_cast<uint8_t>(value); return;
    case Field::Swizzle: m.swizzle = static_cast<uint8_t>(value); return;
    case Field::Fill: m.fill = static_cast<uint8_t>(value); return;
  }
}

void run_replace(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const ReplaceDetail&>(*inst.detail);
  w.require_defined(detail.at.base, lanes, inst, "an address");
  w.require_defined(detail.value, lanes, inst, "a field of a tensor map");
  each_lane(lanes, [&](int lane) {
    const Location at = locate(w, inst, lane, inst.space, detail.at.at(w, lane), sizeof(TensorMap), 64, true);
    if (at.host == nullptr) return;
    TensorMap m;
    read_memory(w, inst, lane, at, sizeof m, &m);
    m.magic = kMagic;
    uint64_t value = 0;
    std::memcpy(&value, w.row<uint8_t>(detail.value) + lane * detail.value_bytes, static_cast<size_t>(detail.value_bytes));
    set_field(m, detail, value);
    write_memory(w, inst, lane, at, sizeof m, &m, true);
  });
}

void decode_replace(Decoder& d) {
  auto& detail = d.detail<ReplaceDetail>();
  d.take_one({"tile"});
  detail.field = static_cast<Field>(d.take_one({"global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride",
                                                "elemtype", "interleave_layout", "swizzle_mode", "fill_mode"}));
  static constexpr Space kSpaces[] = {Space::Global, Space::Shared, Space::Generic};
  d.inst.space = kSpaces[d.take_one({"global", "shared::cta"}, 2)];
  d.take_one({"b1024"});
  const Type type = d.take_type();
  const bool indexed = detail.field >= Field::Box && detail.field <= Field::ElementStride;
  d.need_args(indexed ? 3 : 2, indexed ? 3 : 2);
  detail.at = Pointer::decode(d, d.arg(0));
  if (indexed) {
    detail.index = static_cast<int>(d.integer(d.arg(1)));
    if (detail.index >= (detail.field == Field::Stride ? kMaxRank - 1 : kMaxRank)) d.refuse("a tensor has at most 5 dimensions");
  }
  detail.value = d.src(d.arg(indexed ? 2 : 1), type);
  detail.value_bytes = bytes_of(type);
  d.inst.run = &run_replace;
  d.touches_shared(16);
}

// tensormap.cp_fenceproxy: a warp copies a map from shared to global memory.
struct CopyMapDetail : Detail {
  Pointer to, from;
};

void run_copy_map(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const CopyMapDetail&>(*inst.detail);
  const int lane = __builtin_ctz(lanes);
  const Location from = locate(w, inst, lane, Space::Shared, detail.from.at(w, lane), sizeof(TensorMap), 64, false);
  const Location to = locate(w, inst, lane, Space::Global, detail.to.at(w, lane), sizeof(TensorMap), 64, true);
  if (from.host == nullptr || to.host == nullptr) return;
  TensorMap m;
  const bool known = read_memory(w, inst, lane, from, sizeof m, &m);
  if (!known) w.report(Kind::Uninitialised, inst, 1u << lane, "copies a tensor map of which some was never written");
  write_memory(w, inst, lane, to, sizeof m, &m, known);
}

void decode_copy_map(Decoder& d) {
  auto& detail = d.detail<CopyMapDetail>();
  d.take_one({"global"});
  d.take_one({"shared::cta"});
  d.take_one({"tensormap::generic"});
  d.ignore({"release", "acquire", "cta", "cluster", "gpu", "sys"});
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.need_args(3, 3);
  if (d.integer(d.arg(2)) != sizeof(TensorMap)) d.refuse("copies 128 bytes");
  detail.to = Pointer::decode(d, d.arg(0));
  detail.from = Pointer::decode(d, d.arg(1));
  d.inst.flow = Flow::Sync;
  d.inst.run = &run_copy_map;
}

// ---- copies of boxes

struct BoxDetail : Detail {
  int rank = 0;
  Pointer map, shared, barrier;
  std::vector<Operand> coordinates;
  Operand mask;
  bool is_load = true, multicast = false;
  BulkReduce reduce = BulkReduce::None;
};

std::string problem_of(const TensorMap& m, int rank) {
  if (m.magic != kMagic) return "the address does not hold a tensor map";
  if (m.rank_minus_1 + 1 != rank) return "the tensor map is of " + std::to_string(m.rank_minus_1 + 1) + " dimensions";
  if (m.element >= std::size(kElements)) return "elements of type " + std::to_string(m.element) + " are not supported";
  if (m.interleave) return "interleaved tensors are not supported";
  if (m.swizzle >= std::size(kSwizzleBytes)) return "swizzle mode " + std::to_string(m.swizzle) + " is not supported";
  if (m.address % 16) return "the tensor's address is no multiple of 16";
  const int bytes = bytes_of(kElements[m.element]);
  for (int i = 0; i < rank; ++i) {
    if (m.box[i] < 1 || m.box[i] > 256) return "box dimension " + std::to_string(i) + " is " + std::to_string(m.box[i]) + ", needs 1 to 256";
    if (m.size[i] < 1) return "dimension " + std::to_string(i) + " is 0";
    if (m.element_stride[i] != 1) return "element strides other than 1 are not supported";
    if (i && m.stride[i - 1] % 16) return "stride " + std::to_string(i) + " is no multiple of 16 bytes";
  }
  const int row = m.box[0] * bytes;
  if (row % 16) return "a box row of " + std::to_string(row) + " bytes, no multiple of 16";
  if (m.swizzle && row > kSwizzleBytes[m.swizzle])
    return "a box row of " + std::to_string(row) + " bytes with a swizzle of " + std::to_string(kSwizzleBytes[m.swizzle]);
  return "";
}

// What is outside of the tensor reads as zero, or as the format's NaN.
uint32_t fill_bits(const TensorMap& m) {
  if (!m.fill) return 0;
  switch (kElements[m.element]) {
    case Type::F16: return 0x7fff7fff;
    case Type::BF16: return 0x7fff7fff;
    case Type::F32: return 0x7fffffff;
    default: return 0;
  }
}

// The pieces of a box: 16 bytes each where a swizzle moves them, else whole rows, cut where the tensor ends.
std::vector<BulkPiece> pieces_of(Warp& w, const Inst& inst, int lane, const TensorMap& m, const int32_t* at, uint64_t shared,
                                 bool is_load, bool& failed) {
  const int rank = m.rank_minus_1 + 1;
  const auto bytes = static_cast<int64_t>(bytes_of(kElements[m.element]));
  const int64_t row_bytes = m.box[0] * bytes;
  const uint64_t chunks = static_cast<uint64_t>(kSwizzleBytes[m.swizzle]) / 16;
  const int64_t step = m.swizzle ? 16 : row_bytes;
  uint64_t rows = 1;
  for (int i = 1; i < rank; ++i) rows *= m.box[i];
  std::vector<BulkPiece> pieces;
  for (uint64_t row = 0; row < rows; ++row) {
    uint64_t address = m.address, rest = row;
    bool inside = true;
    for (int i = 1; i < rank; ++i) {
      const int64_t c = at[i] + static_cast<int64_t>(rest % m.box[i]);
      rest /= m.box[i];
      inside &= c >= 0 && c < static_cast<int64_t>(m.size[i]);
      address += static_cast<uint64_t>(c) * m.stride[i - 1];
    }
    for (int64_t begin = 0; begin < row_bytes; begin += step) {
      uint64_t place = shared + row * static_cast<uint64_t>(row_bytes) + static_cast<uint64_t>(begin);
      place ^= ((place >> 7) & (chunks - 1)) << 4;
      // Elements of this piece that are inside: [first, last)
      const int64_t x = at[0] + begin / bytes, count = step / bytes;
      const int64_t first = inside ? std::clamp<int64_t>(-x, 0, count) : 0;
      const int64_t last = inside ? std::clamp<int64_t>(static_cast<int64_t>(m.size[0]) - x, first, count) : 0;
      BulkPiece piece;
      piece.shared = place;
      piece.bytes = static_cast<uint64_t>(step);
      piece.first = static_cast<uint64_t>(first * bytes);
      piece.last = static_cast<uint64_t>(last * bytes);
      piece.fill = fill_bits(m);
      if (first < last) {
        piece.global = global_range(w, inst, lane, address + static_cast<uint64_t>((x + first) * bytes), piece.last - piece.first, !is_load);
        failed |= piece.global == nullptr;
      }
      pieces.push_back(piece);
    }
  }
  return pieces;
}

void run_box(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const BoxDetail&>(*inst.detail);
  w.require_defined(detail.map.base, lanes, inst, "the address of a tensor map");
  w.require_defined(detail.shared.base, lanes, inst, "an address");
  for (const Operand& c : detail.coordinates) w.require_defined(c, lanes, inst, "a coordinate");
  each_lane(lanes, [&](int lane) {
    const Location at = locate(w, inst, lane, Space::Generic, detail.map.at(w, lane), sizeof(TensorMap), 64, false);
    if (at.host == nullptr) return;
    TensorMap m;
    read_memory(w, inst, lane, at, sizeof m, &m);
    const std::string problem = problem_of(m, detail.rank);
    if (!problem.empty()) return w.report(Kind::Invalid, inst, 1u << lane, problem);
    const Location shared = locate(w, inst, lane, Space::Shared, detail.shared.at(w, lane), 16, 128, detail.is_load);
    if (shared.host == nullptr) return;
    int32_t coordinates[kMaxRank];
    for (int i = 0; i < detail.rank; ++i) coordinates[i] = w.row<int32_t>(detail.coordinates[static_cast<size_t>(i)])[lane];
    bool failed = false;
    const std::vector<BulkPiece> pieces = pieces_of(w, inst, lane, m, coordinates, shared.offset, detail.is_load, failed);
    if (failed) return;
    if (!detail.is_load) return start_bulk_store(w, inst, lane, pieces, detail.reduce, kElements[m.element]);
    const Location barrier = locate(w, inst, lane, Space::Shared, detail.barrier.at(w, lane), 8, 8, true);
    if (barrier.host == nullptr || find_barrier(w, inst, lane, barrier) == nullptr) return;
    const uint32_t mask = detail.multicast ? w.row<uint16_t>(detail.mask)[lane] : 0;
    start_bulk_load(w, inst, lane, copy_targets(w, shared.block, detail.multicast, mask), pieces, barrier.offset);
  });
}

// .2d.shared::cluster.global.tile.mbarrier [shared], [map, {coordinates}], [mbarrier] {, mask} {, policy};
// .2d.global.shared::cta.tile.bulk_group [map, {coordinates}], [shared] {, policy}
void decode_box(Decoder& d, bool reduces) {
  auto& detail = d.detail<BoxDetail>();
  detail.rank = d.take_one({"1d", "2d", "3d", "4d", "5d"}) + 1;
  detail.is_load = d.take("mbarrier::complete_tx::bytes");
  if (!detail.is_load) d.take_one({"bulk_group"});
  d.take_one({"global"});
  d.take_one({"shared::cluster", "shared::cta"});
  d.take("tile");
  detail.multicast = d.take("multicast::cluster");
  const bool hint = d.take("L2::cache_hint");
  if (reduces) {
    detail.reduce = take_reduction(d);
    if (detail.is_load || detail.reduce == BulkReduce::None) d.refuse("only reductions to global memory are supported");
  }
  const size_t count = detail.is_load ? 3u + detail.multicast + hint : 2u + hint;
  d.need_args(count, count);
  const Arg& map = d.arg(detail.is_load ? 1 : 0);
  if (map.kind != Arg::Kind::Address || map.children.size() != 2) d.refuse("needs [map, {coordinates}]");
  Arg map_address = map;
  map_address.children.resize(1);
  detail.map = Pointer::decode(d, map_address);
  const std::vector<Arg> coordinates = Decoder::elements(map.children[1]);
  if (coordinates.size() != static_cast<size_t>(detail.rank)) d.refuse("has " + std::to_string(coordinates.size()) + " coordinates");
  for (const Arg& c : coordinates) detail.coordinates.push_back(d.src(c, Type::S32));
  detail.shared = Pointer::decode(d, d.arg(detail.is_load ? 0 : 1));
  if (detail.is_load) detail.barrier = Pointer::decode(d, d.arg(2));
  if (detail.multicast) detail.mask = d.src(d.arg(3), Type::B16);
  d.inst.counted = Class::Bulk;
  d.inst.run = &run_box;
}

void do_nothing(Warp&, const Inst&, Mask) {}

void decode_prefetch(Decoder& d) {
  d.take_one({"1d", "2d", "3d", "4d", "5d"});
  d.take_one({"L2"});
  d.take_one({"global"});
  d.take("tile");
  d.take("L2::cache_hint");
  d.inst.run = &do_nothing;
}

}  // namespace

const std::vector<Opcode> kTensorMapOpcodes = {
    {"tensormap.replace", decode_replace},
    {"tensormap.cp_fenceproxy", decode_copy_map},
    {"cp.async.bulk.tensor", [](Decoder& d) { decode_box(d, false); }},
    {"cp.reduce.async.bulk.tensor", [](Decoder& d) { decode_box(d, true); }},
    {"cp.async.bulk.prefetch.tensor", decode_prefetch},
};

}  // namespace ptxemu
