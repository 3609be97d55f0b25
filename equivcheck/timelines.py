"""What both runs did, call by call, and which calls have no counterpart in the full batch.

An event is *odd* if it happened between two backwards of one cycle where the full batch has nothing
of its kind between backwards, and a call is *missing* if the full batch makes it in a cycle in which
the accumulated run does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from equivcheck.experiment import Experiment
from equivcheck.recording import Event, Place, Recording

# Events of one run that are kept.
EVENTS: Final = 400
# Cycles of a run that agrees: enough to see what the loop does.
CYCLES: Final = 2
CALLS: Final = ("zero_grad", "cleared", "unscale", "clip", "step", "skipped", "scheduler", "scaler")
_JUDGED: Final = frozenset({*CALLS, "edited", "parameters_changed"})


def timelines(experiment: Experiment, first: int, *, whole: bool) -> dict[str, Any]:
    """Return the events of the full batch and of the accumulated run, each with its place in a cycle.

    Args:
        experiment: The runs of the case.
        first: Cycle that must be among those kept: the first divergent one.
        whole: Keep as many cycles as fit, not only the first few.

    Returns:
        `full_batch` and `accumulated`: dicts of `events` and `left_out`; each event has `event`,
        `optimizer_step` (its cycle), `micro_step` (the backward it followed, -1 before the first)
        and its own details, `odd` if it is; and `missing`, a list of events that should be there.
    """
    cycles = experiment.cycles()
    reference = list(_placed(experiment.reference(), experiment.reference().places(cycles), cycles))
    candidate = list(_placed(experiment.candidate(), experiment.schedule(), cycles))
    usual = {event["event"] for event in reference if not event.pop("last")}
    for event in candidate:
        if not event.pop("last") and event["event"] in _JUDGED - usual:
            event["odd"] = "inside the cycle"
    shown = _cycles_shown(reference, candidate, first, whole=whole)
    return {
        "full_batch": _kept(reference, shown),
        "accumulated": _kept(candidate, shown),
        "missing": list(_missing(reference, candidate, shown)),
    }


def _placed(
    recording: Recording, places: Sequence[Place], cycles: dict[Any, int]
) -> Iterator[dict[str, Any]]:
    fetches = 0
    several = len(recording.optimizers) > 1
    for event in recording.timeline:
        if event.kind == "fetch":
            keys = recording.fetched[fetches] if fetches < len(recording.fetched) else []
            cycle, micro_step, last = cycles.get(keys[0], -1) if keys else -1, None, True
            fetches += 1
        elif 0 < event.backwards <= len(places):
            place = places[event.backwards - 1]
            cycle, micro_step, last = place.cycle, place.micro_step, place.last
        else:
            cycle, micro_step, last = 0, -1, True
        detail = _detail(event, several=several)
        yield {"event": event.kind, "optimizer_step": cycle, "micro_step": micro_step, **detail} | {
            "last": last or event.kind == "backward"
        }


def _detail(event: Event, *, several: bool) -> dict[str, Any]:
    detail = event.shown
    if not several:
        detail.pop("optimizer", None)
    if detail.get("loss_scale") == 1.0:
        del detail["loss_scale"]
    return detail


def _cycles_shown(
    reference: Sequence[dict[str, Any]],
    candidate: Sequence[dict[str, Any]],
    first: int,
    *,
    whole: bool,
) -> set[int]:
    """Return the cycles to keep: the first divergent one, the last, and from the start what fits."""
    counts: dict[int, int] = {}
    for events in (reference, candidate):
        own: dict[int, int] = {}
        for event in events:
            own[event["optimizer_step"]] = own.get(event["optimizer_step"], 0) + 1
        for cycle, count in own.items():
            counts[cycle] = max(counts.get(cycle, 0), count)
    known = sorted(counts)
    order = dict.fromkeys([first, *known[-1:], *known] if whole else [first, *known[:CYCLES]])
    shown: set[int] = set()
    room = EVENTS
    for cycle in order:
        if cycle not in counts or (shown and counts[cycle] > room):
            continue
        shown.add(cycle)
        room -= counts[cycle]
        if not whole and len(shown) == CYCLES:
            break
    return shown


def _kept(events: Sequence[dict[str, Any]], shown: set[int]) -> dict[str, Any]:
    mine = [event for event in events if event["optimizer_step"] in shown]
    return {"events": mine[: 2 * EVENTS], "left_out": len(events) - len(mine[: 2 * EVENTS])}


def _missing(
    reference: Sequence[dict[str, Any]], candidate: Sequence[dict[str, Any]], shown: set[int]
) -> Iterator[dict[str, Any]]:
    made = {(event["event"], event["optimizer_step"]) for event in candidate}
    wanted = dict.fromkeys((event["event"], event["optimizer_step"]) for event in reference)
    for kind, cycle in wanted:
        if kind in CALLS and cycle in shown and (kind, cycle) not in made:
            yield {"event": kind, "optimizer_step": cycle}
