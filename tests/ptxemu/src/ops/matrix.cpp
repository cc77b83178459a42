// ldmatrix, stmatrix and mma.sync (PTX ISA, "Warp Level Matrix Instructions").
#include <algorithm>

#include "../access.h"
#include "fragments.h"
#include "pick.h"
#include "tensor_core.h"

namespace ptxemu {
namespace {

// ---- ldmatrix, stmatrix: 8 x 8 tiles of 16 bits; lane 8 i + r gives the address of row r of tile
// i

struct TileDetail : Detail {
  int tiles = 1;
  bool transposed = false;
};

void check_aligned_mask(Warp& w, const Inst& inst, Mask lanes) {
  if (lanes != kAllLanes)
    w.report(
        Kind::Invalid, inst, ~lanes,
        "is executed by " + std::to_string(__builtin_popcount(lanes)) + " lanes, needs all 32");
}

void count_tiles(Warp& w, const Inst& inst, const Addresses& a, int tiles) {
  for (int t = 0; t < tiles; ++t) {
    uint8_t in_group[8] = {};  // of 16 bytes: a row takes one of the eight groups of four banks
    int most = 0;
    for (int row = 0; row < 8; ++row)
      most = std::max<int>(most, ++in_group[a.at[8 * t + row] / 16 % 8]);
    w.stats[inst.index].actual += static_cast<uint64_t>(most);
  }
  w.stats[inst.index].ideal += static_cast<uint64_t>(tiles);
}

// o[0] address, o[1..4] registers
void run_ldmatrix(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const TileDetail&>(*inst.detail);
  check_aligned_mask(w, inst, lanes);
  const Mask addressing = detail.tiles == 4 ? kAllLanes : (1u << 8 * detail.tiles) - 1;
  const Addresses a = addresses(w, inst, inst.o[0], addressing);
  count_tiles(w, inst, a, detail.tiles);
  for (int t = 0; t < detail.tiles; ++t) {
    alignas(64) uint16_t tile[8][8];
    uint32_t known_rows = 0;
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * t + row;
      const Location from = locate(w, inst, lane, Space::Shared, a.at[lane], 16, 16, false);
      if (from.host == nullptr) {
        std::memset(tile[row], 0xff, 16);
      } else if (read_memory(w, inst, lane, from, 16, tile[row])) {
        known_rows |= 1u << row;
      }
    }
    uint32_t* d = w.row<uint32_t>(inst.o[1 + t]);
    Mask known = kAllLanes;
    if (!detail.transposed) {
      std::memcpy(d, tile, sizeof tile);
      if (known_rows != 0xff)
        for (int row = 0; row < 8; ++row)
          if (!(known_rows >> row & 1)) known &= ~(0xfu << 4 * row);
    } else {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = lane % 4 * 2, column = lane / 4;
        d[lane] = tile[row][column] | static_cast<uint32_t>(tile[row + 1][column]) << 16;
        if ((known_rows >> row & 3) != 3) known &= ~(1u << lane);
      }
    }
    w.define(inst.o[1 + t], kAllLanes, known, inst);
  }
}

void run_stmatrix(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const TileDetail&>(*inst.detail);
  check_aligned_mask(w, inst, lanes);
  const Mask addressing = detail.tiles == 4 ? kAllLanes : (1u << 8 * detail.tiles) - 1;
  const Addresses a = addresses(w, inst, inst.o[0], addressing);
  count_tiles(w, inst, a, detail.tiles);
  for (int t = 0; t < detail.tiles; ++t) {
    alignas(64) uint16_t tile[8][8];
    const uint32_t* s = w.row<uint32_t>(inst.o[1 + t]);
    const Mask known = w.defined[inst.o[1 + t].row];
    uint32_t known_rows = 0xff;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        const auto value = static_cast<uint16_t>(s[lane] >> 16 * i);
        if (detail.transposed)
          tile[column + i][row] = value;
        else
          tile[row][column + i] = value;
        if (!(known >> lane & 1)) known_rows &= ~(1u << (detail.transposed ? column + i : row));
      }
    }
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * t + row;
      const Location to = locate(w, inst, lane, Space::Shared, a.at[lane], 16, 16, true);
      if (to.host) write_memory(w, inst, lane, to, 16, tile[row], known_rows >> row & 1);
    }
  }
}

void decode_tiles(Decoder& d, bool is_load) {
  auto& detail = d.detail<TileDetail>();
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.take_one({"m8n8"});
  static constexpr int kCounts[] = {1, 2, 4};
  detail.tiles = kCounts[d.take_one({"x1", "x2", "x4"})];
  detail.transposed = d.take("trans");
  d.take_one({"shared", "shared::cta"});
  if (d.take_type() != Type::B16) d.refuse("needs .b16");
  d.need_args(2, 2);
  const std::vector<Arg> registers = Decoder::elements(d.arg(is_load ? 0 : 1));
  if (registers.size() != static_cast<size_t>(detail.tiles))
    d.refuse("has " + std::to_string(registers.size()) + " registers");
  d.inst.o[0] = d.address(d.arg(is_load ? 1 : 0));
  for (size_t i = 0; i < registers.size(); ++i)
    d.inst.o[1 + i] = is_load ? d.dst(registers[i], Type::B32) : d.src(registers[i], Type::B32);
  d.inst.flow = Flow::Sync;
  d.inst.counted = is_load ? Class::Ldmatrix : Class::Stmatrix;
  d.inst.run = is_load ? &run_ldmatrix : &run_stmatrix;
}

// ---- movmatrix: a transposed tile between registers

void run_movmatrix(Warp& w, const Inst& inst, Mask lanes) {
  check_aligned_mask(w, inst, lanes);
  uint16_t tile[8][8];
  std::memcpy(tile, w.row<uint32_t>(inst.o[1]), sizeof tile);
  uint32_t* d = w.row<uint32_t>(inst.o[0]);
  for (int lane = 0; lane < kLanes; ++lane)
    d[lane] = tile[lane % 4 * 2][lane / 4] | static_cast<uint32_t>(tile[lane % 4 * 2 + 1][lane / 4])
                                                 << 16;
  const Mask source = w.defined[inst.o[1].row];
  Mask known = kAllLanes;
  if (source != kAllLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int first = lane % 4 * 8 +
                        lane / 8;  // has the element of row 2 (lane % 4), lane + 4 that of the next
      if (!(source >> first & source >> (first + 4) & 1)) known &= ~(1u << lane);
    }
  w.define(inst.o[0], kAllLanes, known, inst);
}

void decode_movmatrix(Decoder& d) {
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.take_one({"m8n8"});
  d.take_one({"trans"});
  if (d.take_type() != Type::B16) d.refuse("needs .b16");
  d.need_args(2, 2);
  d.inst.o[0] = d.dst(d.arg(0), Type::B32);
  d.inst.o[1] = d.src(d.arg(1), Type::B32);
  d.inst.flow = Flow::Sync;
  d.inst.counted = Class::Int;
  d.inst.run = &run_movmatrix;
}

// ---- mma.sync: D = A B + C with A 16 x k, B k x 8. tensor_core.h says how 16-bit floats and tf32
// add up in float32. Other sums are made in double and rounded once.

struct MmaDetail : Detail {
  Element a = Element::F16, b = Element::F16;
  int k = 16;
  bool half_result = false;  // C and D in f16
  SumRule rule{};            // where it cuts off
  bool saturate = false;     // of s32
};

constexpr int kM = 16, kN = 8, kMaxK = 32;

// A register row over the lanes is 8 rows of kBits / 32 ... ; A's registers are (rows 0-7, rows
// 8-15) for each half of k.
void read_a(Warp& w, const Operand* registers, Element e, int k, float (&a)[kM][kMaxK]) {
  const int per_row = 4 * 32 / bits_of(e);  // elements of a row that one register holds
  float tile[8 * 16];
  for (int half = 0; half * per_row < k; ++half)
    for (int upper = 0; upper < 2; ++upper) {
      to_floats(e, w.row<uint32_t>(registers[2 * half + upper]), 8 * per_row, tile);
      for (int row = 0; row < 8; ++row)
        std::copy_n(tile + row * per_row, per_row, a[8 * upper + row] + half * per_row);
    }
}

void read_b(Warp& w, const Operand* registers, Element e, int k, float (&b)[kMaxK][kN]) {
  const int per_row = 4 * 32 / bits_of(e);
  float tile[8 * 16];
  for (int half = 0; half * per_row < k; ++half) {
    to_floats(e, w.row<uint32_t>(registers[half]), 8 * per_row, tile);
    for (int i = 0; i < per_row; ++i)
      for (int column = 0; column < kN; ++column)
        b[half * per_row + i][column] = tile[column * per_row + i];
  }
}

// Four rows at a time: enough independent sums to keep the CPU's multipliers busy. Products are
// exact.
void multiply(const float (&a)[kM][kMaxK], const float (&b)[kMaxK][kN], int depth,
              double (&sum)[kM][kN]) {
  constexpr int kTogether = 4;
  for (int row = 0; row < kM; row += kTogether) {
    double part[kTogether][kN];
    std::memcpy(part, sum[row], sizeof part);
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < kTogether; ++i)
        for (int column = 0; column < kN; ++column)
          part[i][column] = std::fma(static_cast<double>(a[row + i][k]),
                                     static_cast<double>(b[k][column]), part[i][column]);
    std::memcpy(sum[row], part, sizeof part);
  }
}

// Element (m, n) of D is known if row m of A, column n of B and its element of C are; packed: two
// columns a register.
void define_result(Warp& w, const Inst& inst, const Operand* d, int d_count, const Operand* a,
                   int a_count, const Operand* b, int b_count, const Operand* c, bool packed) {
  uint32_t rows = 0xffff, columns = 0xff;
  for (int i = 0; i < a_count; ++i)
    for (int lane = 0; lane < kLanes; ++lane)
      if (!(w.defined[a[i].row] >> lane & 1)) rows &= ~(1u << (lane / 4 + 8 * (i % 2)));
  for (int i = 0; i < b_count; ++i)
    for (int lane = 0; lane < kLanes; ++lane)
      if (!(w.defined[b[i].row] >> lane & 1)) columns &= ~(1u << lane / 4);
  for (int i = 0; i < d_count; ++i) {
    Mask known = w.defined[c[i].row];
    const int upper = packed ? i : i / 2;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int column = 2 * (lane % 4) + i % 2;
      const bool column_known =
          packed ? (columns >> 2 * (lane % 4) & 3) == 3 : columns >> column & 1;
      if (!(rows >> (lane / 4 + 8 * upper) & 1) || !column_known) known &= ~(1u << lane);
    }
    w.define(d[i], kAllLanes, known, inst);
  }
}

bool all_defined(const Warp& w, const Operand* o, int count) {
  Mask known = kAllLanes;
  for (int i = 0; i < count; ++i) known &= w.defined[o[i].row];
  return known == kAllLanes;
}

// inst.more: D, A, B, C
void run_mma_float(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MmaDetail&>(*inst.detail);
  check_aligned_mask(w, inst, lanes);
  const int a_count = kM * detail.k * bits_of(detail.a) / (32 * kLanes), b_count = a_count / 2;
  const int d_count = detail.half_result ? 2 : 4;
  const Operand *d = inst.more.data(), *a = d + d_count, *b = a + a_count, *c = b + b_count;
  alignas(64) float left[kM][kMaxK], right[kMaxK][kN];
  alignas(64) double sum[kM][kN];
  read_a(w, a, detail.a, detail.k, left);
  read_b(w, b, detail.b, detail.k, right);
  for (int i = 0; i < d_count; ++i)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      if (detail.half_result) {
        const uint32_t both = w.row<uint32_t>(c[i])[lane];
        sum[row + 8 * i][column] = f16_to_float(static_cast<uint16_t>(both));
        sum[row + 8 * i][column + 1] = f16_to_float(static_cast<uint16_t>(both >> 16));
      } else {
        sum[row + 8 * (i / 2)][column + i % 2] = w.row<float>(c[i])[lane];
      }
    }
  if (detail.rule.block == 0) {
    multiply(left, right, detail.k, sum);
  } else {
    float single[kM][kN];
    std::copy_n(sum[0], kM * kN, single[0]);
    add_products(left[0], kMaxK, right[0], kN, kM, kN, detail.k, detail.rule, single[0], kN);
    std::copy_n(single[0], kM * kN, sum[0]);
  }
  const bool known = all_defined(w, a, a_count + b_count + d_count);
  for (int i = 0; i < d_count; ++i)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, column = 2 * (lane % 4);
      if (detail.half_result) {
        w.row<uint32_t>(d[i])[lane] =
            encode<F16>(sum[row + 8 * i][column]) | encode<F16>(sum[row + 8 * i][column + 1]) << 16;
      } else {
        w.row<float>(d[i])[lane] =
            as_on_gpu(static_cast<float>(sum[row + 8 * (i / 2)][column + i % 2]));
      }
    }
  if (known) {
    for (int i = 0; i < d_count; ++i) w.defined[d[i].row] = kAllLanes;
  } else {
    define_result(w, inst, d, d_count, a, a_count, b, b_count, c, detail.half_result);
  }
}

void run_mma_int(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MmaDetail&>(*inst.detail);
  check_aligned_mask(w, inst, lanes);
  const int a_count = kM * detail.k * 8 / (32 * kLanes), b_count = a_count / 2;
  const Operand *d = inst.more.data(), *a = d + 4, *b = a + a_count, *c = b + b_count;
  float left[kM][kMaxK], right[kMaxK][kN];  // bytes are exact in float
  read_a(w, a, detail.a, detail.k, left);
  read_b(w, b, detail.b, detail.k, right);
  int32_t result[4][kLanes];
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      int64_t sum = w.row<int32_t>(c[i])[lane];
      for (int k = 0; k < detail.k; ++k)
        sum += static_cast<int64_t>(left[row][k]) * static_cast<int64_t>(right[k][column]);
      if (detail.saturate) sum = std::clamp<int64_t>(sum, INT32_MIN, INT32_MAX);
      result[i][lane] = static_cast<int32_t>(sum);
    }
  const bool known = all_defined(w, a, a_count + b_count + 4);
  for (int i = 0; i < 4; ++i) std::copy_n(result[i], kLanes, w.row<int32_t>(d[i]));
  if (known) {
    for (int i = 0; i < 4; ++i) w.defined[d[i].row] = kAllLanes;
  } else {
    define_result(w, inst, d, 4, a, a_count, b, b_count, c, false);
  }
}

// f64: m8n8k4 (one element each of A and B), m16n8k4, k8, k16
void run_mma_double(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const MmaDetail&>(*inst.detail);
  check_aligned_mask(w, inst, lanes);
  const int rows = detail.saturate ? 8 : 16;  // m8 is marked so
  const int d_count = rows / 4, a_count = rows * detail.k / kLanes, b_count = detail.k / 4;
  const Operand *d = inst.more.data(), *a = d + d_count, *b = a + a_count, *c = b + b_count;
  double left[kM][16], right[16][kN], sum[kM][kN];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int row = lane / 4, column = lane % 4;
    for (int i = 0; i < a_count; ++i) {
      const int upper = rows == 16 ? i % 2 : 0, step = rows == 16 ? i / 2 : i;
      left[row + 8 * upper][column + 4 * step] = w.row<double>(a[i])[lane];
    }
    for (int i = 0; i < b_count; ++i) right[column + 4 * i][row] = w.row<double>(b[i])[lane];
    for (int i = 0; i < d_count; ++i)
      sum[row + 8 * (i / 2)][2 * column + i % 2] = w.row<double>(c[i])[lane];
  }
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < kN; ++column)
      for (int k = 0; k < detail.k; ++k)
        sum[row][column] = std::fma(left[row][k], right[k][column], sum[row][column]);
  const bool known = all_defined(w, a, a_count + b_count + d_count);
  for (int i = 0; i < d_count; ++i)
    for (int lane = 0; lane < kLanes; ++lane)
      w.row<double>(d[i])[lane] = sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  if (known) {
    for (int i = 0; i < d_count; ++i) w.defined[d[i].row] = kAllLanes;
  } else {
    define_result(w, inst, d, d_count, a, a_count, b, b_count, c, false);
  }
}

}  // namespace

Element matrix_element(Decoder& d, Type type) {
  switch (type) {
    case Type::F16:
      return Element::F16;
    case Type::BF16:
      return Element::BF16;
    case Type::TF32:
      return Element::TF32;
    case Type::E4M3:
      return Element::E4M3;
    case Type::E5M2:
      return Element::E5M2;
    case Type::S8:
      return Element::S8;
    case Type::U8:
      return Element::U8;
    case Type::F64:
      return Element::F64;
    default:
      d.refuse(std::string("matrices of .") + name_of(type) + " are not supported");
  }
}

namespace {

// ---- decoding

void decode_mma(Decoder& d) {
  auto& detail = d.detail<MmaDetail>();
  d.take_one({"aligned"});
  const int shape = d.take_one({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m8n8k4"});
  static constexpr int kDepth[] = {4, 8, 16, 32, 4};
  detail.k = kDepth[shape];
  const auto& words = d.words();
  const auto row = std::find(words.begin(), words.end(), "row");
  if (row == words.end() || row + 1 == words.end() || *(row + 1) != "col")
    d.refuse("needs .row.col");
  d.take("row");
  d.take("col");
  detail.saturate = d.take("satfinite");
  const Type result = d.take_type();
  detail.a = matrix_element(d, d.take_type());
  detail.b = matrix_element(d, d.take_type());
  if (d.take_type() != result) d.refuse("C and D of different types");
  const bool is_double = detail.a == Element::F64;
  const bool is_int = detail.a == Element::S8 || detail.a == Element::U8;
  if (shape == 4) {
    if (!is_double) d.refuse("m8n8k4 is supported for .f64");
    detail.saturate = true;
  }
  const bool same_kind =
      detail.a == detail.b || (bits_of(detail.a) == 8 && bits_of(detail.b) == 8 &&
                               is_int == (detail.b == Element::S8 || detail.b == Element::U8));
  if (!same_kind) d.refuse("A and B of these types");
  if (detail.saturate && shape != 4 && !is_int) d.refuse(".satfinite is for integers");
  if (result == Type::F16 && detail.a != Element::F16 && bits_of(detail.a) != 8)
    d.refuse("a result of .f16 is not supported");
  const int rows = shape == 4 ? 8 : 16;
  const int a_bits = bits_of(detail.a), word = is_double ? 64 : 32;
  // A 16 x k tile of which a register holds at least 8 x 4 elements of 32 bits.
  const int a_count = rows * detail.k * a_bits / (word * kLanes),
            b_count = kN * detail.k * a_bits / (word * kLanes);
  if (a_count < 1 || b_count < 1 || bits_of(detail.b) != a_bits)
    d.refuse("this shape is not of these types");
  if (!is_double && detail.k * a_bits != 128 && detail.k * a_bits != 256)
    d.refuse("this shape is not of these types");
  if (is_int      ? result != Type::S32
      : is_double ? result != Type::F64
                  : result != Type::F32 && result != Type::F16)
    d.refuse(std::string("a result of .") + name_of(result) + " is not supported");
  detail.half_result = result == Type::F16;
  if (result == Type::F32 && bits_of(detail.a) >= 16)
    detail.rule = sum_rule(detail.a, d.module.ast.target);
  const int d_count = is_double ? rows / 4 : detail.half_result ? 2 : 4;
  d.need_args(4, 4);
  const Type d_register = is_double            ? Type::F64
                          : detail.half_result ? Type::B32
                          : is_int             ? Type::B32
                                               : Type::F32;
  const Type operand = is_double ? Type::F64 : Type::B32;
  const int counts[] = {d_count, a_count, b_count, d_count};
  for (size_t i = 0; i < 4; ++i) {
    const std::vector<Arg> parts = Decoder::elements(d.arg(i));
    if (parts.size() != static_cast<size_t>(counts[i]))
      d.refuse("operand " + std::to_string(i) + " has " + std::to_string(parts.size()) +
               " registers, needs " + std::to_string(counts[i]));
    for (const Arg& part : parts)
      d.inst.more.push_back(i == 0 ? d.dst(part, d_register)
                                   : d.src(part, i == 3 ? d_register : operand));
  }
  d.inst.flow = Flow::Sync;
  d.inst.counted = Class::Mma;
  d.inst.run = is_double ? &run_mma_double : is_int ? &run_mma_int : &run_mma_float;
}

}  // namespace

const std::vector<Opcode> kMatrixOpcodes = {
    {"ldmatrix", [](Decoder& d) { decode_tiles(d, true); }},
    {"stmatrix", [](Decoder& d) { decode_tiles(d, false); }},
    {"movmatrix", decode_movmatrix},
    {"mma.sync", decode_mma},
};

}  // namespace ptxemu
