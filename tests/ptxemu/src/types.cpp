#include "types.h"

#include <array>

namespace ptxemu {
namespace {

struct Row {
  Type type;
  const char* name;
  int bits;
  bool is_signed, is_float;
};

constexpr std::array<Row, 29> kRows = {{
    {Type::None, "", 0, false, false},         {Type::Pred, "pred", 1, false, false},
    {Type::B8, "b8", 8, false, false},         {Type::B16, "b16", 16, false, false},
    {Type::B32, "b32", 32, false, false},      {Type::B64, "b64", 64, false, false},
    {Type::B128, "b128", 128, false, false},   {Type::U8, "u8", 8, false, false},
    {Type::U16, "u16", 16, false, false},      {Type::U32, "u32", 32, false, false},
    {Type::U64, "u64", 64, false, false},      {Type::S8, "s8", 8, true, false},
    {Type::S16, "s16", 16, true, false},       {Type::S32, "s32", 32, true, false},
    {Type::S64, "s64", 64, true, false},       {Type::F16, "f16", 16, false, true},
    {Type::F32, "f32", 32, false, true},       {Type::F64, "f64", 64, false, true},
    {Type::BF16, "bf16", 16, false, true},     {Type::TF32, "tf32", 32, false, true},
    {Type::F16x2, "f16x2", 32, false, true},   {Type::BF16x2, "bf16x2", 32, false, true},
    {Type::U16x2, "u16x2", 32, false, false},  {Type::S16x2, "s16x2", 32, true, false},
    {Type::F32x2, "f32x2", 64, false, true},   {Type::E4M3, "e4m3", 8, false, true},
    {Type::E5M2, "e5m2", 8, false, true},      {Type::E4M3x2, "e4m3x2", 16, false, true},
    {Type::E5M2x2, "e5m2x2", 16, false, true},
}};

const Row& row(Type type) {
  const Row& found = kRows[static_cast<size_t>(type)];
  if (found.type != type) throw std::logic_error("the table of types is out of order");
  return found;
}

}  // namespace

int bits_of(Type type) { return row(type).bits; }
bool is_signed(Type type) { return row(type).is_signed; }
bool is_float(Type type) { return row(type).is_float; }
const char* name_of(Type type) { return row(type).name; }

Type type_named(const std::string& name) {
  for (const Row& candidate : kRows)
    if (name == candidate.name && candidate.type != Type::None) return candidate.type;
  return Type::None;
}

}  // namespace ptxemu
