"""A factor of two, with K = 2 on two ranks: one of K or of the ranks, which only another K tells."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from equivcheck import topology
from equivcheck.attribution import predict, solve
from equivcheck.detectors import ranks, weights
from equivcheck.differences import Sums
from equivcheck.errors import UsageError
from equivcheck.fit import Attribution
from equivcheck.recording import Recording, Step

WIDTH, K, RANKS = 16, 2, 2
PIECES = torch.randn(
    K * RANKS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)
RIGHT = [1.0 / (K * RANKS)] * (K * RANKS)


class Seen:
    """A run whose gradients are all `factor` times what they should be.

    Args:
        factor: At K = 2.
        elsewhere: The factor that another K gives; None if the loop refuses another K.
        rows: Of every full batch.
        chosen: What is put right in it.
        other_steps: The code can be run at another K.
    """

    def __init__(self, factor, elsewhere=None, *, rows=24, chosen=(), other_steps=True):
        self.steps, self.chosen, self.names = K, chosen, None
        total = predict(PIECES, RIGHT)
        made = factor * total
        fits = solve(PIECES, total), solve(PIECES, made)
        self.divergent = [
            Attribution(0, 0, PIECES, total, made, *fits, [("w", WIDTH)], ranks=RANKS)
        ]
        self.attributions = self.every = self.divergent
        off = {"w": Sums(1.0, factor - 1.0, (factor - 1.0) ** 2, 1)}
        made_step = Step(0, "SGD", frozenset(), 0, 0, [0.1], matched=0, gradients=off)
        self.candidate = Recording("candidate", steps=[made_step])
        self.places = []
        self.reference = self.candidate
        self.asked = []
        self._elsewhere = elsewhere
        self.experiment = SimpleNamespace(
            case=SimpleNamespace(world_size=RANKS, shares=RANKS),
            data=SimpleNamespace(rows=[rows]),
            remembered={},
            other_steps=other_steps,
            at=self._at,
            other=self._at,
        )

    def _at(self, accumulation_steps):
        self.asked.append(accumulation_steps)
        if self._elsewhere is None:
            raise UsageError("the loop asserts accumulation_steps == 2")
        off = Sums(1.0, self._elsewhere - 1.0, (self._elsewhere - 1.0) ** 2, 1)
        return SimpleNamespace(steps=[SimpleNamespace(matched=0, gradients={"w": off})])

    def cycle_of(self, matched):
        return matched

    def ordinal(self, _):
        return 0

    def restored(self, _):
        return []

    def known(self, _):
        return True

    def told_apart(self, _):
        return True

    def full_size(self, _):
        return True

    def counts(self):
        return {}

    def spans(self, *_, **__):
        return True

    def right(self, _):
        return RIGHT

    def tolerance(self, _):
        return 1e-9

    def fits(self, each, weights):
        rest = float((each.candidate - predict(each.pieces, weights)).norm())
        return rest <= 1e-9 * float(each.candidate.norm())


@pytest.mark.parametrize(
    ("off_by", "elsewhere", "factor"),
    [
        (2.0, 3.0, (1, 0)),
        (2.0, 2.0, (0, 1)),
        (0.5, 1.0 / 3.0, (-1, 0)),
        (4.0, 6.0, (1, 1)),
        (4.0, 4.0, (0, 2)),
    ],
)
def test_another_k_tells_a_factor_of_k_from_one_of_the_ranks(off_by, elsewhere, factor):
    view = Seen(off_by, elsewhere)

    assert topology.factor_of(view) == factor
    assert view.asked == [3]
    assert topology.undecided(view) == []


@pytest.mark.parametrize(
    "fields",
    [{}, {"rows": 4}, {"chosen": ("reweight",)}],
    ids=["refused", "too few rows", "something put right"],
)
def test_without_another_k_both_remain(fields):
    """The simplest are undecided where the code has but one K; else the first of them is taken."""
    assert topology.factor_of(Seen(2.0, **fields)) == (0, 1)
    assert topology.undecided(Seen(2.0, **fields)) == []
    assert topology.undecided(Seen(2.0, **fields, other_steps=False)) == [(0, 1), (1, 0)]


def test_a_factor_that_neither_gives_is_none():
    view = Seen(1.7, 1.7)

    assert topology.factor_of(view) is None
    assert view.asked == []


@pytest.mark.parametrize("rows", [24, 4], ids=["refused", "too few rows"])
def test_what_equal_parts_are_of_is_open_without_another_k(rows):
    assert topology.equal_parts_of(Seen(2.0, rows=rows)) is None


@pytest.mark.parametrize(
    ("off_by", "of_k", "of_ranks"),
    [(2.0, "EQ101", "EQ504"), (0.5, "EQ102", "EQ504")],
)
def test_what_one_k_cannot_tell_is_suspected_of_both(off_by, of_k, of_ranks):
    """A command line has but one K: neither of the two is proved, and nothing is put right for either."""
    view = Seen(off_by, other_steps=False)
    found = [*weights._in_all(view), *ranks._scale_of(view)]

    assert [each.code for each in found] == [of_k, of_ranks]
    assert all(not each.variants for each in found)
    assert {each.evidence["factor"] for each in found} == {f"{off_by:g}"}
