"""Gradients that `torch.func.grad` makes for a step: a backward like any other, whose result the loop keeps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import torch
from torch._C import _functorch
from torch._functorch import eager_transforms
from torch.utils import _pytree as pytree

from equivcheck.hooks.base import Hooks, replace

# Every way to call `grad` or `grad_and_value` comes to this function.
_MAKES_GRADIENTS: Final = "grad_and_value_impl"


class Functions(Hooks):
    """Watches the function transforms of torch, where they differentiate by the model's own parameters."""

    def install(self, stack: ExitStack) -> None:
        original = getattr(eager_transforms, _MAKES_GRADIENTS)
        replace(stack, eager_transforms, _MAKES_GRADIENTS, self._watched(original))

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def grad_and_value(
            func: Any, argnums: Any, has_aux: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> Any:
            def compute() -> Any:
                return original(func, argnums, has_aux, args, kwargs)

            backward = self.recorder.backward
            # Inside of another transform: a derivative of it is a term of the loss, and gradients of single samples are
            # clipped or weighed before they make one.
            inside = _functorch.peek_interpreter_stack() is not None
            if backward.is_running or self.recorder.is_paused or inside:
                return compute()
            chosen = args[argnums] if isinstance(argnums, int) else [args[i] for i in argnums]
            names = self._names(chosen)
            if names is None:
                return compute()
            return backward.of_function(compute, names, has_aux=has_aux)

        return grad_and_value

    def _names(self, chosen: Any) -> list[str | None] | None:
        """Return which parameter each tensor is; None where none is one, or where a graph goes on through them.

        A gradient that a further one is taken of is a term of the loss.
        """
        leaves = pytree.tree_leaves(chosen)
        if any(
            isinstance(each, torch.Tensor) and each.requires_grad and torch.is_grad_enabled()
            for each in leaves
        ):
            return None
        storages = {_address(p): name for name, p in self.recorder.leaves().items()}
        found = [
            storages.get(_address(each)) if isinstance(each, torch.Tensor) else None
            for each in leaves
        ]
        return found if any(found) else None


def _address(tensor: torch.Tensor) -> tuple[int, torch.Size] | None:
    """Return where a tensor lies, None if that is nowhere: `detach` and `functional_call` hand on views."""
    try:
        return tensor.data_ptr(), tensor.shape
    except RuntimeError:  # no storage
        return None


def scaled_tree(tree: Any, factor: float) -> Any:
    """Return gradients in any nesting, multiplied."""
    return pytree.tree_map_only(torch.Tensor, lambda each: each * factor, tree)


def named(tree: Any, names: list[str | None]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients of parameters."""
    for name, each in zip(names, pytree.tree_leaves(tree), strict=True):
        if name is not None:
            yield name, each
