// ld and st (PTX ISA, "Data Movement and Conversion Instructions": ld, ld.global.nc, st, prefetch).
#include <algorithm>

#include "../access.h"
#include "pick.h"

namespace ptxemu {
namespace {

struct MemoryDetail : Detail {
  int register_bytes = 0;
  bool is_signed = false;
  bool strong = false;  // volatile, relaxed, acquire, release
  bool releases = false;
};

// o[0] is the address, o[1..] the elements.
void run_load(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MemoryDetail&>(*inst.detail);
  const Addresses a = addresses(w, inst, inst.o[0], lanes);
  const uint64_t bytes = uint64_t{inst.size} * inst.count;
  if (inst.counted == Class::LoadGlobal) count_sectors(w, inst, lanes, a, bytes);
  if (inst.counted == Class::LoadShared) count_wavefronts(w, inst, lanes, a, bytes);
  Mask known = 0;
  uint64_t seen = 0;
  each_lane(lanes, [&](int lane) {
    alignas(32) uint8_t data[64];
    Location from = locate(w, inst, lane, inst.space, a.at[lane], bytes, bytes, false);
    if (from.host == nullptr) {
      std::fill_n(data, bytes, 0xff);
      known |= 1u << lane;  // has been reported
    } else {
      if (detail.strong) strong_acquire(w, from);
      if (read_memory(w, inst, lane, from, bytes, data, detail.strong)) known |= 1u << lane;
    }
    for (int i = 0; i < inst.count; ++i) {
      uint64_t value = 0;
      std::memcpy(&value, data + i * inst.size, inst.size);
      if (detail.is_signed && inst.size < 8) {
        const int unused = 64 - 8 * inst.size;
        value = static_cast<uint64_t>(static_cast<int64_t>(value << unused) >> unused);
      }
      seen = seen * 31 + value;
      std::memcpy(w.row<uint8_t>(inst.o[1 + i]) + lane * detail.register_bytes, &value,
                  static_cast<size_t>(detail.register_bytes));
    }
  });
  for (int i = 0; i < inst.count; ++i) w.define(inst.o[1 + i], lanes, known, inst);
  if (detail.strong) note_poll(w, inst, seen);
}

void run_store(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MemoryDetail&>(*inst.detail);
  const Addresses a = addresses(w, inst, inst.o[0], lanes);
  const uint64_t bytes = uint64_t{inst.size} * inst.count;
  if (inst.counted == Class::StoreGlobal) count_sectors(w, inst, lanes, a, bytes);
  if (inst.counted == Class::StoreShared) count_wavefronts(w, inst, lanes, a, bytes);
  Mask known = kAllLanes, global = 0;
  for (int i = 0; i < inst.count; ++i) known &= w.defined[inst.o[1 + i].row];
  each_lane(lanes, [&](int lane) {
    Location to = locate(w, inst, lane, inst.space, a.at[lane], bytes, bytes, true);
    if (to.host == nullptr) return;
    if (to.space == Space::Global) global |= 1u << lane;
    uint8_t data[64];
    for (int i = 0; i < inst.count; ++i)
      std::memcpy(data + i * inst.size,
                  w.row<uint8_t>(inst.o[1 + i]) + lane * detail.register_bytes, inst.size);
    if (detail.strong) strong_release(w, to, detail.releases);
    write_memory(w, inst, lane, to, bytes, data, known >> lane & 1, detail.strong);
  });
  if (global & ~known)
    for (int i = 0; i < inst.count; ++i)
      w.require_defined(inst.o[1 + i], global, inst, "what it stores");
}

// ---- decoding

Space take_space(Decoder& d) {
  switch (d.take_one({"global", "shared", "shared::cta", "shared::cluster", "local", "const",
                      "param", "param::entry", "param::func"},
                     9)) {
    case 0:
      return Space::Global;
    case 1:
    case 2:
      return Space::Shared;
    case 3:
      return Space::SharedCluster;
    case 4:
      return Space::Local;
    case 5:
      return Space::Const;
    case 9:
      return Space::Generic;
    default:
      return Space::Param;
  }
}

// What orders and what only hints.
void take_order(Decoder& d, MemoryDetail& detail, bool is_load) {
  const int order = is_load ? d.take_one({"acquire", "volatile", "relaxed", "cv"}, 5)
                            : d.take_one({"release", "volatile", "relaxed"}, 5);
  detail.releases = !is_load && order == 0;
  detail.strong = order != 5;
  if (d.take("mmio") && order != 2) d.refuse(".mmio is only of .relaxed");
  if (order == 0 || order == 2) d.take_one({"cta", "cluster", "gpu", "sys"});
  d.ignore({"weak", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
            "L1::no_allocate", "L2::evict_last", "L2::evict_first", "L2::evict_normal"});
  if (is_load)
    d.ignore({"ca", "cg", "cs", "lu", "nc", "L2::64B", "L2::128B", "L2::256B", "unified"});
  else
    d.ignore({"wb", "cg", "cs", "wt"});
}

void decode_access(Decoder& d, bool is_load) {
  auto& detail = d.detail<MemoryDetail>();
  d.inst.space = take_space(d);
  take_order(d, detail, is_load);
  if (!is_load && d.inst.space == Space::Const) d.refuse("constant memory is not written");
  const bool hint = d.take("L2::cache_hint");
  static constexpr uint8_t kCounts[] = {2, 4, 8, 1};
  d.inst.count = kCounts[d.take_one({"v2", "v4", "v8"}, 3)];
  const Type type = d.take_type();
  d.need_args(2 + hint, 2 + hint);
  if (hint) d.src(d.arg(2), Type::B64);
  const bool wide = bits_of(type) * d.inst.count > 128;
  if (wide && (d.inst.space != Space::Global || d.module.ast.target < 100 ||
               bits_of(type) * d.inst.count > 256))
    d.refuse("more than 128 bits");
  if (bits_of(type) < 8 || bits_of(type) > 64 ||
      (is_float(type) && type != Type::F32 && type != Type::F64))
    d.refuse(std::string("type .") + name_of(type) + " is not supported");
  d.inst.size = static_cast<uint8_t>(bytes_of(type));
  detail.is_signed = is_signed(type);
  const std::vector<Arg> values = Decoder::elements(d.arg(is_load ? 0 : 1));
  if (values.size() != d.inst.count) d.refuse("has " + std::to_string(values.size()) + " elements");
  d.inst.o[0] = d.address(d.arg(is_load ? 1 : 0));
  for (size_t i = 0; i < values.size(); ++i) {
    if (is_load && values[i].kind == Arg::Kind::Sink) continue;
    int bytes = 0;
    d.inst.o[1 + i] =
        is_load ? d.wide_dst(values[i], type, bytes) : d.wide_src(values[i], type, bytes);
    if (detail.register_bytes && bytes != detail.register_bytes)
      d.refuse("elements in registers of different widths");
    detail.register_bytes = bytes;
  }
  if (detail.register_bytes == 0) detail.register_bytes = std::max(bytes_of(type), 2);
  for (size_t i = 0; i < values.size(); ++i)  // as wide as the others
    if (is_load && values[i].kind == Arg::Kind::Sink)
      d.inst.o[1 + i] = d.scratch(detail.register_bytes);
  d.inst.run = is_load ? &run_load : &run_store;
  switch (d.inst.space) {
    case Space::Global:
      d.inst.counted = is_load ? Class::LoadGlobal : Class::StoreGlobal;
      break;
    case Space::Shared:
    case Space::SharedCluster:
      d.inst.counted = is_load ? Class::LoadShared : Class::StoreShared;
      break;
    case Space::Local:
      d.inst.counted = is_load ? Class::LoadLocal : Class::StoreLocal;
      break;
    case Space::Const:
    case Space::Param:
      d.inst.counted = Class::LoadParam;
      break;
    case Space::Generic:
      d.inst.counted = is_load ? Class::LoadGlobal : Class::StoreGlobal;
      break;
  }
  if (d.inst.space == Space::Shared || d.inst.space == Space::SharedCluster ||
      d.inst.space == Space::Generic)
    d.touches_shared(d.inst.size);
  if (!is_load && (d.inst.space == Space::Global || d.inst.space == Space::Generic))
    d.writes_global(d.inst.size * d.inst.count);
}

void do_nothing(Warp&, const Inst&, Mask) {}

void decode_prefetch(Decoder& d) {
  d.ignore(
      {"global", "L1", "L2", "tensormap", "param", "const", "L2::evict_last", "L2::evict_normal"});
  d.need_args(1, 1);
  d.inst.o[0] = d.address(d.arg(0));
  d.inst.run = &do_nothing;
}

// Cache policies are opaque, and without meaning where there is no cache.
void run_policy(Warp& w, const Inst& inst, Mask lanes) {
  auto* d = w.row<uint64_t>(inst.o[0]);
  each_lane(lanes, [&](int lane) { d[lane] = 0x14f0000000000000u; });
  w.define(inst.o[0], lanes, kAllLanes, inst);
}

void decode_createpolicy(Decoder& d) {
  d.take_one({"fractional"});
  d.take_one({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
  d.ignore({"L2::evict_first", "L2::evict_unchanged"});  // of what the fraction leaves
  if (d.take_type() != Type::B64) d.refuse("needs .b64");
  d.need_args(1, 2);
  if (d.args() == 2) d.src(d.arg(1), Type::F32);
  d.inst.o[0] = d.dst(d.arg(0), Type::B64);
  d.inst.run = &run_policy;
}

}  // namespace

const std::vector<Opcode> kMemoryOpcodes = {
    {"ld", [](Decoder& d) { decode_access(d, true); }},
    {"st", [](Decoder& d) { decode_access(d, false); }},
    {"prefetch", decode_prefetch},
    {"prefetchu", decode_prefetch},
    {"createpolicy", decode_createpolicy},
};

}  // namespace ptxemu
