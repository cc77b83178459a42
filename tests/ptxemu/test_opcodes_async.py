"""cp.async in all its sizes, and the groups that it is waited for in (PTX ISA, "cp.async")."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu

from .opcode_case import HEAD, aligned, carry

_WAITS = {
    "all": "cp.async.wait_all;",
    "group": "cp.async.commit_group; cp.async.wait_group 0;",
    "older": "cp.async.commit_group; cp.async.commit_group; cp.async.wait_group 1;",
}
# The opcode and what follows the address in global memory; the bytes that arrive, the rest of `size` is zero.
CASES = [
    *((f"cp.async.{how}.{space}.global", str(size), size, size) for space in ("shared", "shared::cta")
      for how, size in (("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16))),
    ("cp.async.cg.shared.global.L2::128B", "16", 16, 16),
    ("cp.async.ca.shared.global.L2::64B", "8", 8, 8),
    *(("cp.async.ca.shared.global", f"{size}, {few}", size, few)
      for size, few in ((4, 0), (4, 4), (8, 3), (16, 5), (16, 12))),
    ("cp.async.cg.shared.global", "16, %v0", 16, 7),
    ("cp.async.cg.shared.global", "16, %yes", 16, 0),
    ("cp.async.ca.shared.global", "8, %no", 8, 8),
    ("cp.async.ca.shared.global", "8, !%yes", 8, 8),
    ("cp.async.cg.shared.global.L2::cache_hint", "16, %policy", 16, 16),
    ("cp.async.cg.shared.global.L2::cache_hint", "16, 9, %policy", 16, 9),
]  # fmt: skip


def ptx(op: str, rest: str, wait: str) -> str:
    return (
        HEAD.format(target="sm_90a")
        + f"""
.visible .entry test(.param .u64 in, .param .u64 out)
{{
.shared .align 16 .b8 tile[1056];
.reg .b64 %in, %out, %policy; .reg .b32 %i, %s, %v<4>; .reg .pred %yes, %no;
ld.param.u64 %in, [in]; ld.param.u64 %out, [out];
mov.u32 %i, %tid.x; mad.wide.u32 %in, %i, 16, %in; mad.wide.u32 %out, %i, 16, %out;
mov.u32 %s, tile; mad.lo.u32 %s, %i, 16, %s;
mov.u32 %v0, 7; setp.eq.u32 %yes, %i, %i; setp.ne.u32 %no, %i, %i;
createpolicy.fractional.L2::evict_first.b64 %policy;
st.shared.v4.b32 [%s+16], {{-1, -1, -1, -1}};
{op} [%s+16], [%in+32], {rest};
{wait}
ld.shared.v4.b32 {{%v0, %v1, %v2, %v3}}, [%s+16];
st.global.v4.b32 [%out], {{%v0, %v1, %v2, %v3}};
ret;
}}
"""
    )


@pytest.mark.parametrize("wait", _WAITS)
@pytest.mark.parametrize(
    ("op", "rest", "size", "few"), CASES, ids=[f"{c[0]} {c[1]}" for c in CASES]
)
def test_copy(op: str, rest: str, size: int, few: int, wait: str) -> None:
    source = np.random.default_rng(2).integers(0, 255, 66 * 16, np.uint8, endpoint=True)
    out = aligned(np.zeros((64, 16), np.uint8))
    ptxemu.load(ptx(op, rest, _WAITS[wait])).launch(block=64, args=[aligned(source), out]).check()
    wanted = np.full((64, 16), 255, np.uint8)
    wanted[:, :size] = 0
    wanted[:, :few] = source[32:].reshape(64, 16)[:, :few]
    assert out.tolist() == wanted.tolist()


carry(
    test_copy, lambda: [ptx(op, rest, wait) for op, rest, *_ in CASES for wait in _WAITS.values()]
)
