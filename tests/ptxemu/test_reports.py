"""What a report says, what it counts, and that a seed decides everything in it."""

from __future__ import annotations

import pytest
import torch

from ptxemu import EmulationError, Finding, Report
from ptxemu.checkers import run, words

COPY = """
mul.wide.u32 d0, tid, 4;
add.s64 d1, x, d0;
add.s64 d2, y, d0;
ld.global.u32 r0, [d1]; // here
st.global.u32 [d2], r0;
"""


def test_seed_decides_everything() -> None:
    """The order in which floats are summed, and what a race does."""
    sum_ = """
    add.u32 r0, tid, 1;
    cvt.rn.f32.u32 f0, r0;
    rcp.approx.f32 f0, f0;
    red.global.add.f32 [x], f0;
    """
    sums = [
        run(sum_, torch.zeros(1), block=128, grid=8, seed=seed).clean().x.item()
        for seed in (1, 1, 2, 3, 4)
    ]
    assert sums[0] == sums[1]
    assert len(set(sums)) > 1
    race = "st.shared.u32 [buffer], tid;\nld.shared.u32 r0, [buffer];"
    reports = [run(race, block=256, seed=seed).report for seed in (5, 5, 6)]
    assert reports[0].findings == reports[1].findings
    assert reports[0].findings != reports[2].findings


def test_findings_are_counted_not_repeated() -> None:
    result = run(COPY, words(28), words(32), grid=3)
    finding = result.only("out-of-bounds")
    assert finding.count == 4 * 3
    assert str(finding).endswith(f"kernel, PTX line {result.line('here')} (12 times)")


def test_report_says_what_is_wrong() -> None:
    result = run(COPY, words(31), words(30))
    report = result.report
    assert report.kinds() == {"out-of-bounds"}
    with pytest.raises(EmulationError) as caught:
        report.check()
    assert caught.value.report is report
    text = str(caught.value)
    assert text.startswith("2 findings:\nout-of-bounds: reads 4 bytes that end 4 bytes past the en")
    line = f"\n    kernel, PTX line {result.line('here')}\nout-of-bounds: writes 4 bytes"
    assert line in text
    assert run(COPY, words(32), words(32)).report.check().findings == []


def test_report_shows_twenty_findings() -> None:
    finding = Finding("race", "a message", 7, "", "kernel", 1)
    with pytest.raises(EmulationError, match=r"^25 findings:\n(.*\n)*… and 5 more$"):
        Report([finding] * 25, {}, []).check()


PRINT = """
.local .align 8 .b8 values[24];
setp.ne.u32 p0, tid, 3;
@p0 bra END;
mov.u64 d0, values;
st.local.u32 [d0], tid;
mov.u64 d1, word;
cvta.global.u64 d1, d1;
st.local.u64 [d0+8], d1;
mov.u64 d2, 0x4009000000000000; // 3.125
st.local.u64 [d0+16], d2;
cvta.local.u64 d0, d0;
mov.u64 d3, format;
cvta.global.u64 d3, d3;
{
.param .b64 a0;
.param .b64 a1;
.param .b32 count;
st.param.b64 [a0], d3;
st.param.b64 [a1], d0;
call.uni (count), vprintf, (a0, a1);
}
END:
"""


def test_printing() -> None:
    def array(name: str, text: str) -> str:
        numbers = ", ".join(map(str, text.encode() + b"\0"))
        return f".global .align 1 .b8 {name}[{len(text) + 1}] = {{{numbers}}};\n"

    module = ".extern .func (.param .b32 result) vprintf(.param .b64 format, .param .b64 values);\n"
    module += array("format", "lane %d of %s: %5.1f\n") + array("word", "warp")
    assert run(PRINT, module=module).clean().report.output == "lane 3 of warp:   3.1\n"
