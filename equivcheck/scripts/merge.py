"""Several rank processes as one recording: their samples together, and of each number the worst."""

from __future__ import annotations

from collections.abc import Sequence

from equivcheck.attach.store import Facts
from equivcheck.differences import Sums
from equivcheck.recording import Recording

__all__ = ["merged"]

_SUMS = ("gradients", "applied", "parameters", "state", "buffers", "shadows")


def merged(ranks: Sequence[Recording], facts: Sequence[Facts]) -> Recording:
    """Return the recordings of the ranks of one run as one: rank 0's, with what the others saw.

    Args:
        ranks: One recording per rank, rank 0 first.
        facts: Of the same processes.
    """
    whole = ranks[0]
    if len(ranks) == 1:
        return whole
    count = min(len(each.fetched) for each in ranks)
    whole.fetched = [
        [key for each in ranks for key in each.fetched[index]] for index in range(count)
    ]
    for index, step in enumerate(whole.steps):
        others = [each.steps[index] for each in ranks[1:] if index < len(each.steps)]
        step.samples = step.samples.union(*(each.samples for each in others))
        if any(each.matched != step.matched for each in others):
            step.matched = None
        for name in _SUMS:
            mine: dict[str, Sums] = getattr(step, name)
            for other in others:
                theirs: dict[str, Sums] = getattr(other, name)
                mine = {
                    key: max((each[key] for each in (mine, theirs) if key in each), key=_difference)
                    for key in mine | theirs
                }
            setattr(step, name, mine)
        for other in others:
            step.finite &= other.finite
            step.none_mismatch += [n for n in other.none_mismatch if n not in step.none_mismatch]
    whole.lowered = {name: dtype for each in ranks for name, dtype in each.lowered.items()}
    whole.dropout = any(each.dropout for each in ranks)
    whole.random_drawn = any(each.random_drawn for each in ranks)
    whole.notes += [f"{len(facts)} ranks"]
    return whole


def _difference(sums: Sums) -> float:
    return sums.dd if sums.finite else float("inf")
