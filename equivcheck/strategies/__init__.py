"""Hypothesis strategies for batches, cuts, models and loops, for tests of training code.

    pip install 'equivcheck[hypothesis]'

What is drawn is small and prints as the call that makes it, and shrinks to the plainest thing that still fails:

    @given(strategies.batches("tokens"), strategies.accumulation_steps())
    def test_any_batch(batches, k):
        equivcheck.check(build=build, batches=batches, train=train, accumulation_steps=k)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from equivcheck.case import SPLITS
from equivcheck.strategies._batches import Batches, Classes, Tokens, Values
from equivcheck.strategies._loop import (
    LAYERS,
    OPTIMIZERS,
    PRECISIONS,
    SCHEDULES,
    STYLES,
    Layer,
    Loop,
    Model,
)

__all__ = [
    "LAYERS",
    "OPTIMIZERS",
    "PRECISIONS",
    "SCHEDULES",
    "STYLES",
    "Batches",
    "Classes",
    "Cut",
    "Layer",
    "Loop",
    "Model",
    "Tokens",
    "Values",
    "accumulation_steps",
    "batches",
    "cuts",
    "layers",
    "loops",
    "max_norms",
    "optimizers",
    "precisions",
    "scales",
    "schedules",
    "splits",
    "styles",
]

KINDS = ("values", "classes", "tokens")
SEEDS = 1000


@dataclass(frozen=True)
class Cut:
    """How full batches are cut, as keywords of `check`: `check(..., **cut.keywords)`.

    Attributes:
        accumulation_steps: K.
        split: "even" or "uneven".
    """

    accumulation_steps: int
    split: str = "even"

    @property
    def keywords(self) -> dict[str, Any]:
        """Return the two as keyword arguments."""
        return {"accumulation_steps": self.accumulation_steps, "split": self.split}


def sizes(
    *, min_rows: int = 2, max_rows: int = 9, max_steps: int = 2, tails: bool = True
) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw the rows of full batches: all equal, the last perhaps shorter.

    Args:
        min_rows: Rows of a full batch, at least.
        max_rows: Rows of a full batch, at most.
        max_steps: Full batches, at most.
        tails: Whether a last one may be shorter.
    """

    def tailed(rows: int, steps: int, tail: int) -> tuple[int, ...]:
        last = rows if not tails or steps == 1 or not 0 < tail < rows else tail
        return (rows,) * (steps - 1) + (last,)

    return st.builds(
        tailed,
        st.integers(min_rows, max_rows),
        st.integers(1, max_steps),
        st.integers(0, max(max_rows - 1, 0)),
    )


def batches(kind: str | None = None, **limits: Any) -> st.SearchStrategy[Batches]:
    """Draw full batches: a `batches` function with a readable repr.

    Ragged tokens, padding down to one valid token, rows and micro-batches that are ignored altogether, classes that
    are nearly all the same, sizes that few K divide, a shorter last batch.

    Args:
        kind: "values", "classes" or "tokens"; by default any.
        limits: `min_rows`, `max_rows`, `max_steps` and `tails`, as keywords.
    """
    chosen = KINDS if kind is None else (kind,)
    drawn: dict[str, st.SearchStrategy[Any]] = {
        "values": st.builds(Values, sizes(**limits), st.integers(0, SEEDS)),
        "classes": st.builds(Classes, _per_row(_labels, limits), st.integers(0, SEEDS)),
        "tokens": st.builds(Tokens, _per_row(_valid, limits), st.integers(0, SEEDS)),
    }
    return st.one_of(*(drawn[each] for each in chosen))


def _per_row(draw: Any, limits: dict[str, Any]) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    return sizes(**limits).flatmap(lambda rows: st.tuples(*map(draw, rows)))


def _labels(rows: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw classes: one that has nearly all rows, or whatever."""
    imbalanced = st.integers(0, rows - 1).map(
        lambda place: tuple(int(row == place) for row in range(rows))
    )
    return st.one_of(imbalanced, st.tuples(*[st.integers(0, 4)] * rows))


def _valid(rows: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw numbers of valid tokens: one each, a run of rows without any, or whatever; never none at all."""
    single = st.just((1,) * rows)
    empty_run = st.tuples(st.integers(0, rows - 1), st.integers(1, 6)).map(
        lambda drawn: (0,) * drawn[0] + (drawn[1],) * (rows - drawn[0])
    )
    ragged = st.tuples(*[st.integers(0, 6)] * rows)
    return st.one_of(single, empty_run, ragged).map(
        lambda counts: counts if any(counts) else (1, *counts[1:])
    )


def accumulation_steps(batches: Batches | None = None, limit: int = 9) -> st.SearchStrategy[int]:
    """Draw K: at least 2, and no more than the rows of every full batch but a shorter last one.

    Args:
        batches: The full batches, where they are known.
        limit: The largest K without them.
    """
    most = limit
    if batches is not None:
        rows = batches.rows
        is_tail = len(rows) > 1 and rows[-1] < min(rows[:-1])
        most = min(limit, *(rows[:-1] if is_tail else rows), limit)
    return st.integers(2, max(most, 2))


def splits() -> st.SearchStrategy[str]:
    """Draw how a full batch is cut."""
    return st.sampled_from(SPLITS)


def cuts(batches: Batches | None = None, limit: int = 9) -> st.SearchStrategy[Cut]:
    """Draw K and split together; see `accumulation_steps`."""
    return st.builds(Cut, accumulation_steps(batches, limit), splits())


def layers(max_size: int = 4) -> st.SearchStrategy[tuple[str, ...]]:
    """Draw the layers of a model, by name."""
    return st.lists(st.sampled_from(LAYERS), max_size=max_size).map(tuple)


def optimizers() -> st.SearchStrategy[str]:
    """Draw an optimizer, by name."""
    return st.sampled_from(OPTIMIZERS)


def schedules() -> st.SearchStrategy[str]:
    """Draw a schedule of the learning rate, by name."""
    return st.sampled_from(SCHEDULES)


def precisions() -> st.SearchStrategy[str]:
    """Draw the precision of parameters, or autocast."""
    return st.sampled_from(PRECISIONS)


def styles() -> st.SearchStrategy[str]:
    """Draw how micro-batches are weighted."""
    return st.sampled_from(STYLES)


def max_norms() -> st.SearchStrategy[float | None]:
    """Draw a clip threshold: none, or a power of ten from where it always acts to where it never does."""
    return st.one_of(st.none(), st.integers(-4, 4).map(lambda power: 10.0**power))


def scales() -> st.SearchStrategy[float]:
    """Draw a factor on the loss, 1e-6 to 1e6."""
    return st.one_of(st.just(1.0), st.integers(-6, 6).map(lambda power: 10.0**power))


def loops(
    drawn: st.SearchStrategy[Batches] | None = None, **parts: st.SearchStrategy[Any]
) -> st.SearchStrategy[Loop]:
    """Draw a loop whose accumulation is right, composed of all the parts above.

    Args:
        drawn: Where its batches come from.
        parts: Strategies in place of those above, by the attribute of `Loop`.
    """
    given: dict[str, st.SearchStrategy[Any]] = {
        "layers": layers(),
        "optimizer": optimizers(),
        "schedule": schedules(),
        "max_norm": max_norms(),
        "precision": precisions(),
        "style": styles(),
        "scale": scales(),
    }
    return st.builds(Loop, batches() if drawn is None else drawn, **{**given, **parts})
