"""What is looked at in a process besides steps: counts of what losses are means over, and how losses are reduced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional

from equivcheck.counting import masks
from equivcheck.hooks.base import quiet, replace
from equivcheck.interventions import Intervention

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder

__all__ = ["Reduction", "counted", "loaders_of_length", "watch_targets"]

# Nodes between a loss and what it was scaled with: a division by 1, a cast, a view.
_THROUGH: Final = {"ToCopyBackward0", "ViewBackward0", "SqueezeBackward0", "AliasBackward0"}
_REDUCTIONS: Final = ("none", "mean", "sum")


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


class Reduction(Intervention):
    """Sees what the loss of the first backward did to its terms. Changes nothing.

    Attributes:
        found: mean, sum, or "" where that is not seen: several losses, or one that was divided by a count.
    """

    name = "look at the reduction"

    def __init__(self) -> None:
        self.found: str | None = None

    @contextmanager
    def around_backward(self, _recorder: Recorder, outputs: Sequence[Any]) -> Iterator[None]:
        if self.found is None:
            self.found = _reduction(outputs[0]) if len(outputs) == 1 else ""
        yield


def _reduction(output: Any) -> str:
    node = getattr(output, "grad_fn", None)
    for _ in range(16):
        if node is None:
            return ""
        name = type(node).__name__
        try:
            kind = getattr(node, "_saved_reduction", None)
            if isinstance(kind, int) and 0 <= kind < len(_REDUCTIONS):
                return _REDUCTIONS[kind]
            if name.startswith(("SumBackward", "MeanBackward")):
                return "sum" if name.startswith("Sum") else "mean"
            if name in {"DivBackward0", "MulBackward0"}:
                other = getattr(node, "_saved_other", None)
                with quiet():
                    if other is None or other.numel() != 1 or float(other) != 1.0:
                        return ""
            elif name not in _THROUGH:
                return ""
        except RuntimeError:  # The graph was freed.
            return ""
        node = node.next_functions[0][0] if node.next_functions else None
    return ""
