"""A denominator's rule where no other K can be run, as of a command line: what one step gives has to hold in others."""

from __future__ import annotations

import pytest
import torch

from equivcheck.attribution import solve
from equivcheck.denominators import grouped
from equivcheck.fit import Attribution
from equivcheck.wrong_denominator import _confirmed_by_steps

LIMIT = 1e-9


def off_by(factor, index, micro_steps=2):
    """Return the weights of a cycle whose gradient is so many times the full batch's."""
    generator = torch.Generator().manual_seed(index)
    pieces = torch.randn(micro_steps, 16, dtype=torch.float64, generator=generator)
    reference = pieces.mean(0)
    candidate = factor * reference
    return Attribution(
        index,
        index,
        pieces,
        reference,
        candidate,
        solve(pieces, reference),
        solve(pieces, candidate),
        [("w", 16)],
    )


class Seen:
    """The steps that differ, and what their micro-batches hold."""

    def __init__(self, divergent, **counts):
        self.divergent = divergent
        self._counts = counts

    def tolerance(self, _):
        return LIMIT

    def counts(self):
        return self._counts


def rule_of(*divergent, **counts):
    seen = Seen(list(divergent), **counts)
    first = divergent[0]
    scale = float(first.candidate @ first.reference) / float(first.reference @ first.reference)
    return _confirmed_by_steps(seen, first, scale)


def test_one_step_confirms_nothing():
    assert rule_of(off_by(0.75, 0)) is None


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([(0.75, 2)], "the same at every K: read from one optimizer step, it holds in 1 others"),
        ([(1.125, 3)], "in proportion to K: read from one optimizer step, it holds in 1 others"),
        (
            [(0.5, 3), (0.75, 2)],
            "in inverse proportion to K: read from one optimizer step, it holds in 2 others",
        ),
        ([(0.6, 2)], None),
        ([(0.75, 2), (0.6, 2)], None),
    ],
)
def test_a_rule_of_k_holds_in_a_tail_too(others, told):
    """An incomplete cycle has another K."""
    steps = [off_by(factor, index, k) for index, (factor, k) in enumerate(others, 1)]

    assert rule_of(off_by(0.75, 0), *steps) == told


@pytest.mark.parametrize(
    ("factors", "counts", "told"),
    [
        ((52 / 53, 40 / 41), [[25, 27], [20, 20]], "the count is off by the same number (tokens)"),
        ((52 / 54, 41 / 40), [[25, 27], [21, 20]], "K times the last micro-batch's count (tokens)"),
        ((52 / 54, 41 / 42), [[25, 27], [21, 20]], "K times the largest count (tokens)"),
        ((52 / 54, 0.9), [[25, 27], [21, 20]], None),
        ((52 / 54, 0.9), [[25, 27], [0, 0]], None),
        ((52 / 54, 0.9), [[25, 27], []], None),
    ],
    ids=["off by one", "the last", "the largest", "neither", "nothing counted", "unknown"],
)
def test_a_rule_of_counts_holds_with_other_counts(factors, counts, told):
    steps = [off_by(factor, index) for index, factor in enumerate(factors)]
    rule = rule_of(*steps, tokens=counts)

    assert rule == (told and f"{told}: read from one optimizer step, it holds in 1 others")


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        (1, {"": [1, 2, 3, 4]}),
        (2, {"": [1, 2, 3, 4], " of all ranks": [4, 6]}),
        (3, {"": [1, 2, 3, 4]}),
    ],
)
def test_counts_of_all_ranks_are_those_of_one_micro_step(shares, told):
    """Rank 0's micro-batches come first. Counts that are not the same number on all ranks have no micro-steps."""
    assert grouped([1, 2, 3, 4], shares) == told
