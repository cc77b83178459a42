"""Compile Triton kernels for any GPU on a machine without one, as a launch with given arguments would.

Arguments are specialised by Triton's own rules (multiples of 16 are marked, an integer 1 and None become constants),
and all of its compiler runs, ptxas included. Works with Triton 3.7 to 3.9, which is imported at the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import ptxemu

from . import build
from .sass import Code, parse_gcn, read_cubin

if TYPE_CHECKING:
    from triton import JITFunction
    from triton.compiler import CompiledKernel

CACHE = build.CACHE / "triton"


class TritonNotFound(ImportError):
    """Triton is not installed (it comes with torch on Linux, or by `pip install triton`)."""


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one specialisation, and what its launch needs."""

    kernel: CompiledKernel
    types: tuple[str, ...]  # Triton's type of every run-time argument, tuples flattened
    arch: int | str

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    @property
    def cubin(self) -> bytes:
        return self.kernel.asm["cubin"]

    @property
    def amdgcn(self) -> str:
        return self.kernel.asm["amdgcn"]

    @property
    def code(self) -> Code:
        """The machine code; of a module with one kernel."""
        amd = isinstance(self.arch, str)
        (code,) = (parse_gcn(self.amdgcn) if amd else read_cubin(self.cubin)).values()
        return code

    @property
    def threads(self) -> int:
        """Threads of a block; a warp-specialised kernel has more warps than the caller asked for."""
        return 32 * self.kernel.metadata.num_warps


def compile_kernel(fn: JITFunction, *args: Any, arch: int | str = 80, **options: Any) -> Compiled:
    """Compile `fn` as `launch` with these arguments would, without running it; arch may be "gfx942", too."""
    return compile_bound(fn, bind(fn, args, arch, options), arch)


def compile_ptx(fn: JITFunction, *args: Any, arch: int = 80, **options: Any) -> str:
    """PTX of `fn`, compiled as `launch` with these arguments would."""
    return compile_kernel(fn, *args, arch=arch, **options).ptx


class Leaf(NamedTuple):
    """One scalar argument, with Triton's type of it; an element of a tuple is named t[0]."""

    name: str
    kind: str
    value: Any


@dataclass(frozen=True)
class Bound:
    """Arguments of one call by name, with the (type, hint) pairs that Triton specialises on."""

    arguments: dict[str, Any]
    specialization: list[tuple[Any, Any]]
    options: dict[str, Any]
    outputs: dict[int, ptxemu.Output]  # by the identity of their tensor

    def leaves(self) -> Iterator[Leaf]:
        """All arguments in order, the elements of tuples apart."""
        for (name, value), (kind, _) in zip(
            self.arguments.items(), self.specialization, strict=True
        ):
            yield from _leaves(name, kind, value)

    def wrap(self, value: Any) -> Any:
        return self.outputs.get(id(value), value)


def _leaves(name: str, kind: Any, value: Any) -> Iterator[Leaf]:
    if not isinstance(kind, tuple):  # a constexpr may be a tuple, and is one leaf
        yield Leaf(name, kind, value)
        return
    for i, (inner, element) in enumerate(zip(kind, value, strict=True)):
        yield from _leaves(f"{name}[{i}]", inner, element)


def bind(fn: JITFunction, args: tuple[Any, ...], arch: int | str, options: dict[str, Any]) -> Bound:
    """Match arguments with the kernel's parameters and find what Triton specialises them on."""
    _require_triton()
    from triton.runtime.jit import JITFunction

    if not isinstance(fn, JITFunction):
        raise TypeError(
            f"fn: {type(fn).__name__}, needs a function decorated with @triton.jit alone (unset "
            "TRITON_INTERPRET; of an autotuned or heuristic kernel pass .fn and its constants)"
        )
    outputs: dict[int, ptxemu.Output] = {}
    names = [parameter.name for parameter in fn.params]
    plain = [_plain(name, value, outputs) for name, value in zip(names, args, strict=False)]
    plain += args[len(names) :]
    options = {name: _plain(name, value, outputs) for name, value in options.items()}
    try:
        arguments, specialization, rest = _binder(fn, arch)(*plain, **options)
    except TypeError as error:  # a missing or surplus argument, in the words of Python
        raise TypeError(str(error).replace("dynamic_func", fn.__name__)) from None
    rest.setdefault("debug", bool(fn.debug))
    rest.setdefault("enable_fp_fusion", True)  # Triton's default changes with its version
    known = _backend(arch).parse_options({"enable_fp_fusion": True}).__dict__
    for name in rest:
        if name not in known:
            raise TypeError(f"{name}: neither an argument of {fn.__name__} nor a Triton option")
    return Bound(arguments, specialization, rest, outputs)


def _plain(name: str, value: Any, outputs: dict[int, ptxemu.Output]) -> Any:
    """The argument as Triton takes it, outputs set aside; refuses what cannot be passed."""
    if isinstance(value, tuple):
        return tuple(_plain(f"{name}[{i}]", element, outputs) for i, element in enumerate(value))
    if isinstance(value, ptxemu.Output):
        outputs[id(value.tensor)] = value
        value = value.tensor
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise TypeError(f"{name}: a tensor on {value.device}, the emulator runs CPU tensors")
        if not _triton_has(value.dtype):
            raise TypeError(f"{name}: dtype {value.dtype}, which Triton has no pointer for")
    if type(value).__name__ == "TensorDescriptor":
        raise TypeError(
            f"{name}: a tensor descriptor made on the host, which needs the CUDA driver; make it "
            "in the kernel with tl.make_tensor_descriptor"
        )
    return value


@cache
def _triton_has(dtype: torch.dtype) -> bool:
    from triton.runtime.jit import type_canonicalisation_dict

    return str(dtype).removeprefix("torch.") in type_canonicalisation_dict


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise TritonNotFound("triton is not installed; it compiles the kernel") from error


@cache
def _backend(arch: int | str) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    cuda = isinstance(arch, int)
    return make_backend(GPUTarget("cuda", arch, 32) if cuda else GPUTarget("hip", arch, 64))


@cache
def _binder(
    fn: JITFunction, arch: int | str
) -> Callable[..., tuple[dict[str, Any], list[Any], dict]]:
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(fn.signature, fn.params, _backend(arch))


_compiled: dict[tuple[int | str, bool, str], Compiled] = {}


def compile_bound(
    fn: JITFunction, bound: Bound, arch: int | str, *, assemble: bool = True
) -> Compiled:
    """The kernel for this specialisation; from memory or disk if it has been compiled before.

    assemble: also run ptxas, which takes most of the time; without it there is no cubin.
    """
    import triton
    from triton.compiler import ASTSource
    from triton.runtime.jit import compute_cache_key

    key = (
        arch,
        assemble,
        fn.cache_key + compute_cache_key({}, bound.specialization, bound.options),
    )
    if key not in _compiled:
        signature, constants, attributes = _source(fn, bound, arch)
        with triton.knobs.cache.scope(), triton.knobs.runtime.scope():
            triton.knobs.cache.dir = str(CACHE)
            if not assemble:
                triton.knobs.runtime.add_stages_inspection_hook = _without_assembler
            kernel = triton.compile(
                ASTSource(fn, signature, constants, attributes),
                target=_backend(arch).target,
                options=bound.options,
            )
        types = tuple(leaf.kind for leaf in bound.leaves() if leaf.kind != "constexpr")
        _compiled[key] = Compiled(kernel, types, arch)
    return _compiled[key]


def _without_assembler(*call: Any) -> tuple[str, str] | None:
    """Triton's hook on its stages: called with nothing it names the cache's entries, else it may change them."""
    if not call:
        return "ptx", "ptx"
    _, stages, *_ = call
    stages["cubin"] = lambda ptx, metadata: b""
    return None


def _source(fn: JITFunction, bound: Bound, arch: int | str) -> tuple[dict, dict, dict]:
    """Signature, constants and hints as Triton's ASTSource takes them, the latter keyed by paths into tuples."""
    from triton._utils import find_paths_if, get_iterable_path

    kinds = [kind for kind, _ in bound.specialization]
    values = list(bound.arguments.values())
    hints = ["" if kind == "constexpr" else hint for kind, hint in bound.specialization]
    constants = find_paths_if(kinds, lambda _, kind: kind == "constexpr")
    hinted = find_paths_if(hints, lambda _, hint: isinstance(hint, str))
    parse = _backend(arch).parse_attr
    return (
        dict(zip(bound.arguments, kinds, strict=True)),
        {path: get_iterable_path(values, path) for path in constants},
        {path: parse(get_iterable_path(hints, path)) for path in hinted},
    )
