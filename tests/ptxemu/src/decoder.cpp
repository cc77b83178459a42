#include "decoder.h"

#include <algorithm>
#include <cstring>

namespace ptxemu {
namespace {

constexpr int kRowAlign = 64;  // a row starts on a cache line, and vector loads of it are aligned

const std::map<std::string, SpecialKind>& special_names() {
  using K = SpecialKind;
  static const std::map<std::string, SpecialKind> kNames = {
      {"%tid.x", K::TidX},
      {"%tid.y", K::TidY},
      {"%tid.z", K::TidZ},
      {"%ntid.x", K::NtidX},
      {"%ntid.y", K::NtidY},
      {"%ntid.z", K::NtidZ},
      {"%ctaid.x", K::CtaidX},
      {"%ctaid.y", K::CtaidY},
      {"%ctaid.z", K::CtaidZ},
      {"%nctaid.x", K::NctaidX},
      {"%nctaid.y", K::NctaidY},
      {"%nctaid.z", K::NctaidZ},
      {"%laneid", K::LaneId},
      {"%warpid", K::WarpId},
      {"%nwarpid", K::NwarpId},
      {"%smid", K::SmId},
      {"%nsmid", K::NsmId},
      {"%gridid", K::GridId},
      {"%lanemask_eq", K::LanemaskEq},
      {"%lanemask_lt", K::LanemaskLt},
      {"%lanemask_le", K::LanemaskLe},
      {"%lanemask_gt", K::LanemaskGt},
      {"%lanemask_ge", K::LanemaskGe},
      {"%cluster_ctarank", K::ClusterCtaRank},
      {"%cluster_nctarank", K::ClusterNctaRank},
      {"%cluster_ctaid.x", K::ClusterCtaidX},
      {"%cluster_ctaid.y", K::ClusterCtaidY},
      {"%cluster_ctaid.z", K::ClusterCtaidZ},
      {"%cluster_nctaid.x", K::ClusterNctaidX},
      {"%cluster_nctaid.y", K::ClusterNctaidY},
      {"%cluster_nctaid.z", K::ClusterNctaidZ},
      {"%clusterid.x", K::ClusteridX},
      {"%clusterid.y", K::ClusteridY},
      {"%clusterid.z", K::ClusteridZ},
      {"%nclusterid.x", K::NclusteridX},
      {"%nclusterid.y", K::NclusteridY},
      {"%nclusterid.z", K::NclusteridZ},
      {"%dynamic_smem_size", K::DynamicSmem},
      {"%total_smem_size", K::TotalSmem}};
  return kNames;
}

}  // namespace

// ---- rows

Rows::Rows(Function& function) : function_(function) {
  for (const RegisterDecl& r : function.registers) {
    Operand place;
    place.at = static_cast<uint32_t>(function.register_bytes);
    place.row = function.rows++;
    const size_t bytes =
        r.type == Type::Pred ? sizeof(Mask) : size_t{kLanes} * std::max(bytes_of(r.type), 2);
    function.register_bytes += (bytes + kRowAlign - 1) / kRowAlign * kRowAlign;
    function.register_places.push_back(place);
  }
  function.register_rows = function.rows;
}

Operand Rows::add(int bytes_per_lane) {
  Operand place;
  place.at = static_cast<uint32_t>(function_.register_bytes + function_.constants.size());
  place.row = function_.rows++;
  const size_t bytes = (size_t{kLanes} * bytes_per_lane + kRowAlign - 1) / kRowAlign * kRowAlign;
  function_.constants.resize(function_.constants.size() + bytes);
  return place;
}

Operand Rows::constant(uint64_t bits, int size) {
  if (size < 8) bits &= (uint64_t{1} << 8 * size) - 1;
  const auto [found, is_new] = constants_.try_emplace({bits, size});
  if (is_new) {
    found->second = add(std::max(size, 2));
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(bytes(found->second) + lane * std::max(size, 2), &bits,
                  std::min(std::max(size, 2), 8));
  }
  return found->second;
}

Operand Rows::predicate(bool value) {
  const auto [found, is_new] = constants_.try_emplace({value ? kAllLanes : 0, 0});
  if (is_new) {
    found->second = add(2);
    std::memcpy(bytes(found->second), &found->first.first, sizeof(Mask));
  }
  return found->second;
}

Operand Rows::special(SpecialKind kind, int size) {
  const auto [found, is_new] = specials_.try_emplace({kind, size});
  if (is_new) {
    found->second = add(size);
    function_.specials.push_back({kind, found->second, size});
  }
  return found->second;
}

Operand Rows::local_address(uint64_t offset, int size) {
  const auto [found, is_new] = locals_.try_emplace({offset, size});
  if (is_new) {
    found->second = add(size);
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(bytes(found->second) + lane * size, &offset, static_cast<size_t>(size));
    function_.local_addresses.push_back({found->second, size});
  }
  return found->second;
}

Operand Rows::scratch(int size) { return add(std::max(size, 4)); }

// ---- modifiers

std::string Decoder::text() const {
  std::string all;
  for (const std::string& word : statement_.opcode) all += (all.empty() ? "" : ".") + word;
  return all;
}

void Decoder::refuse(const std::string& why) const {
  throw PtxError(statement_.line, text() + ": " + why);
}

void Decoder::set_modifiers(std::vector<std::string> words) { modifiers_ = std::move(words); }

bool Decoder::take(const char* modifier) {
  const auto found = std::find(modifiers_.begin(), modifiers_.end(), modifier);
  if (found == modifiers_.end()) return false;
  modifiers_.erase(found);
  return true;
}

int Decoder::take_one(std::initializer_list<const char*> modifiers, int otherwise) {
  int index = 0;
  for (const char* modifier : modifiers) {
    if (take(modifier)) return index;
    ++index;
  }
  if (otherwise < 0) {
    std::string list;
    for (const char* modifier : modifiers)
      list += std::string(list.empty() ? "." : ", .") + modifier;
    refuse("needs one of " + list);
  }
  return otherwise;
}

Type Decoder::peek_type() const {
  for (const std::string& word : modifiers_)
    if (const Type type = type_named(word); type != Type::None) return type;
  return Type::None;
}

Type Decoder::take_type() {
  for (auto word = modifiers_.begin(); word != modifiers_.end(); ++word) {
    const Type type = type_named(*word);
    if (type == Type::None) continue;
    modifiers_.erase(word);
    return type;
  }
  refuse("has too few types");
}

std::string Decoder::take_next() {
  if (modifiers_.empty()) refuse("is incomplete");
  std::string word = modifiers_.front();
  modifiers_.erase(modifiers_.begin());
  return word;
}

void Decoder::ignore(std::initializer_list<const char*> modifiers) {
  for (const char* modifier : modifiers) take(modifier);
}

void Decoder::finish() {
  if (modifiers_.empty()) return;
  std::string list;
  for (const std::string& word : modifiers_) list += (list.empty() ? "." : ", .") + word;
  refuse("modifier " + list + " is not supported");
}

// ---- operands

const Arg& Decoder::arg(size_t n) const {
  if (n >= statement_.args.size()) refuse("has too few operands");
  return statement_.args[n];
}

void Decoder::need_args(size_t least, size_t most) {
  if (args() < least || args() > most)
    refuse("has " + std::to_string(args()) + " operands, needs " + std::to_string(least) +
           (most > least ? " to " + std::to_string(most) : ""));
}

Operand Decoder::special(const Arg& a, Type type, int* bytes) {
  if (a.name == "WARP_SZ") return rows_.constant(kLanes, bytes_of(type));
  const auto found = special_names().find(a.name);
  if (found == special_names().end()) refuse("special register " + a.name + " is not supported");
  if (bits_of(type) != 32 && bits_of(type) != 64)
    refuse(a.name + " in a type of neither 32 nor 64 bits");
  if (bytes) *bytes = bytes_of(type);
  return rows_.special(found->second, bytes_of(type));
}

// The address of a variable, in its own space.
Operand Decoder::symbol(const Arg& a, Type type) {
  if (bits_of(type) != 32 && bits_of(type) != 64)
    refuse("an address in a type of neither 32 nor 64 bits");
  const auto local = function.names.find(a.name);
  const auto global = module.names.find(a.name);
  if (local != function.names.end()) {
    const Place& place = local->second;
    if (place.space == Space::Local)
      return rows_.local_address(place.address + a.offset, bytes_of(type));
    return rows_.constant(place.address + a.offset, bytes_of(type));
  }
  if (global == module.names.end()) refuse(a.name + " is not declared");
  return rows_.constant(global->second.address + a.offset, bytes_of(type));
}

bool Decoder::is_parameter(const Arg& a) const {
  const auto found = function.names.find(a.name);
  return found != function.names.end() && found->second.space == Space::Param;
}

// The address of a function's parameter is that of a copy in local memory (PTX ISA, "mov").
Operand Decoder::parameter_in_local(const Arg& a, Type type) {
  const Place& place = function.names.at(a.name);
  const auto is_same = [&](const Place& p) { return p.address == place.address; };
  if (std::none_of(function.params.begin(), function.params.end(), is_same))
    refuse("the address of " + a.name + ", which is no parameter of the function");
  auto& copies = function.parameters_in_local;
  const auto known =
      std::find_if(copies.begin(), copies.end(), [&](const auto& c) { return is_same(c.first); });
  if (known != copies.end())
    return rows_.local_address(known->second.address + a.offset, bytes_of(type));
  const Place copy{Space::Local, function.local_bytes, place.bytes};
  function.local_bytes += (place.bytes + 15) / 16 * 16;
  copies.emplace_back(place, copy);
  return rows_.local_address(copy.address + a.offset, bytes_of(type));
}

Operand Decoder::operand(const Arg& a, Type type, bool is_destination, int* bytes) {
  const int needed = std::max(bytes_of(type), 2);
  if (bytes) *bytes = needed;
  switch (a.kind) {
    case Arg::Kind::Register: {
      const Type declared = function.registers[a.reg].type;
      if ((declared == Type::Pred) != (type == Type::Pred))
        refuse(a.name + " is of type ." + name_of(declared) + ", needs ." + name_of(type));
      const int have = std::max(bytes_of(declared), 2);
      if (type != Type::Pred && (bytes ? have < bytes_of(type) : have != needed))
        refuse(a.name + " has " + std::to_string(bits_of(declared)) + " bits, ." + name_of(type) +
               " does not fit");
      if (bytes) *bytes = have;
      if (a.negated) refuse("operand !" + a.name);
      return rows_.reg(a.reg);
    }
    case Arg::Kind::Sink:
      if (!is_destination) refuse("_ as a source");
      return rows_.scratch(needed);
    default:
      break;
  }
  if (is_destination) refuse("the destination is not a register");
  switch (a.kind) {
    case Arg::Kind::Integer:
      if (type == Type::Pred) return rows_.predicate(a.bits != 0);
      if (type == Type::F32 || type == Type::F64) refuse("an integer where a float is needed");
      return rows_.constant(a.bits, needed);
    case Arg::Kind::Float32:
      if (bits_of(type) != 32)
        refuse("a 32-bit float where ." + std::string(name_of(type)) + " is needed");
      return rows_.constant(a.bits, 4);
    case Arg::Kind::Float64:
      if (bits_of(type) == 64) return rows_.constant(a.bits, 8);
      if (type == Type::F32) {
        double wide;
        std::memcpy(&wide, &a.bits, 8);
        const auto narrow = static_cast<float>(wide);
        uint32_t bits;
        std::memcpy(&bits, &narrow, 4);
        return rows_.constant(bits, 4);
      }
      refuse("a 64-bit float where ." + std::string(name_of(type)) + " is needed");
    case Arg::Kind::Special:
      return special(a, type, bytes);
    case Arg::Kind::Symbol:
      return is_parameter(a) && !function.is_entry ? parameter_in_local(a, type) : symbol(a, type);
    default:
      refuse("an operand of an unexpected form");
  }
}

Operand Decoder::dst(const Arg& a, Type type) { return operand(a, type, true, nullptr); }
Operand Decoder::src(const Arg& a, Type type) { return operand(a, type, false, nullptr); }
Operand Decoder::wide_dst(const Arg& a, Type type, int& bytes) {
  return operand(a, type, true, &bytes);
}
Operand Decoder::wide_src(const Arg& a, Type type, int& bytes) {
  return operand(a, type, false, &bytes);
}

Operand Decoder::predicate(const Arg& a, bool& negated) {
  Arg plain = a;
  negated = a.negated;
  plain.negated = false;
  return operand(plain, Type::Pred, false, nullptr);
}

Operand Decoder::plain_predicate(const Arg& a) { return operand(a, Type::Pred, false, nullptr); }

Operand Decoder::address(const Arg& a) {
  if (a.kind != Arg::Kind::Address || a.children.size() != 1) refuse("needs an address in [ ]");
  return address(a.children[0], 0);
}

Operand Decoder::address(const Arg& base, int64_t offset) {
  inst.imm = base.offset + offset;
  inst.address_is_64 = true;
  if (base.kind == Arg::Kind::Register) {
    const int bits = bits_of(function.registers[base.reg].type);
    if (bits != 32 && bits != 64)
      refuse("the address " + base.name + " has " + std::to_string(bits) + " bits");
    inst.address_is_64 = bits == 64;
    return rows_.reg(base.reg);
  }
  if (base.kind == Arg::Kind::Integer) return rows_.constant(base.bits, 8);
  if (base.kind != Arg::Kind::Symbol) refuse("an address of an unexpected form");
  Arg symbol_only = base;
  symbol_only.offset = 0;
  return symbol(symbol_only, Type::B64);
}

std::vector<Arg> Decoder::elements(const Arg& a) {
  return a.kind == Arg::Kind::Vector ? a.children : std::vector<Arg>{a};
}

uint64_t Decoder::integer(const Arg& a) const {
  if (a.kind != Arg::Kind::Integer) refuse("needs a constant");
  return a.bits;
}

int Decoder::label(const Arg& a) const {
  if (a.kind != Arg::Kind::Symbol) refuse("needs a label");
  return label(a.name, a.scope);
}

int Decoder::label(const std::string& name, int scope) const {
  for (int s = scope; s >= 0; s = ast.scope_parent[s])
    for (const Label& l : ast.labels)
      if (l.scope == s && l.name == name) return static_cast<int>(l.statement);
  refuse("label " + name + " is not declared");
}

}  // namespace ptxemu
