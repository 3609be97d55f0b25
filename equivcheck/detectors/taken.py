"""What some ranks do to their gradients between the last backward of a cycle and the step: EQ505, EQ506.

R ranks, each holding the gradient whole, or a part of it. A change that all of them make alike is looked for elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from equivcheck.attribution import solve
from equivcheck.detectors.ranks import Gradients, gradient_spread, spread, steps_of
from equivcheck.experiment import Interventions
from equivcheck.interventions import ScaleParts, Synchronise, TakeFrom
from equivcheck.noise import SAFETY
from equivcheck.recording import Event, Recording, Step
from equivcheck.verdict import overall
from equivcheck.view import Suspicion, View

# What a hand-written clip makes longer is rounding; what it makes shorter it shortens by more than that.
_SAME: Final = 1e-6

# What a clip adds to a norm before it divides by it (torch's clips add 1e-6) is far below the norm itself.
_EPSILON: Final = 1e-3


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions where ranks did something of their own to a gradient before they stepped."""
    ranks = view.candidate.ranks
    if len(ranks) < 2 or view.judgement.first("gradients", "applied") is None:
        return []
    steps = [step for each in ranks for step in each.steps]
    is_shared_out = any(step.parts for step in steps) or len({*map(_names, steps)}) > 1
    return _parts_clipped(view) if is_shared_out else _replicas_changed(view)


def _names(step: Step) -> frozenset[str]:
    return frozenset(step.sample)


def _replicas_changed(view: View) -> list[Suspicion]:
    """EQ505, EQ506: ranks that hold gradients whole change them, each in its own way."""
    limit = SAFETY * view.experiment.noise().floor()
    for index in range(len(view.candidate.steps)):
        steps = steps_of(view.candidate, index)
        if len(steps) < view.experiment.case.world_size:
            return []
        taken_apart = _applied_apart(steps)
        if gradient_spread(steps) <= limit < taken_apart:
            return [_changed_by_some(view, index, taken_apart)]  # A call of a clip that some make.
        if taken_apart <= limit and len({each.clipped for each in steps}) > 1:
            # Some ranks call a clip, and what they clip is reduced behind it.
            found = _clipped_before(view, index, _as_left(view, index))
            if found is not None:
                return [found]
        apart = max(gradient_spread(steps), taken_apart)
        clips = any(event.kind == "clip" for event in _events(view.candidate.ranks, index))
        if apart <= limit and clips:
            continue
        as_left = _as_left(view, index)
        if not as_left:
            return []
        if apart > limit:
            return [] if spread(as_left) > limit else [_changed_by_some(view, index, apart)]
        found = _clipped_before(view, index, as_left) if spread(as_left) > limit else None
        if found is not None:
            return [found]
    return []


def _clipped_before(view: View, index: int, as_left: Sequence[Gradients]) -> Suspicion | None:
    """EQ506: some ranks, or all, make their gradients shorter before these are reduced, each by its own norm."""
    shares = _shares(view, index, as_left)
    if not shares:
        return None
    evidence: dict[str, object] = {"share_of_each_rank": shares}
    variants: list[Interventions] = [(Synchronise(),)]
    clipping = _clipping(view)
    if len(clipping) < len(shares):
        factors = {}
        for step in view.candidate.steps:
            if step.matched is not None:
                right = _of_full_batch(view, step.matched)
                used = 1.0 + len(clipping) * (right - 1.0) / len(shares)
                factors[view.cycle_of(step.matched)] = [right / used] * len(shares)
        # Reduced before the clip, the mean of clipped and unclipped copies is to be that of clipped ones.
        variants.append((Synchronise(), ScaleParts(factors), TakeFrom(min(clipping))))
        evidence["ranks_that_clip"] = sorted(clipping)
        evidence["fix"] = "clip after the gradients are reduced, on every rank"
    return Suspicion("EQ506", variants, evidence, index, 20, is_seen=True)


def _shares(view: View, index: int, as_left: Sequence[Gradients]) -> list[float]:
    """Return what each rank's gradient counts in the mean that all step with, if that is what a clip leaves."""
    steps = steps_of(view.candidate, index)
    # A clip that was called is seen before it: what all step with is what a rank without one has.
    taken = next((each for each in steps if not each.clipped), steps[0])
    return _shortened(as_left, taken.sample)


def _clipping(view: View) -> set[int]:
    """Return the ranks that make their gradients shorter in any step."""
    found: set[int] = set()
    for index in range(len(view.candidate.steps)):
        shares = _shares(view, index, _as_left(view, index))
        found |= {rank for rank, share in enumerate(shares) if share < 1.0 - _SAME}
    return found


def _of_full_batch(view: View, matched: int) -> float:
    """Return what the full batch multiplies its gradient with before the step: by a clip, called or by hand."""
    step = view.experiment.left_by_full_batch().steps[matched]
    by_hand = _factor(step.left, step.sample)
    kept = view.reference.kept[matched]
    pairs = [
        (before, kept.applied[name])
        for name, before in kept.gradients.items()
        if before is not None and kept.applied[name] is not None
    ]
    before = math.hypot(*(float(each.norm()) for each, _ in pairs))
    after = math.hypot(*(float(each.norm()) for _, each in pairs if each is not None))
    return (by_hand or 1.0) * (after / before if before else 1.0)


def _parts_clipped(view: View) -> list[Suspicion]:
    """EQ506 without a call: what each rank multiplies its part by is not what the full batch multiplies the whole by.

    The factors of all of them have to be those of clips.
    """
    if any(event.kind == "clip" for each in view.candidate.ranks for event in each.timeline):
        return []
    alone = view.experiment.left_by_full_batch().steps
    ranks = [each.steps for each in view.experiment.left_on_ranks(view.chosen).ranks]
    whole = _clips(alone)
    holding = [rank for rank, each in enumerate(ranks) if any(_holds(step) for step in each)]
    parts = [_clips(ranks[rank]) for rank in holding]
    if not whole or not parts or not all(parts):
        return []
    factors: dict[int, list[float]] = {}
    first: tuple[int, list[float], float] | None = None
    for index, step in enumerate(view.candidate.steps):
        if step.matched is None:
            continue
        right, used = whole[step.matched], [each[index] for each in parts if index < len(each)]
        if len(used) < len(parts):
            return []
        by_rank = dict(zip(holding, used, strict=True))
        factors[view.cycle_of(step.matched)] = [
            right / by_rank.get(rank, right) for rank in range(len(ranks))
        ]
        if first is None and any(abs(each / right - 1.0) > _SAME for each in used):
            first = index, used, right
    if first is None:
        return []
    evidence: dict[str, object] = {"factor_of_each_rank": first[1], "factor_of_the_whole": first[2]}
    return [Suspicion("EQ506", [(ScaleParts(factors),)], evidence, first[0], 21)]


def _holds(step: Step) -> bool:
    """Return whether a rank holds a part of any gradient: of few rows there is none for the last of many ranks."""
    return any(each is not None and not bool(each.isnan().all()) for each in step.sample.values())


def _clips(steps: Sequence[Step]) -> list[float]:
    """Return the factor of every step, if all are a clip's: 1, or less where gradients of one norm are left."""
    found = [(_factor(each.left, each.sample), each.norm) for each in steps]
    factors = [factor for factor, _ in found if factor is not None and factor <= 1.0 + _SAME]
    shortest = min((n for f, n in found if f is not None and f < 1.0 - _SAME), default=math.inf)
    longest = max((norm for _, norm in found), default=0.0)
    is_clip = len(factors) == len(found) and longest <= shortest * (1.0 + _EPSILON)
    return factors if is_clip else []


def _factor(left: Gradients, taken: Gradients) -> float | None:
    """Return what gradients were multiplied with between the last backward and the step; None if by no one number."""
    names = [name for name, each in taken.items() if each is not None]
    pairs = [(left.get(name), taken[name]) for name in names]
    if not pairs or any(each is None for each, _ in pairs):
        return None
    before = torch.cat([each for each, _ in pairs if each is not None])
    after = torch.cat([each for _, each in pairs if each is not None])
    held = ~after.isnan()
    before, after = before[held], after[held]
    size = float(before @ before)
    scale = float(before @ after) / size if size else 0.0
    rest = float((after - scale * before).norm())
    return scale if scale > 0.0 and rest <= _SAME * float(after.norm()) else None


def _changed_by_some(view: View, index: int, apart: float) -> Suspicion:
    """EQ505: gradients that were the same on all ranks are not what all of them step with."""
    size = view.experiment.case.world_size
    evidence: dict[str, object] = {
        "spread_between_ranks": apart,
        "of": "gradients, between the last backward and the step",
        "because": "the gradients are the same on every rank after the last backward, and are then changed on some "
        "of them only: a clip, say, that not every rank makes",
        "fix": "do on every rank what is done to gradients before the step",
    }
    return Suspicion("EQ505", [(TakeFrom(rank),) for rank in range(size)], evidence, index, 15)


def _as_left(view: View, index: int) -> list[Gradients]:
    """Return every rank's gradients as its last backward of a cycle left them, at the sampled coordinates."""
    recording = view.experiment.left_on_ranks(view.chosen)
    return [each.left for each in steps_of(recording, index) if each.left]


def _events(ranks: Sequence[Recording], index: int) -> list[Event]:
    """Return what happened on any rank before one of its optimizer steps, and after the step before."""
    found = []
    for each in ranks:
        at = [i for i, event in enumerate(each.timeline) if event.kind == "step"]
        if index < len(at):
            found += each.timeline[at[index - 1] if index else 0 : at[index]]
    return found


def _applied_apart(steps: Sequence[Step]) -> float:
    """Return how differently far from the reference's what the ranks' optimizers took is, relative to it."""
    taken = [overall(each.applied) for each in steps]
    size = taken[0].reference_norm
    away = [each.difference_norm for each in taken]
    return (max(away) - min(away)) / size if size else 0.0


def _shortened(ranks: Sequence[Gradients], taken: Gradients) -> list[float]:
    """Return the factor of each rank's gradient in the mean that is taken, if some were made shorter and none longer.

    Shares that ranks count by (n_r / N) are their own mean away from 1, on both sides.
    """
    names = [
        n for n, t in taken.items() if t is not None and all(r.get(n) is not None for r in ranks)
    ]
    if not names or len(ranks) < 2:
        return []
    pieces = torch.stack([torch.cat([t for n in names if (t := r[n]) is not None]) for r in ranks])
    found = solve(pieces, torch.cat([t for n in names if (t := taken[n]) is not None]))
    if not found.unique or found.residual is None or found.residual > _SAME:
        return []
    shares = [len(ranks) * weight for weight in found.solution]
    is_clip = all(0.0 < each <= 1.0 + _SAME for each in shares) and min(shares) < 1.0 - _SAME
    return shares if is_clip else []
