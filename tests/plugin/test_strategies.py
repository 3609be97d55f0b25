"""What the strategies draw: correct subjects of every kind, small and readable once shrunk."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from equivcheck import strategies
from equivcheck.split import cut
from equivcheck.strategies import Classes, Cut, Loop, Tokens, Values

# The first and the last of them; each takes some seconds.
QUICK_LAYERS = (strategies.LAYERS[0], strategies.LAYERS[-1])
QUICK = settings(max_examples=30, suppress_health_check=list(HealthCheck))


def smallest(strategy, condition):
    return find(strategy, condition, settings=settings(max_examples=2000))


@QUICK
@given(strategies.batches())
def test_batches_are_as_stated(drawn):
    """The rows, labels and valid tokens of the tensors are those of the repr, which makes the same again."""
    made = drawn()

    assert tuple(len(next(iter(batch.values()))) for batch in made) == drawn.rows
    again = eval(repr(drawn), {"Values": Values, "Classes": Classes, "Tokens": Tokens})  # noqa: S307
    assert all(
        bool((a[name] == b[name]).all()) for a, b in zip(made, again(), strict=True) for name in a
    )
    if isinstance(drawn, Tokens):
        found = tuple(tuple(int(n) for n in (b["labels"] >= 0).sum(1)) for b in made)
        assert found == drawn.valid
        assert all(map(any, drawn.valid))


@pytest.mark.parametrize(
    ("kind", "condition", "least"),
    [
        ("tokens", lambda b: len(set(b.valid[0])) > 2, "Tokens(valid=((0, 1, 2),))"),
        ("tokens", lambda b: set(b.valid[0]) == {1}, "Tokens(valid=((1, 1),))"),
        ("tokens", lambda b: b.valid[0][:2] == (0, 0), "Tokens(valid=((0, 0, 1),))"),
        ("classes", lambda b: sum(b.labels[0]) == 1 and len(b.labels[0]) > 3, None),
        ("values", lambda b: len(b.rows) == 2 and b.rows[1] < b.rows[0], "Values(rows=(2, 1))"),
        ("values", lambda b: b.rows[0] % 2 and b.rows[0] % 3, "Values(rows=(5,))"),
    ],
    ids=["ragged", "one-valid-token", "ignored-micro-batch", "imbalance", "tail", "indivisible"],
)
def test_every_odd_batch_is_drawn_and_shrinks(kind, condition, least):
    """The smallest one of its sort is what a reader would have written."""
    found = smallest(strategies.batches(kind), condition)

    assert sum(found.rows) <= 5
    if least is not None:
        assert sorted(map(sorted, getattr(found, "valid", [found.rows]))) == sorted(
            map(sorted, getattr(eval(least), "valid", [eval(least).rows]))  # noqa: S307
        )


@QUICK
@given(strategies.batches().flatmap(lambda b: st.tuples(st.just(b), strategies.cuts(b))))
def test_cuts_fit_their_batches(drawn):
    """A split is a partition: every row in exactly one micro-batch, none of them empty."""
    batches, how = drawn
    for rows in batches.rows[:1]:
        sizes = cut(rows, how.accumulation_steps, how.split)

        assert sum(sizes) == rows
        assert min(sizes) >= 1
    assert how.keywords == {"accumulation_steps": how.accumulation_steps, "split": how.split}


def _valid(batches, sizes):
    """Return the numbers of valid tokens of each micro-batch of the first full batch, row by row."""
    rows = iter(batches.valid[0]) if isinstance(batches, Tokens) else iter(())
    return [list(itertools.islice(rows, size)) for size in sizes]


ODD = {
    "ragged tokens": lambda b, sizes: any(len(set(part)) > 1 for part in _valid(b, sizes)),
    "padding down to one valid token": lambda b, sizes: 1 in map(sum, _valid(b, sizes)),
    "an all-ignored micro-batch": lambda b, sizes: (
        isinstance(b, Tokens) and 0 in map(sum, _valid(b, sizes))
    ),
    "class imbalance": lambda b, _: (
        isinstance(b, Classes)
        and max(Counter(b.labels[0]).values()) >= 0.8 * len(b.labels[0]) >= 4
        and len(set(b.labels[0])) > 1
    ),
    "a batch that K does not divide": lambda b, sizes: b.rows[0] % len(sizes) > 0,
    "a micro-batch of one row": lambda b, sizes: 1 in sizes,
    "a shorter last batch": lambda b, _: len(b.rows) > 1 and b.rows[-1] < b.rows[0],
}


def test_every_odd_cut_occurs():
    """Each sort of batch and cut that is promised is among a hundred drawn ones, not only in principle."""
    seen = Counter()

    @settings(max_examples=100, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategies.batches().flatmap(lambda b: st.tuples(st.just(b), strategies.cuts(b))))
    def collect(drawn):
        batches, how = drawn
        sizes = cut(batches.rows[0], how.accumulation_steps, how.split)
        seen.update(name for name, is_it in ODD.items() if is_it(batches, sizes))

    collect()
    assert set(ODD) == set(seen)
    assert min(seen.values()) >= 2, seen


@pytest.mark.parametrize(
    "layer",
    [
        each if each in QUICK_LAYERS else pytest.param(each, marks=pytest.mark.slow)
        for each in strategies.LAYERS
    ],
)
def test_loops_shrink_to_the_layer_that_matters(layer):
    """All else is gone, and the repr is one short line that makes the loop again."""
    found = smallest(strategies.loops(), lambda loop: layer in loop.layers)

    assert found == Loop(found.batches, layers=(layer,))
    assert len(repr(found)) < 80
    assert eval(repr(found), vars(strategies)) == found  # noqa: S307


def test_every_part_is_drawn():
    """Optimizers, schedules, precisions, styles, scales, clips: each value turns up."""
    seen = {name: set() for name in ("optimizer", "schedule", "precision", "style", "scale")}

    @settings(max_examples=400, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(strategies.loops())
    def collect(loop):
        for name, values in seen.items():
            values.add(getattr(loop, name))

    collect()
    assert seen["optimizer"] == set(strategies.OPTIMIZERS)
    assert seen["schedule"] == set(strategies.SCHEDULES)
    assert seen["precision"] == set(strategies.PRECISIONS)
    assert seen["style"] == set(strategies.STYLES)
    assert {1e-6, 1e6} <= {float(f"{scale:.0e}") for scale in seen["scale"]}


def test_a_cut_is_readable():
    assert repr(Cut(3, "uneven")) == "Cut(accumulation_steps=3, split='uneven')"
