"""wgmma: registers that are touched before the product has been waited for, and fences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptxemu.gmma_kernel import (
    ARRIVE,
    BODY,
    COMMIT,
    OPERANDS,
    OUT,
    clean,
    each_seed,
    fails,
    mma,
    wait_group,
    zero,
)

UNDER_WAY = "a register of a wgmma that is under way, not waited for"
NO_FENCE = "its registers were written with no wgmma.fence since"
LEFT = "{r20, r21, r22, r23}"
SET_LEFT = "".join(f"mov.b32 r{i}, 0x3f803f80;\n" for i in range(20, 24))
MARKED = BODY.replace(mma(), mma(mark="here"))


def read(register: str = "c0") -> str:
    """A store of an accumulator where the finding belongs."""
    return OUT.replace("c0;", f"{register}; // here")


def test_waited_for() -> None:
    clean(BODY)
    clean(BODY.replace(COMMIT, COMMIT * 3))
    clean(BODY.replace(wait_group(), wait_group(0) + wait_group(1)))


@pytest.mark.parametrize(
    "end", ["", COMMIT, wait_group(), COMMIT + wait_group(1), wait_group() + COMMIT]
)
def test_accumulators_are_read_before_the_wait(end: str) -> None:
    """What is read is not the result, either."""
    body = OPERANDS + zero() + ARRIVE + mma() + end + read()
    fails(body, f"reads {UNDER_WAY}")
    for result in each_seed(body):
        assert not np.isclose(result.x.view(torch.float32).numpy(), 16).any()


def test_accumulators_are_written_before_the_wait() -> None:
    fails(
        BODY.replace(wait_group(), "add.u32 c1, tid, 1; // here\n" + wait_group()),
        f"writes {UNDER_WAY}",
    )


def test_groups_are_waited_for_in_their_order() -> None:
    """wait_group 1 leaves the last one."""
    two = OPERANDS + zero() + zero(4) + ARRIVE + mma() + COMMIT + mma(4) + COMMIT
    clean(two + wait_group(1) + OUT + wait_group())
    clean(two + wait_group() + OUT.replace("c0", "c4"))
    fails(two + wait_group(1) + read("c4"), f"reads {UNDER_WAY}")
    for register in ("c0", "c4"):
        fails(two + wait_group(2) + read(register), f"reads {UNDER_WAY}")


def test_chains_on_one_accumulator() -> None:
    """Products on the same accumulators keep their order, in one group and in several."""
    chain = OPERANDS + zero() + ARRIVE + mma() * 3 + COMMIT + mma() * 2
    clean(chain + COMMIT + wait_group() + OUT, 80.0)
    for end in (COMMIT + wait_group(1), wait_group()):  # the last two are not waited for
        fails(chain + end + read(), f"reads {UNDER_WAY}")


def test_first_product_needs_no_accumulators() -> None:
    end = mma() + COMMIT + wait_group() + OUT
    clean(OPERANDS + ARRIVE + mma(scale="0") + end, 32.0)
    undefined = OPERANDS + ARRIVE + mma(mark="here") + end
    fails(undefined, "uses an undefined value as an accumulator", kind="uninitialised")


# ---- wgmma.fence


def test_missing_fence() -> None:
    fails(MARKED.replace(ARRIVE, ""), "there was no wgmma.fence before the first wgmma")
    fails(MARKED.replace(ARRIVE, "").replace(zero(), ARRIVE + zero()), NO_FENCE)
    again = "add.u32 c2, c2, 0;\n" + ARRIVE + mma(mark="here") + COMMIT + wait_group() + OUT
    body = BODY.replace(OUT, "") + again
    clean(body, 32.0)
    fails(BODY.replace(OUT, "") + again.replace(ARRIVE, ""), NO_FENCE)


def test_copies_may_come_after_the_fence() -> None:
    """As compilers write them: the assembler makes one register of both."""
    copy = "mov.b32 c5, c1;\nmov.b32 c1, c5;\n"
    clean(BODY.replace(ARRIVE, ARRIVE + copy))


def test_registers_of_a() -> None:
    body = BODY.replace(zero(), zero() + SET_LEFT).replace(mma(), mma(a=LEFT, mark="mma"))
    clean(body)
    write = "add.u32 r21, n, 0;"
    clean(body.replace(wait_group(), wait_group() + write + "\n"))
    fails(body.replace(COMMIT, f"{write} // here\n{COMMIT}"), f"writes {UNDER_WAY}")
    fails(body.replace(ARRIVE, f"{ARRIVE}{write}\n").replace("// mma", "// here"), NO_FENCE)
    # An accumulator that is under way is no left operand of the next product.
    chain = mma() + mma(4, a="{r20, r21, c0, r23}", mark="here")
    both = BODY.replace(zero(), zero() + zero(4) + SET_LEFT).replace(mma(), chain)
    fails(both, f"uses {UNDER_WAY}")
