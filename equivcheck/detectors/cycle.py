"""Calls at the wrong time: EQ301, EQ303 to EQ307, EQ310, EQ311, EQ402, EQ403, and rescaled gradients, EQ109."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Final

from equivcheck.detectors.clipped import clipped_nowhere
from equivcheck.errors import EquivcheckError
from equivcheck.interventions import Defer, Hold, Intervention, Postpone, Retime, Reweight, Shorten
from equivcheck.recording import Event, Place, Recording, closes
from equivcheck.view import Suspicion, View

# A penalty's gradient points along the weights: |w| to a power below 2 has a cosine above this with normal weights
# (the sign alone: sqrt(2 / pi) = 0.8), what has nothing to do with them about 0.
ALONG_WEIGHTS: Final = 0.5
_BY_HAND: Final = "gradients are clipped by hand behind every backward of a cycle"


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions for every kind of call that was seen inside a cycle."""
    return [
        *_steps(view),
        *_zeroed(view),
        *_called(view, "clip", "EQ306", 22),
        *_unscaled(view),
        *_scales(view),
        *_edited(view),
    ]


def _evidence(calls: list[tuple[Event, Place]]) -> dict[str, object]:
    event, place = calls[0]
    return {"calls_inside_cycles": len(calls), "micro_step": place.micro_step, **event.shown}


def _after_step(view: View, event: Event) -> bool:
    """Return whether a step came between the last backward and this event: it belongs to that step."""
    return any(
        each.kind in {"step", "skipped"} and each.backwards == event.backwards
        for each in view.candidate.timeline
    )


def _zeroed(view: View) -> list[Suspicion]:
    calls = [each for each in view.inside(*zeroing(view)) if not _after_step(view, each[0])]
    if not calls:
        return []
    return [
        Suspicion(
            "EQ301",
            [(Defer("zero_grad"),), (Hold(),)],
            _evidence(calls),
            calls[0][1].cycle,
            20,
        )
    ]


def zeroing(view: View) -> tuple[str, ...]:
    """Return the kinds of events that lose gradients: not clearing them by hand in a loop that keeps its own sums."""
    steps = view.candidate.steps
    own = bool(steps) and all(step.handed_over for step in steps)
    return ("zero_grad",) if own else ("zero_grad", "cleared")


def _called(view: View, kind: str, code: str, rank: int) -> list[Suspicion]:
    calls = [each for each in view.inside(kind) if kind == "clip" or not _after_step(view, each[0])]
    if not calls:
        return []
    return [Suspicion(code, [(Defer(kind),)], _evidence(calls), calls[0][1].cycle, rank)]


def _unscaled(view: View) -> list[Suspicion]:
    found = _called(view, "unscale", "EQ403", 22)
    for each in found:
        # An update() of the scaler inside the cycle wants an unscale_() before it: both wait together.
        each.variants = [(Defer("unscale"),), (Defer("unscale", "scaler"),), (Postpone("unscale"),)]
    return found


def _scales(view: View) -> list[Suspicion]:
    """EQ402: the backwards of one cycle carried different loss scales."""
    changing = rescaled_losses(view)
    if not changing:
        return _scales_by_hand(view)
    cycle = next(iter(changing))
    evidence = {"loss_scales": changing[cycle]}
    factors = {each: [scales[-1] / scale for scale in scales] for each, scales in changing.items()}
    variants = [(Defer("scaler"),), (Reweight(factors),)]
    return [Suspicion("EQ402", variants, evidence, cycle, 21)]


def rescaled_losses(view: View) -> dict[int, list[float]]:
    """Return, for every cycle in which a scaler's loss scale changed, what each backward carried."""
    by_cycle: dict[int, list[float]] = {}
    for place, backward in zip(view.places, view.candidate.backwards, strict=False):
        by_cycle.setdefault(place.cycle, []).append(backward.loss_scale)
    return {cycle: scales for cycle, scales in by_cycle.items() if len(set(scales)) > 1}


def _scales_by_hand(view: View) -> list[Suspicion]:
    """EQ402 without a scaler: the number that the loss is multiplied with last changes inside a cycle."""
    factors: dict[int, list[float]] = {}
    by_cycle: dict[int, list[float]] = {}
    for place, backward in zip(view.places, view.candidate.backwards, strict=False):
        by_cycle.setdefault(place.cycle, []).append(backward.root_scalar)
    for cycle, numbers in by_cycle.items():
        if len(set(numbers)) > 1 and _loss_scales(numbers):
            factors[cycle] = [numbers[-1] / each for each in numbers]
    if not factors:
        return []
    cycle = min(factors)
    evidence = {"loss_scales": by_cycle[cycle]}
    # Before what a factor may be too: scales that double leave geometric weights.
    return [Suspicion("EQ402", [(Reweight(factors),)], evidence, cycle, 24)]


def _loss_scales(numbers: list[float]) -> bool:
    """Return whether numbers look like a loss scale that changes: above 1, apart by powers of two.

    Weights of micro-batches are multiplied with too; they are below 1, and any ratio.
    """
    if not all(each > 1.0 for each in numbers):
        return False
    return all(math.log2(each / numbers[0]).is_integer() for each in numbers)


def _edited(view: View) -> list[Suspicion]:
    """Gradients changed between two backwards, without a call that explains it: EQ109; EQ403, EQ306, EQ107 by hand."""
    explained = {
        each.backwards
        for each, _ in view.inside("clip", "unscale", "zero_grad", "step", "skipped", "cleared")
    }
    calls = [each for each in view.inside("edited") if each[0].backwards not in explained]
    if not calls:
        return []
    event, place = calls[0]
    scale, rest = float(event.detail["scale"]), float(event.detail["rest"])
    backward = view.candidate.backwards[event.backwards - 1]
    evidence = _evidence(calls)
    if rest < 1e-6:
        # Divided by what the loss was multiplied with: a loss scale, of a scaler or by hand. Losses that are multiplied
        # with a number each (a count of tokens) carry no scale.
        carried = {backward.loss_scale, backward.root_scalar} - {1.0}
        if not _loss_scales([each.root_scalar for each in view.candidate.backwards]):
            carried.discard(backward.root_scalar)
        by_hand = any(abs(scale * each - 1.0) < 1e-6 for each in carried)
        if not by_hand and _by_norm(view, calls):
            evidence["because"] = _BY_HAND
            return [Suspicion("EQ306", [(Hold(),)], evidence, place.cycle, 26)]
        return [Suspicion("EQ403" if by_hand else "EQ109", [(Hold(),)], evidence, place.cycle, 26)]
    if event.detail["shrunk"]:
        evidence["because"] = _BY_HAND
        return [Suspicion("EQ306", [(Hold(),)], evidence, place.cycle, 45)]
    if event.detail["along"] < ALONG_WEIGHTS:
        return []  # Noise, say: what was added is no penalty on the weights.
    return [Suspicion("EQ107", [(Hold(),)], evidence, place.cycle, 45)]


def _by_norm(view: View, calls: Sequence[tuple[Event, Place]]) -> bool:
    """Return whether gradients are made shorter by factors that depend on how long they are: those of a clip."""
    factors = [float(event.detail["scale"]) for event, _ in calls]
    if max(factors) > 1.0 + 1e-6 or max(factors) - min(factors) < 1e-6:
        return False
    return not clipped_nowhere(view)


def _steps(view: View) -> list[Suspicion]:
    """Optimizer steps at other times than the ends of the cycles."""
    # Behind the first of several backwards of the last micro-step: there the full batch steps too.
    inside = [
        (event, place)
        for event, place in view.inside("step", "skipped")
        if not closes(view.places, event.backwards - 1)
    ]
    reference, candidate = view.reference, view.candidate
    matched = {step.matched for step in candidate.steps}
    missing = [step for step in reference.steps if step.index not in matched]
    if not inside and not missing:
        return []
    ends = {
        event.backwards
        for event in candidate.timeline
        if event.kind in {"step", "skipped"}
        and 0 < event.backwards <= len(view.places)
        and view.places[event.backwards - 1].last
    }
    found: list[Suspicion] = []
    consumed = {key for step in candidate.steps for key in step.samples}
    tail = view.experiment.data.tail
    if missing and tail:
        only_tail = all({sample for _, sample in step.samples} <= tail for step in missing)
        leaves, straddles = _zeroed_away(view, tail), _straddles(view, tail)
        kept = all(step.samples & consumed for step in missing) and straddles and not leaves
        if only_tail or straddles:
            left = {
                "samples": sum(len(step.samples) for step in missing),
                "optimizer_steps": len(candidate.steps),
                "expected": len(reference.steps),
            }
            code = "EQ310" if kept or not (only_tail or leaves) else "EQ304"
            found.append(Suspicion(code, [(Shorten(),)], left, missing[0].index, 18))
    if not inside and not (missing and not found):
        return found
    # By micro-batch: a loop may differentiate several times in each.
    stepped = {(place.cycle, place.micro_step) for _, place in inside}
    early = {(p.cycle, p.micro_step) for p in view.places if p.micro_step < p.micro_steps - 1}
    every = stepped >= early or _each_micro_batch(candidate)
    consumed_per_step = [len(set(step.samples)) for step in candidate.steps]
    evidence: dict[str, object] = {
        "optimizer_steps": len(candidate.steps),
        "expected": len(reference.steps),
        "samples_per_step": consumed_per_step[:8],
    }
    step = inside[0][1].cycle if inside else missing[0].index
    code = "EQ303" if inside and every and _every_at_another(view) else "EQ311"
    retime = Retime(ends, {event.backwards for event, _ in inside})
    variants: list[tuple[Intervention, ...]] = [(retime,)]
    factor = _recounted(view)
    if code == "EQ311" and factor is not None:
        # The loop divides by the K that it steps by: both come right together.
        factors = {place.cycle: [factor] * place.micro_steps for place in view.places}
        variants.append((retime, Reweight(factors)))
    if code == "EQ311" and (changing := _lengths(view)) is not None:
        variants.append((retime, Reweight(changing)))
    found.append(Suspicion(code, variants, evidence, step, 19))
    return found


def _lengths(view: View) -> dict[int, list[float]] | None:
    """Return, per cycle, the K that the loop stepped by over the true one, where it is not the same in all of them."""
    factors: dict[int, list[float]] = {}
    used = 0
    for step in view.candidate.steps:
        if step.optimizer != view.candidate.steps[0].optimizer:
            return None
        length = step.backwards - step.first_backward
        for place in view.places[step.first_backward : step.backwards]:
            factors.setdefault(place.cycle, []).append(length / place.micro_steps)
        used = step.backwards
    # What no step took, at the end, belongs to a cycle as long as the last one asked for.
    for place in view.places[used:]:
        known = [each for cycle in factors.values() for each in cycle]
        factors.setdefault(place.cycle, []).append(known[-1] if known else 1.0)
    return factors if len({each for cycle in factors.values() for each in cycle}) > 1 else None


def _recounted(view: View) -> float | None:
    """Return the K that the loop steps by, over the true one."""
    steps = view.candidate.steps
    counts = [step.backwards - step.first_backward for step in steps]
    if not counts:
        return None
    usual = max(set(counts), key=counts.count)
    return usual / view.steps if usual != view.steps else None


def _every_at_another(view: View) -> bool:
    """Return whether the loop steps at every micro-batch with another K too: only then K has no part in it."""
    rows = min(view.experiment.data.rows)
    other = next((k for k in (4, 3, 6) if k != view.steps and k <= rows), None)
    if other is None or "dataset" in view.experiment.wants:
        return True
    try:
        recording = view.experiment.at(other)
    except EquivcheckError:
        return True
    return len(recording.steps) >= len(recording.fetched) or _each_micro_batch(recording)


def _each_micro_batch(recording: Recording) -> bool:
    """Return whether one of several optimizers steps as often as micro-batches are handed out."""
    counts = Counter(step.optimizer for step in recording.steps)
    return len(counts) > 1 and max(counts.values()) >= len(recording.fetched)


def _zeroed_away(view: View, tail: set[int]) -> bool:
    """Return whether gradients are zeroed, without a step, behind the last micro-batch of an incomplete cycle."""
    tails = {cycle for (_, sample), cycle in view.cycles.items() if sample in tail}
    ends = {
        index + 1 for index, place in enumerate(view.places) if place.last and place.cycle in tails
    }
    calls = [each for each in view.candidate.timeline if each.backwards in ends]
    stepped = {each.backwards for each in calls if each.kind in {"step", "skipped"}}
    zeroed = {each.backwards for each in calls if each.kind in {"zero_grad", "cleared"}}
    return bool(zeroed - stepped)


def _straddles(view: View, tail: set[int]) -> bool:
    """Return whether an optimizer step took samples of the tail together with others."""
    for step in view.candidate.steps:
        samples = {sample for _, sample in step.samples}
        if samples & tail and samples - tail:
            return True
    return False
