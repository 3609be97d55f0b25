"""The random generators of a process: their states, and other numbers for the length of a forward."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from equivcheck.hooks.base import quiet

__all__ = ["drawing_otherwise", "random_states", "same_states"]

States = tuple[torch.Tensor, Any, Any]


def random_states() -> States:
    """Return the states of torch's (cpu), numpy's and Python's global generators."""
    with quiet():
        return torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()  # noqa: NPY002 - user code's


def same_states(a: States, b: States) -> bool:
    """Return whether no generator has drawn between two looks."""
    return (
        torch.equal(a[0], b[0])
        and a[1][2] == b[1][2]
        and np.array_equal(a[1][1], b[1][1])
        and a[2] == b[2]
    )


@contextmanager
def drawing_otherwise(seed: int) -> Iterator[None]:
    """Draw other numbers inside, and go on outside as if nothing had been drawn."""
    before = random_states()
    with quiet():
        torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - user code draws from the legacy generator too
    random.seed(seed)
    try:
        yield
    finally:
        with quiet():
            torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002 - as above
        random.setstate(before[2])
