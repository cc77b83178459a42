"""A function's registers are undefined again in every call, also those of which a call before wrote only a half."""

from __future__ import annotations

import numpy as np
import pytest

import ptxemu

MODULE = """
.version 8.8
.target sm_90a
.address_size 64
.func (.param .b32 result) half(.param .b32 n)
{
  .reg .pred p;
  .reg .b16 low, high, never;
  .reg .b32 value, pair;
  ld.param.b32 value, [n];
  setp.eq.u32 p, value, 0;
  @p mov.b32 {low, high}, value;
  @p mov.b32 pair, {low, never};  // in the first call only: the lower half is defined
  mov.b32 {low, high}, pair;
  cvt.u32.u16 value, low;
  st.param.b32 [result], value;
  ret;
}
.visible .entry test(.param .u64 out)
{
  .reg .pred p;
  .reg .b32 n, value;
  .reg .b64 at;
  .param .b32 argument;
  .param .b32 result;
  mov.u32 n, 0;
AGAIN:
  st.param.b32 [argument], n;
  call (result), half, (argument);
  ld.param.b32 value, [result];
  add.u32 n, n, 1;
  setp.lt.u32 p, n, CALLS;
  @p bra AGAIN;
  ld.param.u64 at, [out];
  st.global.u32 [at], value;
  ret;
}
"""


@pytest.mark.parametrize("calls, kinds", [(1, set()), (2, {"uninitialised"})])
def test_halves_of_a_call_before(calls: int, kinds: set[str]) -> None:
    module = ptxemu.load(MODULE.replace("CALLS", str(calls)))
    report = module.launch("test", 1, 1, [np.zeros(1, np.uint32)])
    assert report.kinds() == kinds
