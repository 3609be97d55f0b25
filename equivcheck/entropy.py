"""Notice when a run makes a random generator that nobody seeded: it draws other numbers each time."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def watch_entropy(seen: Callable[[], None]) -> Iterator[None]:
    """Call `seen` when a generator is seeded from the operating system while this is open."""
    places: list[tuple[Any, str]] = [
        (np.random, "default_rng"),
        (np.random, "RandomState"),
        (random, "Random"),
        (random, "SystemRandom"),
        (torch, "seed"),
        (torch, "Generator"),
        (os, "urandom"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, original in before:
            if name == "Generator":
                torch.Generator = _generator(original, seen)  # type: ignore[misc]
            else:
                seedable = name in {"default_rng", "RandomState", "Random"}
                setattr(owner, name, _watched(original, seen, seedable=seedable))
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _generator(original: Any, seen: Callable[[], None]) -> Any:
    class Generator(original):  # type: ignore[misc]
        def seed(self) -> int:
            seen()
            return super().seed()  # type: ignore[no-any-return]

    return Generator


def _watched(original: Any, seen: Callable[[], None], *, seedable: bool) -> Any:
    if isinstance(original, type):
        # A class stays one, so that isinstance and subclasses go on working.
        class Watched(original):  # type: ignore[misc]
            def __new__(cls, *args: Any, **kwargs: Any) -> Any:
                if not seedable or _no_seed(args, kwargs):
                    seen()
                return original(*args, **kwargs)

        return Watched

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        if not seedable or _no_seed(args, kwargs):
            seen()
        return original(*args, **kwargs)

    return watched


def _no_seed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(each is None for each in (*args, *kwargs.values()))


@contextmanager
def other_seeds(offset: int) -> Iterator[None]:
    """Add a number to every seed that is set while this is open, the loop's own fixed ones too."""
    holders: list[tuple[Any, str]] = [
        (np.random, "default_rng"),
        (np.random, "RandomState"),
        (np.random, "seed"),
        (random, "Random"),
        (random, "seed"),
        (torch, "manual_seed"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name in holders]
    generator = torch.Generator

    class Generator(generator):  # type: ignore[misc, valid-type]
        def manual_seed(self, seed: int) -> Any:
            return super().manual_seed(seed + offset)

    try:
        for owner, name, original in before:
            setattr(owner, name, _shifted(original, offset))
        torch.Generator = Generator  # type: ignore[misc]
        yield
    finally:
        torch.Generator = generator  # type: ignore[misc]
        for owner, name, original in before:
            setattr(owner, name, original)


def _shifted(original: Any, offset: int) -> Any:
    def shifted(*args: Any, **kwargs: Any) -> Any:
        args = tuple(each + offset if isinstance(each, int) else each for each in args)
        kwargs = {k: v + offset if isinstance(v, int) else v for k, v in kwargs.items()}
        return original(*args, **kwargs)

    if not isinstance(original, type):
        return functools.wraps(original)(shifted)

    class Shifted(original):  # type: ignore[misc]
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return shifted(*args, **kwargs)

    return Shifted
