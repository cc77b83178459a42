"""Small kernels written in PTX by hand, for the tests of what the emulator reports.

A kernel's body may use: tid, lane, warp, block (.b32, set); x, y (.b64, set: the first two arguments, pointers), n
(.b32, set: the third); own (.b32: shared address buffer + 4 tid); registers r0.. (.b32), d0.. (.b64), f0.. (.f32),
h0.. (.b16) and p0.. (predicates), not set; shared memory `buffer`. A line with the comment `// here` is where the
finding belongs, one with `// other` is the other party's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from textwrap import indent

import torch

import ptxemu
from ptxemu import Finding, Report

# x[tid] = r2
OUT = "mul.wide.u32 d0, tid, 4;\nadd.s64 d0, x, d0;\nst.global.u32 [d0], r2;\n"

_HEAD = """\
.version 8.7
.target {target}
.address_size 64
.file 1 "kernel.cu"
{module}
.visible .entry kernel(.param .u64 x_param, .param .u64 y_param, .param .u32 n_param)
{directives}
{{
  .reg .b32 tid, lane, warp, block, own, n, r<40>;
  .reg .b64 x, y, d<20>;
  .reg .f32 f<40>;
  .reg .b16 h<20>;
  .reg .pred p<10>;
  .shared .align 1024 .b8 buffer[{shared}];
  ld.param.u64 x, [x_param];
  ld.param.u64 y, [y_param];
  ld.param.u32 n, [n_param];
  cvta.to.global.u64 x, x;
  cvta.to.global.u64 y, y;
  mov.u32 tid, %tid.x;
  mov.u32 block, %ctaid.x;
  and.b32 lane, tid, 31;
  shr.u32 warp, tid, 5;
  mov.u32 own, buffer;
  mad.lo.u32 own, tid, 4, own;
{body}
  ret;
}}
"""


def ptx(
    body: str,
    *,
    shared: int = 4096,
    target: str = "sm_80",
    module: str = "",
    directives: str = "",
) -> str:
    """The module of one kernel. module: what stands before the kernel, directives: before its body."""
    return _HEAD.format(
        body=indent(body.strip("\n"), "  "),
        shared=shared,
        target=target,
        module=module,
        directives=directives,
    )


@cache
def _load(text: str) -> ptxemu.Module:
    return ptxemu.load(text)


class Result:
    """What a kernel gave: its report, its text, and the tensors x and y."""

    def __init__(self, text: str, report: Report, x: torch.Tensor, y: torch.Tensor) -> None:
        self.text, self.report, self.x, self.y = text, report, x, y

    def line(self, mark: str) -> int:
        """The number of the line with this comment."""
        lines = self.text.splitlines()
        found = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith(f"// {mark}")]
        assert len(found) == 1, f"{len(found)} lines are marked // {mark}"
        return found[0]

    def only(self, kind: str, *words: str) -> Finding:
        """The only finding, of this kind and at the marked line; its message matches these regular expressions,
        where @mark stands for the place of a marked line."""
        found = [finding for finding in self.report.findings if finding.line == self.line("here")]
        assert [f.kind for f in found] == [kind], self.report.findings
        assert self.report.findings == found
        for word in words:
            pattern = re.sub(r"@(\w+)", lambda m: f"PTX line {self.line(m[1])}\\b", word)
            assert re.search(pattern, found[0].message), found[0].message
        return found[0]

    def first(self, kind: str, *words: str) -> None:
        """The same for the first finding at the marked line, whatever else follows from it."""
        found = [finding for finding in self.report.findings if finding.line == self.line("here")]
        self.report.findings[:] = found[:1]
        self.only(kind, *words)

    def clean(self) -> Result:
        """Itself, if nothing was found."""
        self.report.check()
        return self


def run(
    body: str,
    x: ptxemu.Argument = 0,
    y: ptxemu.Argument = 0,
    n: int = 0,
    *,
    block: int = 32,
    grid: int = 1,
    seed: int = 0,
    max_instructions: int = 1_000_000,
    names: Sequence[str] = ("x", "y"),
    **options: str | int,
) -> Result:
    """Run a body; options as of ptx()."""
    text = ptx(body, **options)  # type: ignore[arg-type]
    report = _load(text).launch(
        "kernel",
        grid=grid,
        block=block,
        args=[x, y, n],
        seed=seed,
        max_instructions=max_instructions,
        names=dict(enumerate(names)),
    )
    tensors = [a.tensor if isinstance(a, ptxemu.Output) else a for a in (x, y)]
    x_, y_ = (t if isinstance(t, torch.Tensor) else torch.empty(0) for t in tensors)
    return Result(text, report, x_, y_)


def words(count: int) -> torch.Tensor:
    """Zeros, int32."""
    return torch.zeros(count, dtype=torch.int32)


def each_seed(body: str, block: int = 128) -> list[Result]:
    """The body run with several seeds on `block` threads, whose number is n."""
    return [run(body, words(block), n=block, block=block, seed=seed) for seed in range(4)]


def legal(body: str, block: int = 128) -> list[Result]:
    """The same, where nothing may be found."""
    return [result.clean() for result in each_seed(body, block)]
