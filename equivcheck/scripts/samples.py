"""Where two commands part in the samples that they use: the first optimizer step, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.feed import Key
from equivcheck.recording import Recording, Step

__all__ = ["first_difference"]


def first_difference(
    firsts: Sequence[Step], candidate: Recording, cycles: Mapping[Key, int], tail: set[int]
) -> dict[str, Any]:
    """Return the first optimizer step whose samples the accumulated run did not use as the full batch did.

    Args:
        firsts: The full batch's steps, the first for every set of samples.
        candidate: The accumulated run.
        cycles: The full batch's step of every sample.
        tail: Samples of incomplete full batches, which may be left out.

    Returns:
        The step and what is known of it; empty if there is no such step.
    """
    order = {step.index: place for place, step in enumerate(firsts)}
    seen: set[Key] = set()
    found: list[dict[str, Any]] = []
    for number, rank in enumerate(candidate.ranks or [candidate]):
        furthest = 0
        for index, keys in enumerate(rank.fetched):
            places = {order[cycles[key]] if key in cycles else -1 for key in keys}
            here = max(places)
            if -1 in places or len(places) > 1 or here < furthest:
                step = min((each for each in places if each >= 0), default=furthest)
                found.append(
                    {
                        "optimizer_step": step,
                        "micro_batch": index,
                        "rank": number,
                        "rows": len(keys),
                        "never_used_by_the_full_batch": sum(k not in cycles for k in keys),
                    }
                )
                break
            furthest = max(furthest, here)
            seen.update(keys)
    if not found:
        for place, full in enumerate(firsts):
            missing = {number for _, number in full.samples - seen}
            if missing and not missing <= tail:
                return {
                    "optimizer_step": place,
                    "rows": len(full.samples),
                    "not_used_by_the_accumulated_run": len(missing),
                }
    return min(found, key=lambda each: each["optimizer_step"], default={})
