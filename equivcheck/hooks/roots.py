"""The root of a backward: the loss it starts from, and the factors it carries."""

from __future__ import annotations

import math
from typing import Any

import torch

from equivcheck.addends import SCALES, SUMS
from equivcheck.hooks.base import number, quiet
from equivcheck.noise import SAFETY, UNIT_ROUNDOFF, gamma
from equivcheck.recording import Reduction


def value_of(outputs: list[Any], seeds: Any) -> tuple[float, str]:
    """Return the loss that a backward starts from, weighted with its root gradient, and its grad_fn's name."""
    total, name = 0.0, ""
    with quiet():
        for output, seed in zip(outputs, seeds, strict=False):
            if not isinstance(output, torch.Tensor):
                continue
            name = name or (type(output.grad_fn).__name__ if output.grad_fn else "leaf")
            value = output.detach()
            total += float((value if seed is None else value * seed.detach()).double().sum())
    return total, name


def scalar_of(outputs: list[Any]) -> float:
    """Return the number that the loss was multiplied with last: a loss scale by hand; 1 if it was not."""
    node = (
        outputs[0].grad_fn if len(outputs) == 1 and isinstance(outputs[0], torch.Tensor) else None
    )
    # A division by one, as by accumulation_steps in the full batch, is no factor.
    while type(node).__name__ == "DivBackward0" and _other_of(node) == 1.0:
        node = node.next_functions[0][0]  # type: ignore[union-attr]
    factor = _other_of(node) if type(node).__name__ == "MulBackward0" else None
    return 1.0 if factor is None else factor


def _other_of(node: Any) -> float | None:
    """Return the number that a product or quotient was made with; None where it is none."""
    try:
        other = getattr(node, "_saved_other", None)
    except RuntimeError:  # The graph was freed: a second backward through it.
        return None
    # Outside of any mode: torch hands a number that was wrapped as a tensor to modes as a number again.
    with quiet():
        return (
            float(other)
            if other is not None and other.numel() == 1 and not other.requires_grad
            else None
        )


_REDUCTIONS = ("none", "mean", "sum")
# Nodes between a root and its reduction that are looked at: as many as code of a few lines makes.
_DEPTH = 16


def reduction_of(outputs: list[Any]) -> Reduction | None:
    """Return how one loss was made of its terms; None where that is not seen, or where addends were made otherwise."""
    root = outputs[0] if len(outputs) == 1 else None
    return _reduced(root.grad_fn, 1.0, _DEPTH) if isinstance(root, torch.Tensor) else None


def _reduced(node: Any, factor: float, depth: int) -> Reduction | None:
    kind = type(node).__name__
    if kind.startswith(("SumBackward", "MeanBackward")):
        terms = math.prod(map(int, node._saved_self_sym_sizes))
        return Reduction("sum" if kind.startswith("Sum") else "mean", factor, float(terms))
    saved = getattr(node, "_saved_reduction", 0)
    if isinstance(saved, int) and 0 < saved < len(_REDUCTIONS):
        terms_of = _terms(node)
        return None if terms_of is None else Reduction(_REDUCTIONS[saved], factor, terms_of)
    if depth == 0 or kind not in (*SUMS, *SCALES):
        return None
    if kind in ("DivBackward0", "MulBackward0"):
        other = _other_of(node)
        if not other:
            return None
        factor = factor / other if kind == "DivBackward0" else factor * other
    edges = [edge for edge, _ in node.next_functions if edge is not None]
    found = {_reduced(edge, factor, depth - 1) for edge in edges}
    return found.pop() if len(found) == 1 else None


def _terms(node: Any) -> float | None:
    """Return what a loss of `torch.nn.functional` is a mean or sum over: elements, or the weights of targets."""
    try:
        with quiet():
            if hasattr(node, "_saved_total_weight"):
                return float(node._saved_total_weight)
            return float(node._saved_target.numel())
    except (AttributeError, RuntimeError):  # the graph was freed
        return None


def scaled(seeds: Any, outputs: list[Any], factor: float) -> tuple[Any, ...]:
    """Return the root gradients of a backward, multiplied."""
    with quiet():
        return tuple(
            torch.full_like(output, factor) if seed is None else seed * factor
            for output, seed in zip(outputs, seeds, strict=False)
        )


def reweighted(result: Any, evaluated: list[tuple[float, float]]) -> Any:
    """Return what a closure gives to its optimizer, with the factors that its backwards were given.

    Args:
        result: The loss as the loop computed it: the sum of the backward roots, or the last of them; any other value
            is returned as it is.
        evaluated: Per backward of this evaluation, the loss it started from and its factor.
    """
    if all(factor == 1.0 for _, factor in evaluated) or not isinstance(
        result, (torch.Tensor, float)
    ):
        return result
    value = number(result)
    unit = (
        UNIT_ROUNDOFF.get(result.dtype, 0.0)
        if isinstance(result, torch.Tensor)
        else UNIT_ROUNDOFF[torch.float32]
    )
    close = SAFETY * gamma(len(evaluated), unit)
    for terms in (evaluated, evaluated[-1:]):
        written = sum(loss for loss, _ in terms)
        if written and abs(value - written) <= close * sum(abs(loss) for loss, _ in terms):
            with quiet():
                return result * (sum(loss * factor for loss, factor in terms) / written)
    return result
