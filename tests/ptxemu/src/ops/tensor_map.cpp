// Copies of boxes of tensors (PTX ISA, "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor").
#include "tensor_map.h"

#include <algorithm>

#include "async.h"
#include "pick.h"

namespace ptxemu {
namespace {

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
  if (m.rank_minus_1 + 1 != rank)
    return "the tensor map is of " + std::to_string(m.rank_minus_1 + 1) + " dimensions";
  if (m.element >= std::size(kElements))
    return "elements of type " + std::to_string(m.element) + " are not supported";
  if (m.interleave) return "interleaved tensors are not supported";
  if (m.swizzle >= std::size(kSwizzleBytes))
    return "swizzle mode " + std::to_string(m.swizzle) + " is not supported";
  if (m.address % 16) return "the tensor's address is no multiple of 16";
  const int bytes = bytes_of(kElements[m.element]);
  for (int i = 0; i < rank; ++i) {
    if (m.box[i] < 1 || m.box[i] > 256)
      return "box dimension " + std::to_string(i) + " is " + std::to_string(m.box[i]) +
             ", needs 1 to 256";
    if (m.size[i] < 1) return "dimension " + std::to_string(i) + " is 0";
    if (m.element_stride[i] != 1) return "element strides other than 1 are not supported";
    if (i && m.stride[i - 1] % 16)
      return "stride " + std::to_string(i) + " is no multiple of 16 bytes";
  }
  const int row = m.box[0] * bytes;
  if (row % 16) return "a box row of " + std::to_string(row) + " bytes, no multiple of 16";
  if (m.swizzle && row != kSwizzleBytes[m.swizzle])
    return "a box row of " + std::to_string(row) + " bytes with a swizzle of " +
           std::to_string(kSwizzleBytes[m.swizzle]) +
           (row < kSwizzleBytes[m.swizzle] ? " is not supported" : "");
  if (m.fill > 1 || (m.fill && !is_float(kElements[m.element])))
    return "a fill of NaN in a tensor of integers";
  return "";
}

// What is outside of the tensor reads as zero, or as the format's NaN.
uint32_t fill_bits(const TensorMap& m) {
  if (!m.fill) return 0;
  switch (kElements[m.element]) {
    case Type::F16:
      return 0x7fff7fff;
    case Type::BF16:
      return 0x7fff7fff;
    case Type::F32:
    case Type::F64:
      return 0x7fffffff;
    default:
      return 0;
  }
}

// The pieces of a box: 16 bytes each where a swizzle moves them, else whole rows, cut where the
// tensor ends.
std::vector<BulkPiece> pieces_of(Warp& w, const Inst& inst, int lane, const TensorMap& m,
                                 const int32_t* at, uint64_t shared, bool is_load, bool& failed) {
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
      uint64_t place =
          shared + row * static_cast<uint64_t>(row_bytes) + static_cast<uint64_t>(begin);
      place ^= ((place >> 7) & (chunks - 1)) << 4;
      // Elements of this piece that are inside: [first, last)
      const int64_t x = at[0] + begin / bytes, count = step / bytes;
      const int64_t first = inside ? std::clamp<int64_t>(-x, 0, count) : 0;
      const int64_t last =
          inside ? std::clamp<int64_t>(static_cast<int64_t>(m.size[0]) - x, first, count) : 0;
      BulkPiece piece;
      piece.shared = place;
      piece.bytes = static_cast<uint64_t>(step);
      piece.first = static_cast<uint64_t>(first * bytes);
      piece.last = static_cast<uint64_t>(last * bytes);
      piece.fill = fill_bits(m);
      if (first < last) {
        piece.global =
            global_range(w, inst, lane, address + static_cast<uint64_t>((x + first) * bytes),
                         piece.last - piece.first, !is_load);
        failed |= piece.global == nullptr;
      }
      pieces.push_back(piece);
    }
  }
  return pieces;
}

// The types that bits are reduced as.
Type bits_type(BulkReduce op, Type type) {
  if (op < BulkReduce::And || is_float(type)) return type;
  return bits_of(type) == 32 ? Type::B32 : bits_of(type) == 64 ? Type::B64 : type;
}

// Why the map cannot be used so; empty if it can.
std::string problem_of(Warp& w, const Inst& inst, int lane, const BoxDetail& detail,
                       const Location& at) {
  if (at.space == Space::Shared || at.space == Space::Local)
    return "a tensor map is in global, constant or parameter memory";
  TensorMap m;
  if (!read_memory(w, inst, lane, at, sizeof m, &m))
    return "some of the tensor map was never written";
  const std::string problem = problem_of(m, detail.rank);
  if (!problem.empty() || detail.reduce == BulkReduce::None) return problem;
  const Type type = kElements[m.element];
  if (type == Type::F64 || !can_reduce(detail.reduce, bits_type(detail.reduce, type)))
    return std::string("elements of type ") + name_of(type) + " do not have this reduction";
  return "";
}

void run_box(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const BoxDetail&>(*inst.detail);
  w.require_defined(detail.map.base, lanes, inst, "the address of a tensor map");
  w.require_defined(detail.shared.base, lanes, inst, "an address");
  for (const Operand& c : detail.coordinates) w.require_defined(c, lanes, inst, "a coordinate");
  each_lane(lanes, [&](int lane) {
    const Location at =
        locate(w, inst, lane, Space::Generic, detail.map.at(w, lane), sizeof(TensorMap), 64, false);
    if (at.host == nullptr) return;
    const std::string problem = problem_of(w, inst, lane, detail, at);
    if (!problem.empty()) return w.report(Kind::Invalid, inst, 1u << lane, problem);
    TensorMap m;
    std::memcpy(&m, at.host, sizeof m);
    const Location shared = locate(w, inst, lane, Space::SharedCluster, detail.shared.at(w, lane),
                                   16, 128, detail.is_load);
    if (shared.host == nullptr) return;
    int32_t coordinates[kMaxRank];
    for (int i = 0; i < detail.rank; ++i)
      coordinates[i] = w.row<int32_t>(detail.coordinates[static_cast<size_t>(i)])[lane];
    bool failed = false;
    const std::vector<BulkPiece> pieces =
        pieces_of(w, inst, lane, m, coordinates, shared.offset, detail.is_load, failed);
    if (failed) return;
    if (!detail.is_load)
      return start_bulk_store(w, inst, lane, shared, pieces, detail.reduce, kElements[m.element]);
    const Location barrier =
        locate(w, inst, lane, Space::SharedCluster, detail.barrier.at(w, lane), 8, 8, true);
    if (barrier.host == nullptr) return;
    const uint16_t* mask = detail.multicast ? w.row<uint16_t>(detail.mask) + lane : nullptr;
    start_bulk_load(w, inst, lane, copy_targets(w, inst, lane, shared, barrier, mask), pieces,
                    barrier.offset);
  });
}

// .2d.shared::cluster.global.tile.mbarrier [shared], [map, {coordinates}], [mbarrier] {, mask} {,
// policy}; .2d.global.shared::cta.tile.bulk_group [map, {coordinates}], [shared] {, policy}
void decode_box(Decoder& d, bool reduces) {
  auto& detail = d.detail<BoxDetail>();
  detail.rank = d.take_one({"1d", "2d", "3d", "4d", "5d"}) + 1;
  detail.is_load = d.take("mbarrier::complete_tx::bytes");
  if (!detail.is_load) d.take_one({"bulk_group"});
  d.take_one({"global"});
  const bool to_cluster = d.take_one({"shared::cta", "shared::cluster"}) == 1;
  if (to_cluster && !detail.is_load) d.refuse("copies from the block's own shared memory only");
  d.take("tile");
  detail.multicast = detail.is_load && d.take("multicast::cluster");
  const bool hint = d.take("L2::cache_hint");
  if (reduces) {
    detail.reduce = take_reduction(d);
    if (detail.is_load) d.refuse("only reductions to global memory are supported");
  }
  const size_t count = detail.is_load ? 3u + detail.multicast + hint : 2u + hint;
  d.need_args(count, count);
  const Arg& map = d.arg(detail.is_load ? 1 : 0);
  if (map.kind != Arg::Kind::Address || map.children.size() != 2)
    d.refuse("needs [map, {coordinates}]");
  Arg map_address = map;
  map_address.children.resize(1);
  detail.map = Pointer::decode(d, map_address);
  if (map.children[1].kind != Arg::Kind::Vector) d.refuse("needs [map, {coordinates}]");
  const std::vector<Arg>& coordinates = map.children[1].children;
  if (coordinates.size() != static_cast<size_t>(detail.rank))
    d.refuse("has " + std::to_string(coordinates.size()) + " coordinates");
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
