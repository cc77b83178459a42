"""Kernels of sm_90a written in PTX by hand, for the tests of mbarriers, copies, tensor maps, clusters and wgmma.

A body may use what checkers.py's may, and: rank (.b32, set: %cluster_ctarank), bars (.b32, set: the address of eight
mbarriers), m0.. (.b64, set: the addresses of the tensor maps), c0.. (.b32) and q0.. (.b64). First is a predicate that
holds in thread 0 of each block.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from textwrap import indent

import torch

import ptxemu
from ptxemu import TensorMap
from ptxemu.checkers import Result

_HEAD = """\
.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 x_param, .param .u64 y_param, .param .u32 n_param{maps})
{{
  .reg .b32 tid, lane, warp, block, rank, own, bars, n, r<40>, c<{accumulators}>;
  .reg .b64 x, y, d<20>, m<8>, q<4>;
  .reg .b16 h<4>;
  .reg .pred first, p<10>;
  .shared .align 1024 .b8 buffer[{shared}];
  .shared .align 8 .b64 barriers[8];
  ld.param.u64 x, [x_param];
  ld.param.u64 y, [y_param];
  ld.param.u32 n, [n_param];
  cvta.to.global.u64 x, x;
  cvta.to.global.u64 y, y;
{addresses}
  mov.u32 tid, %tid.x;
  mov.u32 block, %ctaid.x;
  mov.u32 rank, %cluster_ctarank;
  and.b32 lane, tid, 31;
  shr.u32 warp, tid, 5;
  mov.u32 bars, barriers;
  mov.u32 own, buffer;
  mad.lo.u32 own, tid, 4, own;
  setp.eq.u32 first, tid, 0;
{body}
  ret;
}}
"""

BUFFER = "mov.u32 r0, buffer;\n"
FENCE = "fence.proxy.async.shared::cta;"
COMMIT, READ_ALL = "cp.async.bulk.commit_group;", "cp.async.bulk.wait_group.read 0;"
END = f"{COMMIT}\n{READ_ALL}\n"


def init(*counts: int) -> str:
    """Thread 0 initialises a barrier for each of the numbers of arrivals; then all know it."""
    lines = [
        f"@first mbarrier.init.shared::cta.b64 [bars+{8 * i}], {count};\n"
        for i, count in enumerate(counts)
    ]
    return "".join([*lines, "fence.mbarrier_init.release.cluster;\n", "bar.sync 0;\n"])


def wait(parity: int | str = 0, barrier: str = "bars") -> str:
    """Poll until the phase of this parity is over."""
    return f"""{{
    AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 p9, [{barrier}], {parity};
    @!p9 bra AGAIN;
    }}
    """


def bulk_load(bytes_: int | str, to: str = "r0", of: str = "x", mark: str = "") -> str:
    """Thread 0 loads on barrier 0."""
    opcode = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    return f"@first {opcode} [{to}], [{of}], {bytes_}, [bars];{mark}\n"


def bulk_store(bytes_: int | str, to: str = "y", of: str = "r0", mark: str = "") -> str:
    """Thread 0 stores."""
    return f"@first cp.async.bulk.global.shared::cta.bulk_group [{to}], [{of}], {bytes_};{mark}\n"


def ptx(body: str, *, maps: int = 0, shared: int = 4096, accumulators: int = 8) -> str:
    """The module of one kernel."""
    addresses = [f"  mov.b64 m{i}, map{i};\n  cvta.param.u64 m{i}, m{i};" for i in range(maps)]
    return _HEAD.format(
        maps="".join(f", .param .align 64 .b8 map{i}[128]" for i in range(maps)),
        addresses="\n".join(addresses),
        body=indent(body.strip("\n"), "  "),
        shared=shared,
        accumulators=accumulators,
    )


@cache
def load(text: str) -> ptxemu.Module:
    """The module of a text, loaded once."""
    return ptxemu.load(text)


def run(
    body: str,
    x: ptxemu.Argument = 0,
    y: ptxemu.Argument = 0,
    n: int = 0,
    *,
    maps: Sequence[TensorMap] = (),
    block: int | Sequence[int] = 32,
    grid: int | Sequence[int] = 1,
    cluster: int | Sequence[int] = 1,
    seed: int = 0,
    max_instructions: int = 1_000_000,
    **options: int,
) -> Result:
    """Run a body; options as of ptx()."""
    text = ptx(body, maps=len(maps), **options)
    report = load(text).launch(
        "kernel",
        grid=grid,
        block=block,
        args=[x, y, n, *maps],
        seed=seed,
        cluster=cluster,
        max_instructions=max_instructions,
        names={0: "x", 1: "y"},
    )
    tensors = [a.tensor if isinstance(a, ptxemu.Output) else a for a in (x, y)]
    x_, y_ = (t if isinstance(t, torch.Tensor) else torch.empty(0) for t in tensors)
    return Result(text, report, x_, y_)
