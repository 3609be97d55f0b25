"""What is looked at in a process besides steps: counts of what losses are means over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn import functional

from equivcheck.counting import masks
from equivcheck.hooks.base import quiet, replace

__all__ = ["counted", "loaders_of_length", "watch_targets"]


def counted(named: Sequence[tuple[str, torch.Tensor]], rows: int) -> dict[str, int]:
    """Return how much a micro-batch holds of everything that may be counted, by label."""
    found = {"rows": rows}
    for path, tensor in named:
        if tensor.dim() and len(tensor) == rows and not tensor.is_sparse:
            found.update((label, int(mask.sum())) for label, mask in masks(path, tensor))
    return found


def watch_targets(stack: ExitStack, found: Callable[[str, int], None]) -> None:
    """Report, for every cross entropy, how many targets it is a mean over."""
    for name in ("cross_entropy", "nll_loss"):
        original = getattr(functional, name)

        @functools.wraps(original)
        def loss(
            input: Any,  # noqa: A002 - torch's own name
            target: Any,
            *args: Any,
            _original: Any = original,
            _name: str = name,
            **kwargs: Any,
        ) -> Any:
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                with quiet():
                    if isinstance(target, torch.Tensor) and not target.is_floating_point():
                        ignored = kwargs.get("ignore_index", -100)
                        found(f"{_name} targets", int((target != ignored).sum()))
            return _original(input, target, *args, **kwargs)

        replace(stack, functional, name, loss)


def loaders_of_length(stack: ExitStack, length: int) -> None:
    """Let `len` of every DataLoader say a number."""
    replace(stack, torch.utils.data.DataLoader, "__len__", lambda _: length)
