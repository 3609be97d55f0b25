"""Find the model of a script that hands us none: what owns the parameters that its optimizers hold.

Wrappers (DistributedDataParallel, torch.compile, a trainer's own) are taken off, so that a parameter has one name
however it is trained.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer

from equivcheck.hooks.base import subclasses

__all__ = ["Built", "Parts", "owner", "unwrapped"]

# Where wrappers keep what they wrap.
_INNER = ("module", "_orig_mod", "_forward_module", "_original_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return what a wrapper wraps: the child that holds every parameter of it."""
    while True:
        mine = {id(p) for p in module.parameters()}
        inner = next(
            (
                child
                for name in _INNER
                if isinstance(child := module._modules.get(name), nn.Module)  # noqa: SLF001 - no lazy getattr
                and {id(p) for p in child.parameters()} == mine
            ),
            None,
        )
        if inner is None:
            return module
        module = inner


class Built:
    """Remembers the modules that a process builds: to search all its objects takes longer than a backward or two."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[nn.Module]] = {}

    def install(self, stack: ExitStack) -> None:
        """See every module that is given a parameter, or a child, until the stack is closed."""

        def with_child(module: nn.Module, _name: str, child: nn.Module | None) -> None:
            self._see(module)
            if child is not None:
                self._see(child)

        def with_parameter(module: nn.Module, *_: Any) -> None:
            self._see(module)

        stack.callback(register_module_module_registration_hook(with_child).remove)
        stack.callback(register_module_parameter_registration_hook(with_parameter).remove)

    def _see(self, module: nn.Module) -> None:
        self._known[id(module)] = weakref.ref(module)

    def modules(self) -> list[nn.Module]:
        """Return those that are alive."""
        return [each for ref in self._known.values() if (each := ref()) is not None]


def owner(
    called: nn.Module | None, optimizers: list[Optimizer], built: Built | None = None
) -> nn.Module | None:
    """Return the module that holds what the optimizers train: with the fewest parameters, and the outermost of those.

    It is looked for among all modules, so that it is the same one whichever is called first, and whether that is before
    the first optimizer step or in its closure.

    Args:
        called: The module that was called outermost; None if none has been.
        optimizers: Those alive; none if the script has not made any yet.
        built: The modules that were seen as they were built; copies and what was unpickled may not be among them.
    """
    wanted = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    if not wanted:
        return None if called is None else unwrapped(called)
    found = _least(wanted, built.modules() if built is not None else [])
    if found is None:
        # isinstance would wake lazy and deprecated objects.
        kinds = set(subclasses(nn.Module))
        found = _least(wanted, [each for each in gc.get_objects() if type(each) in kinds])
    if found is None:
        found = called
    return None if found is None else unwrapped(found)


def _least(wanted: set[int], modules: list[nn.Module]) -> nn.Module | None:
    """Return the module with the fewest parameters that holds all that are wanted, and the most modules."""
    holding = []
    for module in modules:
        held = {id(p) for p in module.parameters()}
        if wanted <= held:
            holding.append((len(held), -sum(1 for _ in module.modules()), module))
    return min(holding, key=lambda item: item[:2])[2] if holding else None


class Parts(nn.Module):
    """Several models that are called one after the other; the first keeps its names, the others have a prefix."""

    def __init__(self, first: nn.Module, others: dict[str, nn.Module]) -> None:
        super().__init__()
        self._parts = [("", first), *((f"{name}.", part) for name, part in others.items())]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every parameter once, under the part that comes first."""
        yield from self._once("named_parameters", *args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every buffer once."""
        yield from self._once("named_buffers", *args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield every module once."""
        yield from self._once("named_modules", *args, **kwargs)

    def _once(self, method: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        seen: set[int] = set()
        for prefix, part in self._parts:
            for name, value in getattr(part, method)(*args, **kwargs):
                if id(value) not in seen:
                    seen.add(id(value))
                    yield f"{prefix}{name}", value

    def with_part(self, name: str, part: nn.Module) -> Parts:
        """Return the parts with one more."""
        others = {prefix.rstrip("."): each for prefix, each in self._parts[1:]}
        return Parts(self._parts[0][1], {**others, name: part})
