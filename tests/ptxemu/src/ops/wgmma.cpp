// wgmma: matrix products of a warpgroup (four warps), asynchronous (PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions").
//
// Each of the four warps computes 16 of the 64 rows. A product is carried out when the program waits for its group, as
// late as it may: what reads the accumulators before, changes the operands' registers or overwrites shared memory is
// seen, and gives wrong numbers too. While it is under way its registers are watched (Function::watched).
#include <algorithm>
#include <array>

#include "../access.h"
#include "async.h"
#include "fragments.h"
#include "pick.h"

namespace ptxemu {

/// Where a matrix lies in shared memory (PTX ISA, "Matrix Descriptor Format").
struct MatrixDescriptor {
  uint64_t start, leading, stride;  // bytes
  int width;                        // of the swizzle: 16 (none), 32, 64 or 128 bytes
  bool transposed;                  // the rows (M or N), not k, are contiguous

  MatrixDescriptor(uint64_t bits, bool transposed_)
      : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4),
        width(std::array<int, 4>{16, 128, 64, 32}[bits >> 62]), transposed(transposed_) {}

  /// The shared address of element (row, k), of `bytes` each. Core matrices are 8 rows of 16 bytes; with a swizzle,
  /// of `width` bytes, and the number of a 16-byte chunk is XORed with bits 7.. of its address.
  uint64_t at(uint64_t row, uint64_t k, uint64_t bytes) const {
    const auto w = static_cast<uint64_t>(width);
    uint64_t a = start;
    if (!transposed) {
      const uint64_t along = k * bytes;
      a += row / 8 * stride + row % 8 * w + (width == 16 ? along / 16 * leading + along % 16 : along);
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
  bool a_in_registers = false, scale_d_negated = false, transposed_a = false, transposed_b = false, saturate = false;
  float sign_a = 1, sign_b = 1;
  int d_count = 0;
};

/// One that was issued. The descriptors' values and scale-d are read at issue, the rest when it is carried out.
struct AsyncMatrix {
  const Inst* inst;
  Frame* frame;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool accumulate = true;
  std::vector<std::pair<uint64_t, uint64_t>> read;  // shared bytes that it reads: where, how many
};

namespace {

constexpr uint8_t kAccumulator = 1, kSource = 2, kUnfenced = 4;
constexpr int kRows = 16;  // of a warp

// inst.more: D, then A's registers if it has such; o: A's descriptor, B's descriptor, scale-d
const Operand* sources(const Inst& inst) {
  return inst.more.data() + static_cast<const WgmmaDetail&>(*inst.detail).d_count;
}

// ---- shared memory, read in rows of contiguous bytes

struct Reader {
  Warp& w;
  const Inst& inst;
  std::vector<std::pair<uint64_t, uint64_t>>* note;  // null: read without checks

  // 16 bytes: the unit that no swizzle splits.
  bool chunk(uint64_t at, void* to) {
    SharedMemory& s = *w.block->shared;
    if (at + 16 > s.size()) {
      if (note) w.report(Kind::OutOfBounds, inst, w.live, "the matrix reaches shared byte " + std::to_string(at + 15) +
                                                              ", the block has " + std::to_string(s.size()));
      std::memset(to, 0xff, 16);
      return false;
    }
    std::memcpy(to, s.bytes() + at, 16);
    if (note == nullptr) return true;
    note->emplace_back(at, 16);
    HazardInfo hazard = s.begin_async_read(w.access(inst, 0), at, 16);
    if (hazard.hazard == Hazard::None) hazard = proxy_hazard(w, s, at);
    if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, 0);
    if (!s.defined(at, 16))
      w.report(Kind::Uninitialised, inst, 1, "multiplies shared memory that was never written, at byte " + std::to_string(at));
    return true;
  }
};

int element_bytes(Element e) { return std::max(bits_of(e) / 8, 1); }

// Rows `first` to first + count of a matrix, k elements each, row after row.
void read_matrix(Reader& reader, const MatrixDescriptor& m, Element e, int first, int count, int k, uint8_t* to) {
  const int bytes = element_bytes(e), per_chunk = 16 / bytes;
  uint8_t chunk[16];
  if (!m.transposed) {
    for (int row = 0; row < count; ++row)
      for (int i = 0; i < k; i += per_chunk) {
        reader.chunk(m.at(static_cast<uint64_t>(first + row), static_cast<uint64_t>(i), static_cast<uint64_t>(bytes)), chunk);
        std::memcpy(to + (row * k + i) * bytes, chunk, 16);
      }
    return;
  }
  for (int i = 0; i < k; ++i)
    for (int row = 0; row < count; row += per_chunk) {
      reader.chunk(m.at(static_cast<uint64_t>(first + row), static_cast<uint64_t>(i), static_cast<uint64_t>(bytes)), chunk);
      for (int j = 0; j < per_chunk; ++j) std::memcpy(to + ((row + j) * k + i) * bytes, chunk + j * bytes, static_cast<size_t>(bytes));
    }
}

// ---- carrying out

void read_left(Warp& w, const AsyncMatrix& m, Reader& reader, float* left) {
  const auto& detail = static_cast<const WgmmaDetail&>(*m.inst->detail);
  const int k = detail.k;
  if (detail.a_in_registers) {
    const int per_row = k / 2;
    float tile[8 * 16];
    for (int i = 0; i < 4; ++i) {
      to_floats(detail.a, m.frame->registers + sources(*m.inst)[i].at, 8 * per_row, tile);
      for (int row = 0; row < 8; ++row)
        std::copy_n(tile + row * per_row, per_row, left + (row + 8 * (i % 2)) * k + i / 2 * per_row);
    }
    return;
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(kRows * k * element_bytes(detail.a)));
  read_matrix(reader, MatrixDescriptor(m.a_descriptor, detail.transposed_a), detail.a,
              static_cast<int>(w.index % 4) * kRows, kRows, k, bytes.data());
  to_floats(detail.a, bytes.data(), kRows * k, left);
}

template <class Sum>
void multiply(const float* left, const float* right, int n, int k, Sum* sum) {
  for (int row = 0; row < kRows; ++row)
    for (int i = 0; i < k; ++i) {
      const float a = left[row * k + i];
      for (int column = 0; column < n; ++column) {
        if constexpr (std::is_same_v<Sum, float>) sum[row * n + column] = std::fma(a, right[i * n + column], sum[row * n + column]);
        else sum[row * n + column] += static_cast<Sum>(a) * static_cast<Sum>(right[i * n + column]);
      }
    }
}

// Calls f(register, half, lane, row, column) for every element of the accumulator.
template <class F>
void each_element(const WgmmaDetail& detail, F f) {
  const int per_register = detail.result == Type::F16 ? 2 : 1;
  for (int group = 0; group < detail.n / 8; ++group)
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < kLanes; ++lane)
        f((group * 4 + i) / per_register, i % per_register, lane, lane / 4 + 8 * (i / 2), group * 8 + lane % 4 * 2 + i % 2);
}

void carry_out(Warp& w, const AsyncMatrix& m) {
  const Inst& inst = *m.inst;
  const auto& detail = static_cast<const WgmmaDetail&>(*inst.detail);
  Reader reader{w, inst, nullptr};
  std::vector<float> left(static_cast<size_t>(kRows * detail.k)), right(static_cast<size_t>(detail.n * detail.k)), b(right.size());
  read_left(w, m, reader, left.data());
  std::vector<uint8_t> bytes(static_cast<size_t>(detail.n * detail.k * element_bytes(detail.b)));
  read_matrix(reader, MatrixDescriptor(m.b_descriptor, detail.transposed_b), detail.b, 0, detail.n, detail.k, bytes.data());
  to_floats(detail.b, bytes.data(), detail.n * detail.k, b.data());
  for (int column = 0; column < detail.n; ++column)
    for (int i = 0; i < detail.k; ++i) right[static_cast<size_t>(i * detail.n + column)] = b[static_cast<size_t>(column * detail.k + i)];
  const float sign = detail.sign_a * detail.sign_b;
  for (float& v : left) v *= sign;
  const auto cell = [&](int reg, int lane) { return reinterpret_cast<uint32_t*>(m.frame->registers + inst.more[static_cast<size_t>(reg)].at) + lane; };
  if (detail.result == Type::S32) {
    std::vector<int64_t> sum(static_cast<size_t>(kRows * detail.n), 0);
    if (m.accumulate)
      each_element(detail, [&](int reg, int, int lane, int row, int column) { sum[static_cast<size_t>(row * detail.n + column)] = static_cast<int32_t>(*cell(reg, lane)); });
    multiply(left.data(), right.data(), detail.n, detail.k, sum.data());
    each_element(detail, [&](int reg, int, int lane, int row, int column) {
      int64_t v = sum[static_cast<size_t>(row * detail.n + column)];
      if (detail.saturate) v = std::clamp<int64_t>(v, INT32_MIN, INT32_MAX);
      *cell(reg, lane) = static_cast<uint32_t>(v);
    });
    return;
  }
  const bool half = detail.result == Type::F16;
  std::vector<float> sum(static_cast<size_t>(kRows * detail.n), 0.0f);
  if (m.accumulate)
    each_element(detail, [&](int reg, int part, int lane, int row, int column) {
      const uint32_t bits = *cell(reg, lane);
      sum[static_cast<size_t>(row * detail.n + column)] = half ? f16_to_float(static_cast<uint16_t>(bits >> 16 * part)) : bit_cast<float>(bits);
    });
  multiply(left.data(), right.data(), detail.n, detail.k, sum.data());
  each_element(detail, [&](int reg, int part, int lane, int row, int column) {
    const float v = sum[static_cast<size_t>(row * detail.n + column)];
    uint32_t& bits = *cell(reg, lane);
    if (half) bits = part ? (bits & 0xffff) | static_cast<uint32_t>(float_to_f16(v)) << 16 : (bits & 0xffff0000) | float_to_f16(v);
    else bits = bit_cast<uint32_t>(v);
  });
}

// ---- watching registers

void set_watch(Warp& w, const AsyncMatrix& m, bool on) {
  const auto& detail = static_cast<const WgmmaDetail&>(*m.inst->detail);
  const auto mark = [&](const Operand& o, uint8_t bit) {
    uint8_t& flags = w.watched_rows[o.row];
    flags = on ? flags | bit : flags & ~bit;
  };
  for (int i = 0; i < detail.d_count; ++i) mark(m.inst->more[static_cast<size_t>(i)], kAccumulator);
  if (detail.a_in_registers)
    for (int i = 0; i < 4; ++i) mark(sources(*m.inst)[i], kSource);
}

void finish(Warp& w, const AsyncMatrix& m) {
  carry_out(w, m);
  set_watch(w, m, false);
  for (const auto& [at, size] : m.read)
    w.block->shared->end_async_read(at, size, stamp(w.clock(), w.clock_index, 0));
}

// ---- instructions

void run_fence(Warp& w, const Inst&, Mask) {
  for (auto& [row, flags] : w.watched_rows) flags &= static_cast<uint8_t>(~kUnfenced);
}

void check_registers(Warp& w, const Inst& inst) {
  const auto& detail = static_cast<const WgmmaDetail&>(*inst.detail);
  for (size_t i = 0; i < inst.more.size(); ++i) {
    const auto found = w.watched_rows.find(inst.more[i].row);
    const uint8_t flags = found == w.watched_rows.end() ? 0 : found->second;
    const bool is_source = i >= static_cast<size_t>(detail.d_count);
    if (flags & kUnfenced) {
      w.report(Kind::AsyncUnwaited, inst, w.live, "its registers were written with no wgmma.fence since");
      found->second &= static_cast<uint8_t>(~kUnfenced);
    }
    if ((is_source && (flags & kAccumulator)) || (!is_source && (flags & kSource)))
      w.report(Kind::AsyncUnwaited, inst, w.live, "uses a register of a wgmma that is under way, not waited for");
  }
}

void run_mma(Warp& w, const Inst& inst, Mask lanes) {
  const auto& detail = static_cast<const WgmmaDetail&>(*inst.detail);
  if (lanes != kAllLanes) w.report(Kind::Invalid, inst, ~lanes, "needs all lanes of the warp");
  check_registers(w, inst);
  auto m = std::make_shared<AsyncMatrix>();
  m->inst = &inst;
  m->frame = w.frame;
  if (!detail.a_in_registers) {
    w.require_defined(inst.o[0], lanes, inst, "a matrix descriptor");
    m->a_descriptor = w.row<uint64_t>(inst.o[0])[0];
  } else {
    for (int i = 0; i < 4; ++i) w.require_defined(sources(inst)[i], lanes, inst, "a factor");
  }
  w.require_defined(inst.o[1], lanes, inst, "a matrix descriptor");
  m->b_descriptor = w.row<uint64_t>(inst.o[1])[0];
  const bool scale = w.predicate(inst.o[2]) & 1;
  m->accumulate = scale != detail.scale_d_negated;
  for (int i = 0; i < detail.d_count; ++i) {
    if (m->accumulate) w.require_defined(inst.more[static_cast<size_t>(i)], lanes, inst, "an accumulator");
    w.defined[inst.more[static_cast<size_t>(i)].row] = kAllLanes;
  }
  Reader reader{w, inst, &m->read};
  std::vector<uint8_t> bytes(static_cast<size_t>(std::max(kRows, detail.n) * detail.k * 4));
  if (!detail.a_in_registers)
    read_matrix(reader, MatrixDescriptor(m->a_descriptor, detail.transposed_a), detail.a, static_cast<int>(w.index % 4) * kRows, kRows,
                detail.k, bytes.data());
  read_matrix(reader, MatrixDescriptor(m->b_descriptor, detail.transposed_b), detail.b, 0, detail.n, detail.k, bytes.data());
  set_watch(w, *m, true);
  w.open_matrices.push_back(std::move(m));
}

void run_commit(Warp& w, const Inst&, Mask) {
  w.matrix_groups.push_back(std::move(w.open_matrices));
  w.open_matrices.clear();
}

void run_wait(Warp& w, const Inst& inst, Mask) {
  while (w.matrix_groups.size() > static_cast<size_t>(inst.imm)) {
    for (const auto& m : w.matrix_groups.front()) finish(w, *m);
    w.matrix_groups.erase(w.matrix_groups.begin());
  }
  // What is still under way keeps its registers.
  for (const auto& group : w.matrix_groups)
    for (const auto& m : group) set_watch(w, *m, true);
}

// ---- decoding

Element element_of(Decoder& d, Type type) {
  switch (type) {
    case Type::F16: return Element::F16;
    case Type::BF16: return Element::BF16;
    case Type::TF32: return Element::TF32;
    case Type::E4M3: return Element::E4M3;
    case Type::E5M2: return Element::E5M2;
    case Type::S8: return Element::S8;
    case Type::U8: return Element::U8;
    default: d.refuse(std::string("matrices of .") + name_of(type) + " are not supported");
  }
}

void decode_shape(Decoder& d, WgmmaDetail& detail) {
  const std::string shape = d.take_next();
  int used = 0;
  if (std::sscanf(shape.c_str(), "m64n%dk%d%n", &detail.n, &detail.k, &used) != 2 || used != static_cast<int>(shape.size()) ||
      detail.n < 8 || detail.n > 256 || detail.n % 8)
    d.refuse("shape ." + shape + " is not supported");
}

void decode_mma(Decoder& d) {
  auto& detail = d.detail<WgmmaDetail>();
  d.take_one({"sync"});
  d.take_one({"aligned"});
  decode_shape(d, detail);
  detail.saturate = d.take("satfinite");
  detail.result = d.take_type();
  detail.a = element_of(d, d.take_type());
  detail.b = element_of(d, d.take_type());
  const int bits = bits_of(detail.a);
  if (detail.k * bits != 256 || bits_of(detail.b) != bits) d.refuse("this shape is not of these types");
  const bool is_int = detail.a == Element::S8 || detail.a == Element::U8;
  if (is_int ? detail.result != Type::S32 : detail.result != Type::F32 && detail.result != Type::F16)
    d.refuse(std::string("a result of .") + name_of(detail.result) + " is not supported");
  detail.d_count = detail.result == Type::F16 ? detail.n / 4 : detail.n / 2;
  d.need_args(4, 8);
  const std::vector<Arg> results = Decoder::elements(d.arg(0));
  if (results.size() != static_cast<size_t>(detail.d_count)) d.refuse("has " + std::to_string(results.size()) + " accumulators, needs " + std::to_string(detail.d_count));
  for (const Arg& a : results) d.inst.more.push_back(d.dst(a, detail.result == Type::F32 ? Type::F32 : Type::B32));
  detail.a_in_registers = d.arg(1).kind == Arg::Kind::Vector;
  if (detail.a_in_registers) {
    if (d.arg(1).children.size() != 4) d.refuse("A has 4 registers");
    for (const Arg& a : d.arg(1).children) d.inst.more.push_back(d.src(a, Type::B32));
  } else {
    d.inst.o[0] = d.src(d.arg(1), Type::B64);
  }
  d.inst.o[1] = d.src(d.arg(2), Type::B64);
  d.inst.o[2] = d.predicate(d.arg(3), detail.scale_d_negated);
  size_t at = 4;
  if (!is_int) {
    if (d.args() < 6) d.refuse("needs the signs of A and B");
    detail.sign_a = d.integer(d.arg(at++)) == 1 ? 1.0f : -1.0f;
    detail.sign_b = d.integer(d.arg(at++)) == 1 ? 1.0f : -1.0f;
  }
  if (bits == 16 && !detail.a_in_registers) detail.transposed_a = d.integer(d.arg(at++)) != 0;
  if (bits == 16) detail.transposed_b = d.integer(d.arg(at++)) != 0;
  if (at != d.args()) d.refuse("has too many operands");
  d.inst.flow = Flow::Sync;
  d.inst.counted = Class::Wgmma;
  d.inst.run = &run_mma;
}

template <Handler kRun>
void decode_plain(Decoder& d) {
  d.take_one({"sync"});
  d.take_one({"aligned"});
  d.need_args(0, 1);
  if (d.args() == 1) d.inst.imm = static_cast<int64_t>(d.integer(d.arg(0)));
  d.inst.flow = Flow::Sync;
  d.inst.counted = Class::Barrier;
  d.inst.run = kRun;
}

}  // namespace

// A row that a wgmma uses is touched by another instruction.
void check_watched_registers(Warp& w, const Inst& inst) {
  for (const auto& [row, is_write] : w.frame->function->watched.at(inst.index)) {
    uint8_t& flags = w.watched_rows[row];
    if ((flags & kAccumulator) || (is_write && (flags & kSource)))
      w.report(Kind::AsyncUnwaited, inst, w.live,
               std::string(is_write ? "writes" : "reads") + " a register of a wgmma that is under way, not waited for");
    if (is_write) flags |= kUnfenced;
  }
}

const std::vector<Opcode> kWgmmaOpcodes = {{"wgmma.mma_async", decode_mma},
                                           {"wgmma.fence", decode_plain<&run_fence>},
                                           {"wgmma.commit_group", decode_plain<&run_commit>},
                                           {"wgmma.wait_group", decode_plain<&run_wait>}};

}  // namespace ptxemu
