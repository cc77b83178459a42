"""The package under the name `flash_attn`, for as long as that is wanted."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from types import ModuleType, TracebackType

_NAME = "flash_attn"
_HERE = "pyfuse.compat.flash_attn"

_active: list[Installation] = []


class Installation:
    """What one :func:`install` did. A context manager that takes it back at its end."""

    def __init__(self, before: dict[str, ModuleType]) -> None:
        self._before = before

    @property
    def active(self) -> bool:
        return any(entry is self for entry in _active)

    def uninstall(self) -> None:
        """Make every `flash_attn` entry of sys.modules what it was before. A second call does nothing.

        RuntimeError: an :func:`install` after this one is still in place; that one has to go first.
        Names that a program has imported already stay bound to what they are.
        """
        if not self.active:
            return
        if _active[-1] is not self:
            raise RuntimeError(
                "flash_attn: a later install() is still in place, uninstall that one first"
            )
        _active.pop()
        _replace_entries(self._before)

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.uninstall()


def install(force: bool = False) -> Installation:
    """Make `import flash_attn` and its submodules mean `pyfuse.compat.flash_attn`, in this process.

    force: also where the real library is installed, or has been imported: it is hidden until `uninstall()`. Without
    force that is a RuntimeError. What was imported from it before keeps using it.
    A second install() is allowed, changes nothing, and is taken back before the first.

    Only importing is answered. Package metadata is not: importlib.metadata.version("flash_attn") raises
    PackageNotFoundError, so that transformers.utils.is_flash_attn_2_available(), which asks for it, and for CUDA,
    says no, and attn_implementation="flash_attention_2" is refused as before; pyfuse.accelerate() is the way to speed
    up those models.
    """
    if not force and not _active:
        _refuse_the_real_one()
    installation = Installation(_entries())
    _replace_entries(_own_modules())
    _active.append(installation)
    return installation


def _refuse_the_real_one() -> None:
    module = sys.modules.get(_NAME)
    if module is not None:
        where = getattr(module, "__file__", None) or "no file"
        raise RuntimeError(
            f"flash_attn: has been imported already, from {where}; install(force=True) hides it"
        )
    spec = None if _NAME in sys.modules else importlib.util.find_spec(_NAME)
    if spec is not None:
        raise RuntimeError(
            f"flash_attn: the library itself can be imported, from {spec.origin}; use it, or hide it by "
            "install(force=True)"
        )


def _entries() -> dict[str, ModuleType]:
    """What sys.modules says of flash_attn now."""
    return {
        name: module
        for name, module in sys.modules.items()
        if name == _NAME or name.startswith(f"{_NAME}.")
    }


def _own_modules() -> dict[str, ModuleType]:
    """Every module of this package by its name there, private ones too: imported by path they would be copies."""
    package = importlib.import_module(_HERE)
    names = [m.name for m in pkgutil.walk_packages(package.__path__, f"{_HERE}.")]
    modules = {_HERE: package} | {name: importlib.import_module(name) for name in names}
    return {_NAME + name.removeprefix(_HERE): module for name, module in modules.items()}


def _replace_entries(modules: dict[str, ModuleType]) -> None:
    for name in _entries():
        del sys.modules[name]
    sys.modules.update(modules)
