"""What decoding's backends for GPUs share: into how many parts the keys of a cache are split."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from pyfuse.backends.gpu_attention import MOST_KEYS

# A share has so many keys or more: what it leaves of each row is small beside them. Where all shares are that short
# they depend on no other size: short sequences have the same bits in any batch.
LEAST = 128
# Programs that a multiprocessor works on at the same time.
PROGRAMS = 2
MULTIPROCESSORS = 132  # of a device that does not say


@lru_cache(maxsize=1024)
def splits(groups: int, keys: int, processors: int) -> int:
    """Shares of the keys of one tile of rows, from sizes alone: lengths are known only on the GPU.

    groups: tiles of rows of all heads of all sequences; keys: the cache's room for one sequence."""
    most = max(-(-keys // LEAST), 1)
    room = PROGRAMS * processors
    if groups * most <= room:
        return most
    filled = [groups * n / (-(-groups * n // room) * room) for n in range(1, min(most, room) + 1)]
    return next(n for n, part in enumerate(filled, 1) if part >= 0.85 * max(filled))


def why_not_pages(k_cache: Tensor, block_table: Tensor | None) -> str | None:
    """Why no kernel can count this cache's keys; None if one can."""
    if block_table is None:
        return None
    keys = k_cache.shape[2] * block_table.shape[1]
    if keys >= MOST_KEYS:
        return f"pages for {keys} keys of a sequence, the kernel counts to {MOST_KEYS}"
    return None
