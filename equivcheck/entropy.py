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
    def seed(self: Any) -> int:
        seen()
        return original.seed(self)  # type: ignore[no-any-return]

    return _class_like(original, seed=seed)


def _watched(original: Any, seen: Callable[[], None], *, seedable: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not seedable or _no_seed(args, kwargs):
            seen()
        return original(*args, **kwargs)

    return _instead_of(original, call)


def _instead_of(original: Any, call: Callable[..., Any]) -> Any:
    """Return what calls `call` where a function, or a class, was called."""
    if isinstance(original, type):
        return _class_like(original, call)
    return functools.wraps(original)(call)


def _class_like(original: Any, call: Callable[..., Any] | None = None, **methods: Any) -> Any:
    """Return a class that stands in for another.

    What is an object, or a subclass, of the original is one of this class too: libraries ask
    (scikit-learn's `check_random_state`), and most objects were made before.

    Args:
        original: A class.
        call: Makes its objects, but not those of subclasses that the user's code derives.
        methods: Replaced in this class.
    """
    kind: Any = type(original)

    class Meta(kind):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if self is made and call is not None:
                return call(*args, **kwargs)
            return super().__call__(*args, **kwargs)

        def __instancecheck__(self, value: Any) -> bool:
            return isinstance(value, original) if self is made else super().__instancecheck__(value)

        def __subclasscheck__(self, other: type) -> bool:
            return issubclass(other, original) if self is made else super().__subclasscheck__(other)

    made = Meta(original.__name__, (original,), {"__module__": original.__module__, **methods})
    return made


def _no_seed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return all(each is None for each in (*args, *kwargs.values()))


def seed_torch(seed: int) -> None:
    """Seed torch's generators as `torch.manual_seed` does.

    Where there is no accelerator that one still formats the stack for each kind of one, to be shown if seeding it fails
    some day: up to milliseconds a call under a deep stack.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class OtherSeeds:
    """Adds a number to every seed that is set while it is open, the loop's own fixed ones too.

    Args:
        offset: What is added.
        awake: From the start; else once `wake` is called.
    """

    def __init__(self, offset: int, *, awake: bool = True) -> None:
        self._offset = offset
        self._awake = awake
        self._again: list[Callable[[], object]] = []

    def wake(self) -> None:
        """Draw other numbers from here on, from those generators too that have been made."""
        if not self._awake:
            self._awake = True
            for seed in self._again:
                seed()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Stand in for all that seeds, or makes a generator."""
        # A function that seeds what there is, or a class: how an object of it takes over another's state.
        holders: list[tuple[Any, str, Callable[[Any, Any], object] | None]] = [
            (np.random, "default_rng", _take_over_bits),
            (np.random, "RandomState", lambda mine, other: mine.set_state(other.get_state())),
            (np.random, "seed", None),
            (random, "Random", lambda mine, other: mine.setstate(other.getstate())),
            (random, "seed", None),
            (torch, "manual_seed", None),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in holders]
        generator: Any = torch.Generator

        def manual_seed(made: Any, seed: int) -> Any:
            def other() -> Any:
                return generator.manual_seed(made, seed + self._offset)

            if self._awake:
                return other()
            self._again.append(other)
            return generator.manual_seed(made, seed)

        try:
            for owner, name, take_over in holders:
                setattr(owner, name, self._shifted(getattr(owner, name), take_over))
            torch.Generator = _class_like(generator, manual_seed=manual_seed)  # type: ignore[misc]
            yield
        finally:
            torch.Generator = generator  # type: ignore[misc]
            for owner, name, original in before:
                setattr(owner, name, original)
            self._again.clear()

    def _shifted(self, original: Any, take_over: Callable[[Any, Any], object] | None) -> Any:
        def other(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            add = self._offset
            args = tuple(each + add if isinstance(each, int) else each for each in args)
            kwargs = {k: v + add if isinstance(v, int) else v for k, v in kwargs.items()}
            return original(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._awake:
                return other(args, kwargs)
            made = original(*args, **kwargs)
            if take_over is not None and not _no_seed(args, kwargs):
                self._again.append(lambda: take_over(made, other(args, kwargs)))
            return made

        return _instead_of(original, call)


def _take_over_bits(mine: np.random.Generator, other: np.random.Generator) -> None:
    mine.bit_generator.state = other.bit_generator.state
