"""Run a few PTX instructions over arrays, one thread an element, for the tests of the opcodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import ptxemu

Array = np.ndarray
TARGET = "sm_90a"
_WIDTHS = {2: "b16", 4: "b32", 8: "b64"}

# What has gone through `run` or `module`, for the test that no opcode is without one.
EXECUTED: set[str] = set()


def run(body: str, result: type | np.dtype, *, threads: int = 128, target: str = TARGET, seed: int = 0, **sources: Array) -> Array:
    """The value that the instructions in `body` leave in register `d`, for every element of the sources.

    sources: arrays of one length and of 2-, 4- or 8-byte elements, in the registers that they are named after. Also
    declared: predicates p, q, s; scratch registers h0..h7 of 16, w0..w7 of 32, x0..x7 of 64 bits, f0..f7 (.f32).
    Lanes beyond the last element take part with the last element's values, so that all 32 are there.
    """
    count = len(next(iter(sources.values())))
    kind = np.dtype(result)
    out = np.zeros(count, kind)
    registers, loads = [], []
    for name, source in sources.items():
        if len(source) != count:
            raise ValueError(f"{name}: {len(source)} elements, others have {count}")
        width, size = _WIDTHS[source.dtype.itemsize], source.dtype.itemsize
        registers.append(f".reg .{width} {name};")
        loads += [
            f"ld.param.u64 at, [p_{name}];",
            f"mad.wide.u32 at, safe, {size}, at;",
            f"ld.global.{width} {name}, [at];",
        ]
    text = kernel(
        [f"p_{name}" for name in sources] + ["p_out"],
        "\n".join(
            [
                *registers, f".reg .{_WIDTHS[kind.itemsize]} d;", ".reg .u32 i, safe, block, size;", ".reg .u64 at;",
                ".reg .pred inside;", "mov.u32 i, %tid.x;", "mov.u32 block, %ctaid.x;", "mov.u32 size, %ntid.x;",
                "mad.lo.u32 i, block, size, i;", f"min.u32 safe, i, {count - 1};", *loads, body,
                f"setp.lt.u32 inside, i, {count};", "ld.param.u64 at, [p_out];",
                f"mad.wide.u32 at, i, {kind.itemsize}, at;", f"@inside st.global.{_WIDTHS[kind.itemsize]} [at], d;",
            ]  # fmt: skip
        ),
        target,
    )
    arrays = [*(np.ascontiguousarray(s) for s in sources.values()), out]
    blocks = (count + threads - 1) // threads
    ptxemu.load(text).launch("test", blocks, threads, arrays, seed=seed).check()
    note(body)
    return out


def kernel(params: Sequence[str], body: str, target: str = TARGET, before: str = "") -> str:
    """A module with one kernel, `test`, of 64-bit parameters; before: variables and functions in front of it."""
    listed = ", ".join(f".param .u64 {name}" for name in params)
    scratch = "\n".join(
        f".reg .{kind} {letter}<8>;" for kind, letter in (("b16", "h"), ("b32", "w"), ("b64", "x"), ("f32", "f"))
    )
    return (
        f".version 8.8\n.target {target}\n.address_size 64\n{before}\n.visible .entry test({listed})\n{{\n"
        f".reg .pred p, q, s;\n{scratch}\n{body}\nret;\n}}\n"
    )


def launch(text: str, args: Sequence[object], grid: int | Sequence[int] = 1, block: int | Sequence[int] = 32, **options: int) -> ptxemu.Report:
    """Load and run a module's only kernel; its report, unchecked."""
    note(text)
    return ptxemu.load(text).launch(None, grid, block, args, **options)  # type: ignore[arg-type]


def note(text: str) -> None:
    """Remember the opcodes of some PTX."""
    for statement in text.replace("{", " ").replace("}", " ").replace("\n", ";").split(";"):
        words = [word for word in statement.split() if not word.startswith("@")]
        if words and words[0][0].isalpha() and ":" not in words[0].replace("::", ""):
            EXECUTED.add(words[0])


def all_pairs(values: Iterable[object], dtype: type | np.dtype) -> tuple[Array, Array]:
    """Every value with every value."""
    edge = np.array(list(values), dtype)
    return np.repeat(edge, len(edge)), np.tile(edge, len(edge))


def random_bits(count: int, dtype: type | np.dtype, seed: int = 0) -> Array:
    """Elements of random bits: of floats also NaN, infinities and denormals, which get their share."""
    kind = np.dtype(dtype)
    return np.random.default_rng(seed).integers(0, 256, count * kind.itemsize, np.uint8).view(kind)


def same_bits(actual: Array, expected: Array, what: str = "") -> None:
    """Equal in every bit; of floats, NaNs count as equal."""
    a, b = np.asarray(actual), np.asarray(expected)
    assert a.dtype == b.dtype and a.shape == b.shape, f"{what}: {a.dtype}{a.shape}, {b.dtype}{b.shape}"
    bits = f"u{a.dtype.itemsize}"
    different = a.view(bits) != b.view(bits)
    if a.dtype.kind == "f":
        different &= ~(np.isnan(a) & np.isnan(b))
    where = np.flatnonzero(different)
    assert len(where) == 0, f"{what}: {len(where)} differ, the first at {where[0]}: {a[where[0]]!r}, needs {b[where[0]]!r}"
