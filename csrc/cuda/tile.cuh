// Tiles of rows in shared memory, laid out so that no access of a warp conflicts, and the ways of
// rows between them and global memory.
#pragma once

#include "primitives.cuh"

namespace pyfuse::cuda {

/// ROWS rows of D elements, one panel of columns after another. A row of a panel is 128 bytes, all
/// 32 banks, in chunks of 16; chunk c of row r lies where chunk c ^ (r mod 8) would, so that eight
/// rows of one column occupy all banks once. (The copy engine's 128-byte swizzle is the same.)
/// Where D is no multiple of that, a panel's rows are 64 bytes, two to a line of banks: c ^ (r / 2
/// mod 4).
template <typename T, int D, int ROWS>
struct Tile {
  static constexpr int ROW = D * sizeof(T) % 128 == 0 ? 128 : 64;  // bytes of a row of a panel
  static constexpr int CHUNKS = ROW / 16;
  static constexpr int PANELS = D * int(sizeof(T)) / ROW;
  static constexpr int PANEL = ROWS * ROW;  // bytes
  static constexpr int BYTES = PANELS * PANEL;
  static constexpr int ROW_CHUNKS = PANELS * CHUNKS;  // of a whole row
  static constexpr int PER_CHUNK = 16 / sizeof(T);    // elements
  static_assert(D * sizeof(T) % 64 == 0);

  /// The byte at which a chunk of a row starts.
  static DEVICE int at(int row, int chunk) {
    const int swizzle = CHUNKS == 8 ? row & 7 : row >> 1 & 3;
    return chunk / CHUNKS * PANEL + row * ROW + (((chunk % CHUNKS) ^ swizzle) << 4);
  }

  /// From at(row, chunk) with chunk < 2 the place `step` times 32 bytes further on in the same row;
  /// of `step` known when compiling, one instruction at most.
  static DEVICE uint32_t ahead(uint32_t address, int step) {
    const int per_panel = ROW / 32;
    return (address ^ (step % per_panel) * 32) + step / per_panel * PANEL;
  }
};

/// The part that one of THREADS threads has in copying a tile of rows: always the same chunk of
/// every LOADED-th row.
template <class Tile, int THREADS>
struct Copier {
  static constexpr int WHOLE = THREADS % Tile::ROW_CHUNKS == 0 ? Tile::ROW_CHUNKS : Tile::CHUNKS;
  // Chunks at a time: a row's, but of blocks large enough so few that eight rows are copied
  // together. Then all chunks of a thread are swizzled alike, and lie whole rows and panels apart.
  static constexpr int ACROSS =
      THREADS / 8 < Tile::CHUNKS || WHOLE < THREADS / 8 ? WHOLE : THREADS / 8;
  static constexpr int LOADED = THREADS / ACROSS;  // rows at a time
  static constexpr bool ALIKE = LOADED % 8 == 0 && ACROSS % Tile::CHUNKS == 0;

  static DEVICE int row() { return threadIdx.x % THREADS / ACROSS; }
  static DEVICE int chunk() { return threadIdx.x % ACROSS; }

  /// Where this thread's part of the rows from `first` on starts.
  static DEVICE const char* part(const char* first, int64_t stride) {
    return first + row() * stride + chunk() * 16;
  }

  /// Start copying ROWS rows; `from` is this thread's part of them, `stride` the bytes between
  /// rows, and `bytes` how long a row is, a multiple of 16. Of a RAGGED tile only the first
  /// `inside` rows exist, and zeros take the place of the others. What lies beyond a row's bytes is
  /// left as it is.
  template <int ROWS, bool RAGGED>
  static DEVICE void start(uint32_t tile, const char* from, int64_t stride, int bytes,
                           int inside = ROWS) {
    const uint32_t to = tile + Tile::at(row(), chunk());
#pragma unroll
    for (int i = 0; i < ROWS; i += LOADED, from += LOADED * stride) {
#pragma unroll
      for (int c = 0; c < Tile::ROW_CHUNKS; c += ACROSS) {
        if ((c + chunk()) * 16 >= bytes || (ROWS % LOADED != 0 && i + row() >= ROWS)) continue;
        const uint32_t place = ALIKE ? to + i * Tile::ROW + c / Tile::CHUNKS * Tile::PANEL
                                     : tile + Tile::at(row() + i, chunk() + c);
        if constexpr (RAGGED) {
          cp_async_or_zero(place, from + c * 16, row() + i < inside);
        } else {
          cp_async(place, from + c * 16);
        }
      }
    }
  }

  /// The same, read element by element and done when it returns, for rows that lie anywhere.
  template <typename T, int ROWS>
  static DEVICE void copy(char* tile, const char* from, int64_t stride, int elements, int inside) {
    each<ROWS>([&](int r, int c) {
      union {
        T element[Tile::PER_CHUNK];
        uint4 whole;
      };
      const auto* x = reinterpret_cast<const T*>(from + (r - row()) * stride + (c - chunk()) * 16);
      for (int j = 0; j < Tile::PER_CHUNK; ++j)
        element[j] = r < inside && c * Tile::PER_CHUNK + j < elements ? x[j] : T(0.0f);
      *reinterpret_cast<uint4*>(tile + Tile::at(r, c)) = whole;
    });
  }

  /// Zeros in the chunks beyond `elements`, which start() leaves alone.
  template <int ROWS>
  static DEVICE void clear_padding(char* tile, int elements) {
    each<ROWS>([&](int r, int c) {
      if (c * Tile::PER_CHUNK >= elements)
        *reinterpret_cast<uint4*>(tile + Tile::at(r, c)) = {0, 0, 0, 0};
    });
  }

 private:
  /// f(row, chunk) of this thread's.
  template <int ROWS, class F>
  static DEVICE void each(F f) {
    for (int r = row(); r < ROWS; r += LOADED) {
      for (int c = chunk(); c < Tile::ROW_CHUNKS; c += ACROSS) f(r, c);
    }
  }
};

/// Whether all elements of 16 bytes are finite: NaN and infinity have all bits of the exponent.
DEVICE bool all_finite(uint4 x, float) {
  const auto finite = [](uint32_t word) { return (word & 0x7f800000u) != 0x7f800000u; };
  return finite(x.x) && finite(x.y) && finite(x.z) && finite(x.w);
}
DEVICE bool all_finite(uint4 x, bf16) {
  const auto finite = [](uint32_t word) {
    return (word & 0x7f80u) != 0x7f80u && (word & 0x7f800000u) != 0x7f800000u;
  };
  return finite(x.x) && finite(x.y) && finite(x.z) && finite(x.w);
}
DEVICE bool all_finite(uint4 x, fp16) {
  const auto finite = [](uint32_t word) {
    return (word & 0x7c00u) != 0x7c00u && (word & 0x7c000000u) != 0x7c000000u;
  };
  return finite(x.x) && finite(x.y) && finite(x.z) && finite(x.w);
}

/// Which of a tile's first ROWS rows (64 at most) are not all finite, bit n for row n: a factor of
/// 0 would not stop them. Each warp looks at all.
template <typename T, class Tile, int ROWS>
DEVICE uint64_t spoilt_rows(uint32_t tile) {
  uint64_t spoilt = 0;
#pragma unroll
  for (int first = 0; first < ROWS; first += 32) {
    const int row = first + threadIdx.x % 32;
    bool bad = false;
    if (ROWS % 32 == 0 || row < ROWS) {
      for (int c = 0; c < Tile::ROW_CHUNKS; ++c)
        bad |= !all_finite(load_shared16(tile + Tile::at(row, c)), T());
    }
    spoilt |= uint64_t(__ballot_sync(~0u, bad)) << first;
  }
  return spoilt;
}

/// Write `rows` rows of a tile, of which `inside` exist, to memory: by one warp, whose rows they
/// are.
template <typename T, class Tile>
DEVICE void write_rows(const char* tile, int row0, int rows, T* to, int64_t stride, int elements,
                       int inside, bool aligned) {
  const int lane = threadIdx.x % 32;
  if (aligned) {
    for (int c = lane % Tile::CHUNKS; c * Tile::PER_CHUNK < elements; c += Tile::CHUNKS) {
      for (int r = lane / Tile::CHUNKS; r < min(rows, inside); r += 32 / Tile::CHUNKS) {
        *reinterpret_cast<uint4*>(to + r * stride + c * Tile::PER_CHUNK) =
            *reinterpret_cast<const uint4*>(tile + Tile::at(row0 + r, c));
      }
    }
    return;
  }
  for (int r = 0; r < min(rows, inside); ++r) {
    for (int d = lane; d < elements; d += 32) {
      const char* const chunk = tile + Tile::at(row0 + r, d / Tile::PER_CHUNK);
      to[r * stride + d] = reinterpret_cast<const T*>(chunk)[d % Tile::PER_CHUNK];
    }
  }
}

}  // namespace pyfuse::cuda
