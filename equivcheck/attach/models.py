"""Find the model of a script that hands us none: what owns the parameters that its optimizers hold.

Wrappers (DistributedDataParallel, torch.compile, a trainer's own) are taken off, so that a parameter has one name
however it is trained.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from equivcheck.hooks.base import subclasses

__all__ = ["Parts", "owner", "unwrapped"]

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


def owner(called: nn.Module | None, optimizers: list[Optimizer]) -> nn.Module | None:
    """Return the module that holds what the optimizers train: with the fewest parameters, and the outermost of those.

    It is looked for among all modules, so that it is the same one whichever is called first, and whether that is before
    the first optimizer step or in its closure.

    Args:
        called: The module that was called outermost; None if none has been.
        optimizers: Those alive; none if the script has not made any yet.
    """
    wanted = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    if not wanted:
        return None if called is None else unwrapped(called)
    # isinstance would wake lazy and deprecated objects, and takes its time where there are half a million.
    kinds = set(subclasses(nn.Module))
    holding = []
    for module in [each for each in gc.get_objects() if type(each) in kinds]:
        held = {id(p) for p in module.parameters()}
        if wanted <= held:
            holding.append((len(held), -sum(1 for _ in module.modules()), module))
    if holding:
        return unwrapped(min(holding, key=lambda item: item[:2])[2])
    return None if called is None else unwrapped(called)


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
