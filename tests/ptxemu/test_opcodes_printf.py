"""printf: what it prints for every conversion, and its result, the number of arguments it took."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu

KERNEL = """
.version 8.8
.target sm_90a
.address_size 64
.global .align 1 .b8 format[] = {{{format}}};
.global .align 1 .b8 word[] = {{{word}}};
.extern .func (.param .b32 r) vprintf (.param .b64 f, .param .b64 v);
.visible .entry test(.param .u64 out)
{{
  .local .align 8 .b8 values[64];
  .reg .b64 %at, %values, %format, %word;
  .reg .b32 %count;
  mov.u64 %values, values;
  mov.u64 %word, word;
  cvta.global.u64 %word, %word;
{stores}
  cvta.local.u64 %values, %values;
  mov.u64 %format, format;
  cvta.global.u64 %format, %format;
  {{
    .param .b64 param0;
    .param .b64 param1;
    .param .b32 retval0;
    st.param.b64 [param0], %format;
    st.param.b64 [param1], %values;
    call.uni (retval0), vprintf, (param0, param1);
    ld.param.b32 %count, [retval0];
  }}
  ld.param.u64 %at, [out];
  st.global.u32 [%at], %count;
  ret;
}}
"""


def printed(text: str, values: list[tuple[int, str]]) -> tuple[str, int]:
    """Output and result of one thread's call; values: (bytes, what is stored), each aligned to its size."""
    stores, at = [], 0
    for size, value in values:
        at = -(-at // size) * size
        stores.append(f"  st.local.b{8 * size} [%values+{at}], {value};")
        at += size
    named = {
        name: ", ".join(map(str, [*words.encode(), 0]))
        for name, words in (("format", text), ("word", "some words"))
    }
    out = np.zeros(1, np.int32)
    report = ptxemu.load(KERNEL.format(stores="\n".join(stores), **named)).launch(args=[out])
    report.check()
    return report.output, int(out[0])


def double(value: float) -> tuple[int, str]:
    return 8, f"0d{np.float64(value).view(np.uint64):016X}"


@pytest.mark.parametrize(
    ("text", "values", "expected"),
    [
        ("plain\n", [], "plain\n"),
        ("100%% of %d\n", [(4, "7")], "100% of 7\n"),
        ("%d %i %u", [(4, "-1"), (4, "-2147483648"), (4, "-1")], "-1 -2147483648 4294967295"),
        ("%lld|%llu|%ld", [(8, "-5"), (8, "-1"), (8, "4294967296")], "-5|18446744073709551615|4294967296"),
        ("%x %X %o %#x %llx", [(4, "255"), (4, "255"), (4, "8"), (4, "255"), (8, "0xabcdef0123456789")],
         "ff FF 10 0xff abcdef0123456789"),
        ("%c%c", [(4, "72"), (4, "105")], "Hi"),
        ("%f %.3f %e", [double(1.5), double(-0.0625), double(12345.678)], "1.500000 -0.062 1.234568e+04"),
        ("%g %g", [double(1e20), double(float("inf"))], "1e+20 inf"),
        ("%d %lld %d %f", [(4, "1"), (8, "2"), (4, "3"), double(4.0)], "1 2 3 4.000000"),
        ("[%s] [%12s] [%.4s]", [(8, "%word")] * 3, "[some words] [  some words] [some]"),
        ("[%5d] [%-5d] [%05d] [%+d] [% d]", [(4, "42")] * 5, "[   42] [42   ] [00042] [+42] [ 42]"),
        ("[%*d] [%*d]", [(4, "6"), (4, "42"), (4, "-6"), (4, "42")], "[    42] [42    ]"),
        ("%hd %hhu", [(4, "5"), (4, "6")], "5 6"),
        ("a" * 600 + "%d" + "b" * 600, [(4, "1")], "a" * 600 + "1" + "b" * 600),
        ("%600d", [(4, "1")], " " * 599 + "1"),
        ("%y 5%", [], "%y 5%"),
    ],
)  # fmt: skip
def test_printf(text: str, values: list[tuple[int, str]], expected: str) -> None:
    assert printed(text, values) == (expected, len(values))
