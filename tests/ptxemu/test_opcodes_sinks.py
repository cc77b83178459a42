"""Loads into `_`, into registers as wide as the elements and wider; forms for devices; hints to caches; refusals."""

from __future__ import annotations

import re

import numpy as np
import pytest

import ptxemu

THREADS = 64
KERNEL = """
.version 8.8
.target {target}
.address_size 64
.visible .entry test(.param .u64 source, .param .u64 out)
{{
  .reg .b{width} a, b;
  .reg .b32 t, lane, w0;
  .reg .b64 from, to, at, policy;
  .reg .f32 f0, f1;
  .reg .pred p;
  mov.u32 t, %tid.x;
  ld.param.u64 from, [source];
  ld.param.u64 to, [out];
  mul.wide.u32 at, t, {size};
  add.u64 from, from, at;
  add.u64 to, to, at;
  mov.b{width} a, 0;
  mov.b{width} b, 0;
{body}
  ret;
}}
"""


def text_of(body: str, size: int = 4, width: int = 32, target: str = "sm_90a") -> str:
    return KERNEL.format(body=body, size=size, width=width, target=target)


def moved(source: np.ndarray, text: str) -> np.ndarray:
    out = np.zeros_like(source)
    ptxemu.load(text).launch(block=THREADS, args=[source, out]).check()
    return out


def random_elements(count: int, bits: int) -> np.ndarray:
    return np.random.default_rng(bits).integers(0, 1 << min(bits, 63), count, f"u{bits // 8}")


@pytest.mark.parametrize(
    ("vector", "kept"),
    [("{_, a}", [1]), ("{a, _}", [0]), ("{_, a, _, b}", [1, 3]), ("{a, _, _, b}", [0, 3])],
)
@pytest.mark.parametrize(
    ("bits", "width"), [(8, 16), (8, 32), (8, 64), (16, 64), (32, 32), (32, 64)]
)
def test_sinks(vector: str, kept: list[int], bits: int, width: int) -> None:
    """What goes there changes nothing else: neither constants nor special registers."""
    count = vector.count(",") + 1
    body = f"""
    ld.global.v{count}.u{bits} {vector}, [from];
    st.global.b{bits} [to], a;
    st.global.b{bits} [to+{bits // 8}], b;
    mov.u32 lane, %laneid;
    and.b32 w0, t, 31;
    setp.ne.u32 p, lane, w0;
    @p trap;
    """
    source = random_elements(THREADS * count, bits)
    expected = np.zeros((THREADS, count), source.dtype)
    for place, element in enumerate(kept):
        expected[:, place] = source.reshape(-1, count)[:, element]
    out = moved(source, text_of(body, count * bits // 8, width))
    assert (out == expected.reshape(-1)).all()


POLICIES = (
    "L2::evict_last",
    "L2::evict_normal",
    "L2::evict_first",
    "L2::evict_unchanged",
    "L2::evict_last.L2::evict_unchanged",
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fraction", ["", ", 0.5", ", f1"])
def test_policies(policy: str, fraction: str) -> None:
    body = f"""mov.f32 f1, 1.0;
    createpolicy.fractional.{policy}.b64 policy{fraction};
    prefetch.global.L2 [from];
    prefetchu.L1 [from];
    ld.global.L1::no_allocate.L2::cache_hint.u32 a, [from], policy;
    st.global.L2::cache_hint.u32 [to], a, policy;"""
    source = random_elements(THREADS, 32)
    assert (moved(source, text_of(body)) == source).all()


def test_memory_of_devices() -> None:
    body = "ld.mmio.relaxed.sys.global.u32 a, [from];\nst.mmio.relaxed.sys.global.u32 [to], a;"
    source = random_elements(THREADS, 32)
    assert (moved(source, text_of(body)) == source).all()


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("ld.global.v2.u32 {a, at}, [from];", "different widths"),
        ("ld.global.v4.u32 {a, _, at, _}, [from];", "different widths"),
        ("ld.global.v2.u32 {_, a, _}, [from];", "3 elements"),
        ("st.global.v2.u32 [to], {_, a};", "_ as a source"),
        ("ld.mmio.global.u32 a, [from];", "only of .relaxed"),
        ("prefetch.global.L2 [from], a;", "2 operands"),
        ("prefetch.global.L3 [from];", "modifier .L3"),
        ("createpolicy.fractional.b64 policy, 1.0;", "needs one of"),
        ("createpolicy.fractional.L2::evict_last.b32 a, 1.0;", "needs .b64"),
        ("createpolicy.fractional.L2::evict_last.b64 policy, at;", "at has 64 bits"),
        ("ld.global.L2::cache_hint.u32 a, [from], b;", "b has 32 bits"),
        ("nanosleep.f32 f0;", "needs .u32"),
        ("redux.sync.min.f32 f0, f1, -1;", "needs sm_100"),
    ],
)
def test_refused(statement: str, why: str) -> None:
    text = text_of(f"  {statement} // here")
    line = next(number for number, words in enumerate(text.split("\n"), 1) if "// here" in words)
    with pytest.raises(ptxemu.PtxError, match=rf"line {line}\b.*{re.escape(why)}"):
        ptxemu.load(text)


FUNCTIONS = """
.func wide(.param .u32 index)
{
  .reg .u32 i; .reg .u64 at, base; .local .align 4 .b32 room[64];
  ld.param.u32 i, [index]; mul.wide.u32 at, i, 4; mov.u64 base, room; add.u64 at, at, base;
  st.local.u32 [at], i; ld.local.u32 i, [at];
  ret;
}
.func narrow(.param .u32 index)
{
  .reg .u32 i; .reg .u64 base; .local .align 4 .b32 room[4];
  ld.param.u32 i, [index]; mov.u64 base, room;
  st.local.u32 [base+4], i; ld.local.u32 i, [base+4];
  ret;
}
.visible .entry test()
"""


def test_functions_called_in_turns_keep_their_local_arrays() -> None:
    """The second one's is smaller; then it is the first one's turn again."""
    call = "{ .param .b32 given; st.param.b32 [given], t; call.uni FUNCTION, (given); }\n"
    body = (
        "mov.u32 w0, 0;\nAGAIN:\n"
        + call.replace("FUNCTION", "wide")
        + call.replace("FUNCTION", "narrow")
    )
    body += "add.u32 w0, w0, 1;\nsetp.lt.u32 p, w0, 3;\n@p bra AGAIN;"
    text = text_of(body).replace(
        ".visible .entry test(.param .u64 source, .param .u64 out)\n", FUNCTIONS
    )
    text = re.sub(r"  ld\.param\.u64 (from|to), .*\n", r"  mov.u64 \1, 0;\n", text)
    ptxemu.load(text).launch(block=THREADS).check()
