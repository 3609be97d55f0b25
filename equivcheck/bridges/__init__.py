"""Frameworks whose gradients torch does not make: what they do is mirrored in torch, where the recorder sees it.

A bridge for a framework is one module here. Behind it recording, comparison, attribution, interventions and diagnosis
are those of torch: a gradient that the framework computes becomes a backward of the mirror, its optimizer's update a
step of the mirror's optimizer, and what the engine sets in the mirror (a state, a factor on a backward) comes back into
the framework's own run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn

    from equivcheck.recorder import Recorder

# Of frameworks that compute in torch, and stand in the way of float64 only.
IN_TORCH = {"deepspeed.accelerator.real_accelerator": "equivcheck.bridges.deepspeed"}
# A module loaded with the framework, to the bridge for it. The framework is imported by the user's code, never by
# us; another generation of it (Keras 2 has no such module) is left alone.
BRIDGES = {
    "jax.experimental": "equivcheck.bridges.jax",
    "keras.src.backend.common.global_state": "equivcheck.bridges.keras",
    **IN_TORCH,
}


class Bridge(Protocol):
    """A model of a framework, and its mirror.

    Attributes:
        module: What the recorder watches.
    """

    module: nn.Module

    def model(self, *, promoted: bool) -> Any:
        """Return the model as the user's loop is given it, in float64 if promoted."""

    def watched(self, recorder: Recorder, *, promoted: bool) -> Any:
        """Return a context in which what the framework does is mirrored."""

    def settle(self) -> None:
        """Wait until everything that was begun has been seen."""


def _loaded(known: Mapping[str, str] | None = None) -> Iterator[Any]:
    for name, bridge in (BRIDGES if known is None else known).items():
        if name not in sys.modules:
            continue
        try:
            module = importlib.import_module(bridge)
        except ImportError:  # of what an older or newer release lacks
            continue
        yield module


@contextmanager
def installed() -> Iterator[Callable[[], bool]]:
    """Let frameworks that are loaded tell their bridges what they do; they are left as they were found.

    Yields a function that does so for those that were loaded since, and returns whether there were any: what code
    took from such a framework while it was executed (`from jax import grad`) tells nothing yet.
    """
    with ExitStack() as stack:
        told: set[str] = set()

        def install() -> bool:
            new = [bridge for bridge in _loaded() if bridge.__name__ not in told]
            for bridge in new:
                bridge.install(stack)
            told.update(bridge.__name__ for bridge in new)
            return bool(new)

        install()
        yield install


def open_to_float64(stack: ExitStack) -> None:
    """Let frameworks that compute in torch, and are loaded, take float64."""
    for bridge in _loaded(IN_TORCH):
        bridge.install(stack)


def across(model: Any) -> Bridge | None:
    """Return a bridge for what `build` returned; None for a module of torch, which needs none."""
    for module in _loaded():
        bridge: Bridge | None = module.across(model)
        if bridge is not None:
            return bridge
    return None
