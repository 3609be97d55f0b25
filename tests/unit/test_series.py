"""What a case carries for its report: series in a budget, and the timelines of both runs."""

from __future__ import annotations

import base64
import math
import zlib
from types import SimpleNamespace

import pytest

from equivcheck import series
from equivcheck.differences import Sums
from equivcheck.timelines import CYCLES, EVENTS, _cycles_shown, _missing


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.3.mlp.fc2.weight", "blocks.*.mlp.fc2"),
        ("head.bias", "head"),
        ("weight", "weight"),
    ],
)
def test_repeated_blocks_are_one_kind(name, kind):
    """Numbers are left out, and a parameter of the model itself is its own kind."""

    assert series.kind_of(name) == kind


@pytest.mark.parametrize(
    ("multiple", "byte"),
    [(None, 0), (0.0, 1), (1e-9, 2), (1e-3, 2), (1.0, 38), (1e30, 254), (math.inf, 255)],
)
def test_a_cell_is_one_byte(multiple, byte):
    """Twelve steps per decade from 1e-3 on."""

    assert series.byte_of(multiple) == byte


@pytest.mark.parametrize("multiple", [2e-2, 1.0, 3.7e5, 8e14])
def test_a_byte_says_the_multiple_to_a_tenth(multiple):
    """As the result states how to read it."""
    byte = series.byte_of(multiple)

    assert 10 ** ((byte - 2) / 12 - 3) == pytest.approx(multiple, rel=0.11)


def test_cells_are_packed_row_by_row():
    """And unpacked by anyone who has zlib."""
    packed = series.encode([[1.0, None], [0.0, math.inf]])

    assert zlib.decompress(base64.b64decode(packed)) == bytes([38, 0, 1, 255])


def test_of_many_steps_the_worst_are_kept():
    """A spike of one step among 5,000, the first and the last."""
    steps = {
        i: SimpleNamespace(gradients={"w": Sums(1.0, 0.0, 9.0 if i == 1234 else 1e-30, 1)})
        for i in range(5000)
    }
    chosen = series._chosen(SimpleNamespace(steps=[None] * 5000), steps)

    assert len(chosen) <= series.POINTS + 2
    assert {0, 1234, 4999} <= set(chosen)
    assert series._chosen(SimpleNamespace(steps=[None] * 3), {}) == [0, 1, 2]


def test_a_call_that_only_the_full_batch_makes_is_missing():
    """In the cycles that are shown; what both leave out is not."""
    full = [{"event": kind, "optimizer_step": c} for c in (0, 1) for kind in ("step", "zero_grad")]
    mine = [
        {"event": "step", "optimizer_step": 0},
        {"event": "step", "optimizer_step": 1},
        {"event": "zero_grad", "optimizer_step": 1},
    ]

    assert list(_missing(full, mine, {0, 1})) == [{"event": "zero_grad", "optimizer_step": 0}]
    assert list(_missing(full, mine, {1})) == []


@pytest.mark.parametrize(
    ("found", "multiple"),
    [
        (None, None),
        (Sums(1.0, 0.0, 0.0, 1), 0.0),
        (Sums(1.0, 0.0, 4.0, 1), 200.0),
        (Sums(math.nan, 0.0, 0.0, 1, finite=False), math.inf),
    ],
    ids=["absent", "equal", "off by 2", "not finite"],
)
def test_a_difference_is_told_in_multiples_of_the_noise(found, multiple):
    """Of a parameter without a gradient in this step there is none to tell."""
    step = SimpleNamespace(matched=0, gradients={} if found is None else {"w": found})
    noise = SimpleNamespace(limit=lambda *_: 1.0)

    assert series.multiple_of(step, noise, "w") == (multiple and pytest.approx(multiple))


def placed(*cycles, each=3):
    return [{"event": "step", "optimizer_step": cycle} for cycle in cycles for _ in range(each)]


@pytest.mark.parametrize(
    ("events", "first", "whole", "shown"),
    [
        (placed(0, 1, 2, 3), 0, False, {0, 1}),
        (placed(0, 1, 2, 3), 3, False, {0, 3}),
        (placed(0, 1, 2, 3), 2, True, {0, 1, 2, 3}),
        (placed(1, 2, 3), 0, True, {1, 2, 3}),
        (placed(0, 1, 2, each=EVENTS // 2), 1, True, {1, 2}),
        (placed(0, 1, each=EVENTS + 1), 1, True, {1}),
    ],
    ids=[
        "agrees",
        "the divergent one",
        "all",
        "no event in the first",
        "what fits",
        "one is too much",
    ],
)
def test_the_divergent_cycle_and_the_last_are_shown_before_others(events, first, whole, shown):
    assert CYCLES == 2
    assert _cycles_shown(events, [], first, whole=whole) == shown
