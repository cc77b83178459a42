// The tiles of attention's kernels, for each size of an element and head size: what the kernels are
// compiled with, and whoever starts them has to know.
#pragma once

namespace pyfuse::cuda {

/// Of shared memory: what all threads of a block know (sequence.cuh, Work).
constexpr int WORK_BYTES = 128;

/// attention_fwd.cu: warps of `parts` times 16 queries. plain: without options. A row's bits depend
/// on block_n, and not on parts.
struct ForwardTiles {
  static constexpr int WARPS = 4;
  int parts, block_n, row;

  constexpr ForwardTiles(int element, int d, bool plain, bool aligned)
      : parts(plain && aligned && element == 2 && d <= 128 ? 2 : 1),
        block_n(element == 2 || d <= 64 ? 64
                : d == 256              ? 16
                                        : 32),
        row(element * d) {
    if (!plain && block_n > 32) block_n = 32;
  }
  constexpr int rows() const { return 16 * parts * WARPS; }
  constexpr int bytes() const { return (rows() + 2 * block_n) * row + WORK_BYTES; }
};

/// attention_bwd_dkdv.cu: `key_warps` warps of `parts` times 16 keys; `split` times as many share
/// the columns of dk and dv. Queries come in `stages`.
struct KeyGradientTiles {
  int parts, key_warps, split, block_m, stages, row;

  constexpr KeyGradientTiles(int element, int d, bool plain)
      : parts(plain && element == 2 && d <= 64 ? 2 : 1),
        key_warps(element == 2 && (d == 96 || d == 128) ? 8
                  : element == 4 && d == 256            ? 2
                                                        : 4),
        split(d < 256        ? 1
              : element == 2 ? 2
                             : 4),
        block_m(d == 256 || (element == 4 && d > 64) ? 16 : 32),
        stages(element == 4 && d == 256 ? 1 : 2),
        row(element * d) {}
  constexpr int rows() const { return 16 * parts * key_warps; }
  constexpr int threads() const { return 32 * key_warps * split; }
  constexpr int bytes() const {
    return 2 * (rows() + stages * block_m) * row + stages * 3 * block_m * 4 + WORK_BYTES;
  }
};

/// attention_bwd_dq.cu: warps of `parts` times 16 queries.
struct QueryGradientTiles {
  int parts, warps, block_n, row;

  constexpr QueryGradientTiles(int element, int d, bool plain)
      : parts(plain && element == 2 && d <= 128 ? 2 : 1),
        warps(element == 4 && d == 256 ? 2 : 4),
        block_n(element == 4 && d == 256 ? 16 : 32),
        row(element * d) {}
  constexpr int rows() const { return 16 * parts * warps; }
  constexpr int threads() const { return 32 * warps; }
  constexpr int bytes() const { return 2 * (rows() + block_n) * row + WORK_BYTES + rows() * 12; }
};

/// attention_bwd_dmask.cu: warps of 16 queries; its sums take the place of the tiles in the end.
struct MaskGradientTiles {
  int warps, block_n, row;

  constexpr MaskGradientTiles(int element, int d)
      : warps(element == 4 && d == 256 ? 2 : 4),
        block_n(d <= 256 / element         ? 64
                : element == 4 && d == 256 ? 16
                                           : 32),
        row(element * d) {}
  constexpr int rows() const { return 16 * warps; }
  constexpr int threads() const { return 32 * warps; }
  constexpr int bytes() const {
    const int sums = rows() * (block_n + 8) * 4, tiles = 2 * (rows() + block_n) * row;
    return sums > tiles ? sums : tiles;
  }
};

}  // namespace pyfuse::cuda
