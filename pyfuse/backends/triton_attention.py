"""Attention on the Triton kernels, padded and packed: the call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyfuse.backends import triton_device, triton_tune
from pyfuse.backends.gpu_attention import limits, score_factors, strides
from pyfuse.backends.gpu_attention_ops import Call as AttentionCall
from pyfuse.backends.triton_device import kernels


def write(given: AttentionCall, o: Tensor, lse: Tensor | None) -> None:
    """Write o, and lse where one is given."""
    q, k, v, cu_q, cu_k, options = given
    call = Call.of(*given[:5], **options)
    args = (
        q, k, v, o, lse, strides(q), strides(k), strides(v), strides(o), lse_strides(lse),
        call.batch, call.heads, call.group, call.m, call.n, call.scale, call.softcap, call.left, call.right,
        options["sinks"], options["alibi_slopes"], options.get("seqlens_k"), call.mask, call.mask_strides, cu_q, cu_k,
        *call.dropout,
    )  # fmt: skip
    tma = has_tma(call.arch) and call.mask is None and fits_tma(k) and fits_tma(v)
    call.launch(
        "fwd",
        kernels("flash_fwd").flash_fwd_kernel,
        args,
        q,
        lambda tiles: call.programs(call.m, call.heads, tiles.block_m),
        ("TMA", tma),
    )


class Kind(NamedTuple):
    """What kernels of all operations are compiled for."""

    d: int
    dv: int
    block_b: int
    fold: bool
    precision: str


@lru_cache(maxsize=1024)
def constants_of(kind: Kind) -> dict[str, Any]:
    """The constexpr arguments; not to be changed."""
    block = kernels("configs").block
    return {
        "D": kind.d,
        "Dv": kind.dv,
        "BLOCK_D": block(kind.d),
        "BLOCK_DV": block(kind.dv),
        "BLOCK_B": kind.block_b,
        "FOLD": kind.fold,
        "PRECISION": kind.precision,
    }


@lru_cache(maxsize=1024)
def options_of(kind: Kind, tiles: Any, *more: tuple[str, Any]) -> dict[str, Any]:
    """Those and the tiles'; not to be changed."""
    return constants_of(kind) | tiles.options | dict(more)


class Call(NamedTuple):
    """A call as the kernels of both directions take it. m and n: of all sequences together where they are packed."""

    device: triton_device.Device
    arch: triton_device.Arch
    batch: int
    heads: int
    group: int
    m: int
    n: int
    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    mask: Tensor | None
    mask_strides: tuple[int, ...] | None
    packed: bool
    dropout: triton_device.DropoutWords
    extras: bool  # a mask, dropout, softcap or ALiBi: steps between the two products
    kind: Kind

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        *,
        causal: bool,
        window: tuple[int, int] | None,
        softcap: float | None,
        scale: float,
        alibi_slopes: Tensor | None,
        dropout_p: float,
        dropout_seed: Tensor | None,
        mask: Tensor | None = None,
        **_: Any,
    ) -> Call:
        device = triton_device.of(q)
        if cu_q is None:
            batch, heads, m, d = q.shape
            groups, n, dv = v.shape[1:]
        else:
            batch = cu_q.shape[0] - 1
            m, heads, d = q.shape
            n, groups, dv = v.shape
        left, right = limits(causal, window, m + n)
        if mask is not None:
            mask = mask.expand(batch, heads, m, n)
        plain = (
            softcap is None and alibi_slopes is None and (mask is None or mask.dtype == torch.bool)
        )
        block_b = 1 if cu_q is None else min(kernels("configs").block(batch + 2), 1024)
        return cls(
            device, device.arch, batch, heads, heads // groups, m, n, *score_factors(scale, softcap), left, right,
            mask, None if mask is None else mask.stride(), cu_q is not None,
            triton_device.dropout_words(dropout_p, dropout_seed),
            not plain or mask is not None or dropout_p > 0.0,
            Kind(d, dv, block_b, plain and scale > 0.0, precision(q, device.arch)),
        )  # fmt: skip

    def launch(
        self,
        operation: str,
        kernel: Any,
        args: tuple[Any, ...],
        q: Tensor,
        programs: Callable[[Any], int],
        *more: tuple[str, Any],
    ) -> None:
        """Start the kernel with the tiles of this operation: those shipped, or the fastest ones. more: constants of it
        alone."""
        configs, kind = kernels("configs"), self.kind
        what = (operation, max(kind.d, kind.dv), q.element_size(), self.arch, self.extras)

        def start(tiles: Any) -> None:
            self.device.launch(kernel, (programs(tiles),), args, options_of(kind, tiles, *more))

        if not triton_tune.enabled:
            start(configs.shipped(*what))
            return
        alike = (str(q.dtype), *kind, *more, self.left is None, self.right is None,
                 block_of(self.m), block_of(self.n), block_of(self.batch * self.heads))  # fmt: skip
        start(triton_tune.choose(self.device, kernel, alike, configs.candidates(*what), start))

    def programs(self, rows: int, heads: int, block: int) -> int:
        """One for each block of rows of each head; the sequences of a packed batch may all end within a block."""
        if self.packed:
            return (rows // block + self.batch + 2) * heads
        return -(-rows // block) * self.batch * heads


# What the kernels are told ------------------------------------------------------------------------


def lse_strides(t: Tensor | None) -> tuple[int, ...] | None:
    """Of batch and head in [B, Hq, M] or [Hq, T]."""
    if t is None:
        return None
    return t.stride()[:2] if t.ndim == 3 else (0, t.stride(0))


def block_of(size: int) -> int:
    """Sizes of one power of 2 are tuned alike."""
    return size.bit_length()


def has_tma(arch: triton_device.Arch) -> bool:
    """Whether the GPU has a copy engine that loads whole tiles by their descriptor (Hopper and later)."""
    return isinstance(arch, int) and arch >= 90


def fits_tma(t: Tensor) -> bool:
    """Whether rows start at multiples of 16 bytes, as the copy engine needs."""
    size = t.element_size()
    return t.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in t.stride()[:-1])


def precision(t: Tensor, arch: triton_device.Arch) -> str:
    """How tensor cores multiply: float32 in the number of products that torch's own flag for matmuls asks for.

    NVIDIA's have no float32: three bfloat16 parts of each factor hold all its 24 bits (six products), two tf32 parts 22
    of them (three products). AMD's multiply float32 as it is.
    """
    if t.dtype != torch.float32 or isinstance(arch, str):
        return "ieee"
    return "tf32x3" if torch.backends.cuda.matmul.allow_tf32 else "bf16x6"
