"""The full batch's own ranks as one recording: what they used together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from equivcheck.recording import Recording

__all__ = ["together"]


def together(ranks: Sequence[Recording]) -> Recording:
    """Return the recordings of the ranks of a full-batch run as one: rank 0's, with the samples of all."""
    if len(ranks) == 1:
        return ranks[0]
    count = min(len(each.fetched) for each in ranks)
    fetched = [[key for each in ranks for key in each.fetched[index]] for index in range(count)]
    steps = [
        replace(step, samples=step.samples.union(*(r.steps[i].samples for r in ranks[1:])))
        for i, step in enumerate(ranks[0].steps[: min(len(each.steps) for each in ranks)])
    ]
    return replace(ranks[0], fetched=fetched, steps=steps, ranks=list(ranks))
