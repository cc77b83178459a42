// What a product of wgmma computes, and the shared memory that it reads.
#include <algorithm>

#include "async.h"
#include "wgmma.h"

namespace ptxemu {
namespace {

// ---- shared memory, read in chunks that no swizzle splits

struct Reader {
  Warp& w;
  const Inst& inst;
  std::vector<std::pair<uint64_t, uint64_t>>* note;  // null: read without checks

  void chunk(uint64_t at, void* to) {
    SharedMemory& s = *w.block->shared;
    if (at + 16 > s.size()) {
      if (note)
        w.report(Kind::OutOfBounds, inst, w.live,
                 "the matrix reaches shared byte " + std::to_string(at + 15) + ", the block has " +
                     std::to_string(s.size()));
      std::memset(to, 0xff, 16);
      return;
    }
    std::memcpy(to, s.bytes() + at, 16);
    if (note == nullptr) return;
    note->emplace_back(at, 16);
    HazardInfo hazard = s.begin_async_read(w.access(inst, 0), at, 16);
    for (uint64_t g = at; g < at + 16 && hazard.hazard == Hazard::None;
         g += static_cast<uint64_t>(s.granule()))
      hazard = proxy_hazard(w, s, g);
    if (hazard.hazard != Hazard::None) w.report_hazard(hazard, inst, 0);
    if (!s.defined(at, 16))
      w.report(Kind::Uninitialised, inst, 1,
               "multiplies shared memory that was never written, at byte " + std::to_string(at));
  }
};

int element_bytes(Element e) { return bits_of(e) / 8; }

// Rows `first` to first + count of a matrix, k elements each, row after row.
void read_matrix(Reader& reader, const MatrixDescriptor& m, Element e, int first, int count, int k,
                 uint8_t* to) {
  const int bytes = element_bytes(e), per_chunk = 16 / bytes;
  uint8_t chunk[16];
  if (!m.transposed) {
    for (int row = 0; row < count; ++row)
      for (int i = 0; i < k; i += per_chunk) {
        reader.chunk(m.at(static_cast<uint64_t>(first + row), static_cast<uint64_t>(i),
                          static_cast<uint64_t>(bytes)),
                     chunk);
        std::memcpy(to + (row * k + i) * bytes, chunk, 16);
      }
    return;
  }
  for (int i = 0; i < k; ++i)
    for (int row = 0; row < count; row += per_chunk) {
      reader.chunk(m.at(static_cast<uint64_t>(first + row), static_cast<uint64_t>(i),
                        static_cast<uint64_t>(bytes)),
                   chunk);
      for (int j = 0; j < per_chunk; ++j)
        std::memcpy(to + ((row + j) * k + i) * bytes, chunk + j * bytes,
                    static_cast<size_t>(bytes));
    }
}

// The warp's rows of A from shared memory, and all of B.
void read_a(Reader& reader, const AsyncMatrix& m, uint8_t* to) {
  const WgmmaDetail& detail = detail_of(m);
  read_matrix(reader, MatrixDescriptor(m.a_descriptor, detail.transposed_a), detail.a,
              static_cast<int>(reader.w.index % 4) * kWarpRows, kWarpRows, detail.k, to);
}

void read_b(Reader& reader, const AsyncMatrix& m, uint8_t* to) {
  const WgmmaDetail& detail = detail_of(m);
  read_matrix(reader, MatrixDescriptor(m.b_descriptor, detail.transposed_b), detail.b, 0, detail.n,
              detail.k, to);
}

// ---- the product

void read_left(const AsyncMatrix& m, Reader& reader, float* left) {
  const WgmmaDetail& detail = detail_of(m);
  const int k = detail.k;
  if (detail.a_in_registers) {
    const int per_row = k / 2;
    float tile[8 * 16];
    for (int i = 0; i < 4; ++i) {
      to_floats(detail.a, m.frame->registers + sources(*m.inst)[i].at, 8 * per_row, tile);
      for (int row = 0; row < 8; ++row)
        std::copy_n(tile + row * per_row, per_row,
                    left + (row + 8 * (i % 2)) * k + i / 2 * per_row);
    }
    return;
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(kWarpRows * k * element_bytes(detail.a)));
  read_a(reader, m, bytes.data());
  to_floats(detail.a, bytes.data(), kWarpRows * k, left);
}

// B with n side by side.
void read_right(const AsyncMatrix& m, Reader& reader, float* right) {
  const WgmmaDetail& detail = detail_of(m);
  std::vector<float> b(static_cast<size_t>(detail.n * detail.k));
  std::vector<uint8_t> bytes(b.size() * static_cast<size_t>(element_bytes(detail.b)));
  read_b(reader, m, bytes.data());
  to_floats(detail.b, bytes.data(), detail.n * detail.k, b.data());
  for (int column = 0; column < detail.n; ++column)
    for (int i = 0; i < detail.k; ++i)
      right[i * detail.n + column] = b[static_cast<size_t>(column * detail.k + i)];
}

template <class Sum>
void multiply(const float* left, const float* right, int n, int k, Sum* sum) {
  for (int row = 0; row < kWarpRows; ++row)
    for (int i = 0; i < k; ++i) {
      const float a = left[row * k + i];
      for (int column = 0; column < n; ++column) {
        if constexpr (std::is_same_v<Sum, float>)
          sum[row * n + column] = std::fma(a, right[i * n + column], sum[row * n + column]);
        else
          sum[row * n + column] += static_cast<Sum>(a) * static_cast<Sum>(right[i * n + column]);
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
        f((group * 4 + i) / per_register, i % per_register, lane, lane / 4 + 8 * (i / 2),
          group * 8 + lane % 4 * 2 + i % 2);
}

// D of type Sum, whose registers hold what load() makes of them and store() puts back.
template <class Sum, class Load, class Store>
void accumulate(const AsyncMatrix& m, const float* left, const float* right, Load load,
                Store store) {
  const WgmmaDetail& detail = detail_of(m);
  const auto cell = [&](int reg, int lane) -> uint32_t& {
    return reinterpret_cast<uint32_t*>(m.frame->registers +
                                       m.inst->more[static_cast<size_t>(reg)].at)[lane];
  };
  std::vector<Sum> sum(static_cast<size_t>(kWarpRows * detail.n), 0);
  const auto at = [&](int row, int column) -> Sum& {
    return sum[static_cast<size_t>(row * detail.n + column)];
  };
  if (m.accumulate)
    each_element(detail, [&](int reg, int half, int lane, int row, int column) {
      at(row, column) = load(cell(reg, lane), half);
    });
  if constexpr (std::is_same_v<Sum, float>) {
    if (detail.rule.block != 0)
      add_products(left, detail.k, right, detail.n, kWarpRows, detail.n, detail.k, detail.rule,
                   sum.data(), detail.n);
    else
      multiply(left, right, detail.n, detail.k, sum.data());
  } else {
    multiply(left, right, detail.n, detail.k, sum.data());
  }
  each_element(detail, [&](int reg, int half, int lane, int row, int column) {
    store(cell(reg, lane), half, at(row, column));
  });
}

}  // namespace

void begin_reading(Warp& w, AsyncMatrix& m) {
  const WgmmaDetail& detail = detail_of(m);
  Reader reader{w, *m.inst, &m.read};
  std::vector<uint8_t> bytes(static_cast<size_t>(std::max(kWarpRows, detail.n) * detail.k * 4));
  if (!detail.a_in_registers) read_a(reader, m, bytes.data());
  read_b(reader, m, bytes.data());
}

void carry_out(Warp& w, const AsyncMatrix& m) {
  const WgmmaDetail& detail = detail_of(m);
  Reader reader{w, *m.inst, nullptr};
  std::vector<float> left(static_cast<size_t>(kWarpRows * detail.k)),
      right(static_cast<size_t>(detail.n * detail.k));
  read_left(m, reader, left.data());
  read_right(m, reader, right.data());
  for (float& v : left) v *= detail.sign_a * detail.sign_b;
  if (detail.result == Type::S32) {
    accumulate<int64_t>(
        m, left.data(), right.data(), [](uint32_t bits, int) { return static_cast<int32_t>(bits); },
        [&](uint32_t& bits, int, int64_t v) {
          bits = static_cast<uint32_t>(
              detail.saturate ? std::clamp<int64_t>(v, INT32_MIN, INT32_MAX) : v);
        });
  } else if (detail.result == Type::F32) {
    accumulate<float>(
        m, left.data(), right.data(), [](uint32_t bits, int) { return bit_cast<float>(bits); },
        [](uint32_t& bits, int, float v) { bits = bit_cast<uint32_t>(v); });
  } else {
    accumulate<float>(
        m, left.data(), right.data(),
        [](uint32_t bits, int half) {
          return f16_to_float(static_cast<uint16_t>(bits >> 16 * half));
        },
        [](uint32_t& bits, int half, float v) {
          bits = (bits & 0xffff0000u >> 16 * half) | static_cast<uint32_t>(float_to_f16(v))
                                                         << 16 * half;
        });
  }
}

}  // namespace ptxemu
