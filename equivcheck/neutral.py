"""Switch dropout off, in modules and in the functional forms, for the length of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.dropout import _DropoutNd

_FUNCTIONAL = [
    f"{kind}{inplace}"
    for kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for inplace in ("", "_")
]


def switch_off_modules(model: nn.Module) -> bool:
    """Set the probability of every dropout inside a model to 0; return whether any was above it."""
    found = False
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            found |= module.p > 0
            module.p = 0.0
        elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
            found |= float(module.dropout) > 0
            module.dropout = 0.0
    return found


@contextmanager
def functional_dropout_off(seen: Callable[[], None] | None) -> Iterator[None]:
    """Make the functional forms of dropout pass their input through.

    Args:
        seen: Called when a dropout would have drawn; None in runs that are compiled, where a side
            effect would break the graph.
    """
    variables: Any = vars(functional)["_VF"]
    holders = [
        (owner, name)
        for owner in (variables, torch)
        for name in _FUNCTIONAL
        if hasattr(owner, name)
    ]
    before = [(owner, name, vars(owner).get(name), getattr(owner, name)) for owner, name in holders]
    attention = functional.scaled_dot_product_attention
    try:
        for owner, name, _, original in before:
            setattr(owner, name, _without(original, seen))
        functional.scaled_dot_product_attention = _attention_without(attention, seen)
        yield
    finally:
        functional.scaled_dot_product_attention = attention
        for owner, name, own, _ in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _without(original: Callable[..., Any], seen: Callable[[], None] | None) -> Callable[..., Any]:
    def dropout(input: Any, p: float, train: bool) -> Any:  # noqa: A002 - torch's own names
        if seen is not None and train and p > 0:
            seen()
        return original(input, p, False)

    return dropout


def _attention_without(original: Any, seen: Callable[[], None] | None) -> Any:
    @functools.wraps(original)
    def attention(*args: Any, **kwargs: Any) -> Any:
        if "dropout_p" in kwargs:
            if seen is not None and kwargs["dropout_p"] > 0:
                seen()
            kwargs["dropout_p"] = 0.0
        elif len(args) > 4:
            if seen is not None and args[4] > 0:
                seen()
            args = (*args[:4], 0.0, *args[5:])
        return original(*args, **kwargs)

    return attention
