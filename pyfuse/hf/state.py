"""What pyfuse keeps on a patched module, and how all of it is switched off, on again, and removed.

Everything lives in ``module.__dict__``: one plain attribute ``_pyfuse`` (a :class:`State`) and the
replaced attributes themselves, methods bound with types.MethodType. So ``copy.deepcopy(model)``
gives a copy whose methods are bound to the copy, and parameters, buffers, state_dict and the
module's class stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import Tensor, nn

from pyfuse.hf.slots import LinearSlot, NormSlot, UnpadSlot

ATTRIBUTE = "_pyfuse"


class Missing:
    """In place of an attribute that was not there (a class, since deepcopy keeps classes)."""


class State:
    """The replaced attributes of one module, and what its patched methods need to know."""

    def __init__(self) -> None:
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        self.tensors: list[
            tuple[str, str, Tensor, Tensor]
        ] = []  # (_parameters | _buffers, name, old, new)
        self.pre_hooks: dict[int, Callable[..., Any]] = {}
        self.configs: set[str] = set()  # the replaced attributes that are configurations
        self.enabled = True
        self.linear: LinearSlot | None = None
        self.norm: NormSlot | None = None
        self.unpad: UnpadSlot | None = None
        self.activation: tuple[Any, str] | None = (
            None  # the module's activation object, its name in pyfuse
        )
        self.fused: str | None = None  # the name of the fused forward

    def disable(self, module: nn.Module, configs: bool = True) -> None:
        """Put the attributes back (configurations only if asked) and take the hooks off."""
        for name, value in self.before.items():
            if name in self.configs and not configs:
                continue
            if value is Missing:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = value
        for key in self.pre_hooks:
            module._forward_pre_hooks.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
        self.enabled = False

    def enable(self, module: nn.Module) -> None:
        module.__dict__.update(self.after)
        for key, hook in self.pre_hooks.items():
            module._forward_pre_hooks[key] = hook
            module._forward_pre_hooks_with_kwargs[key] = True
        self.enabled = True


def state_of(module: nn.Module) -> State:
    """The module's state, made if it has none."""
    state: State | None = module.__dict__.get(ATTRIBUTE)
    if state is None:
        state = module.__dict__[ATTRIBUTE] = State()
    return state


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Replace an instance attribute until :func:`remove`."""
    state = state_of(module)
    state.before.setdefault(name, module.__dict__.get(name, Missing))
    state.after[name] = module.__dict__[name] = value


def bind(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Replace a method of this instance by ``function(self, ...)``.

    A bound method is pickled as (instance, name): by its true name the class's own comes back.
    """
    function.__name__ = name
    set_attribute(module, name, MethodType(function, module))


def swap_tensor(module: nn.Module, store: str, name: str, new: Tensor) -> None:
    """Replace a parameter or buffer (``store`` is "_parameters" or "_buffers")."""
    state_of(module).tensors.append((store, name, module.__dict__[store][name], new))
    module.__dict__[store][name] = new


def add_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> None:
    """A forward pre-hook with keyword arguments; ``hook`` must not close over the module."""
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    state_of(module).pre_hooks[handle.id] = hook


def patched_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, State]]:
    for name, module in model.named_modules():
        state = module.__dict__.get(ATTRIBUTE)
        if state is not None:
            yield name, module, state


def switch_on(model: nn.Module) -> None:
    for _name, module, state in patched_modules(model):
        state.enable(module)


def switch_off(model: nn.Module, configs: bool = True) -> None:
    """Take the patches off, keeping them for :func:`switch_on`, as for a probe of the stock model.

    Tensors that dtype= replaced stay; configs=False leaves the model its copies of its configs.
    """
    for _name, module, state in patched_modules(model):
        state.disable(module, configs)


def remove(model: nn.Module) -> None:
    """Restore every module of ``model``.

    RuntimeError, with nothing restored: somebody has patched over a patch.
    """
    found = list(patched_modules(model))
    for path, module, state in found:
        for name, value in state.after.items():
            if state.enabled and module.__dict__.get(name) is not value:
                raise RuntimeError(
                    f"undo: {path or type(module).__name__}.{name} was replaced after "
                    "accelerate(); restore it first"
                )
    for _path, module, state in found:
        state.disable(module)
        for store, name, old, _new in state.tensors:
            module.__dict__[store][name] = old
        del module.__dict__[ATTRIBUTE]
