"""What some ranks do to their gradients between the last backward of a cycle and the step: EQ505, EQ506.

R ranks, each holding the gradient whole. A change that all of them make alike is looked for elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from equivcheck.attribution import solve
from equivcheck.detectors.ranks import gradient_spread, steps_of
from equivcheck.interventions import Synchronise, TakeFrom
from equivcheck.noise import SAFETY
from equivcheck.recording import Event, Recording, Step
from equivcheck.verdict import overall
from equivcheck.view import Suspicion, View

# What a hand-written clip makes longer is rounding; what it makes shorter it shortens by more than that.
_SAME: Final = 1e-6

Gradients = dict[str, "torch.Tensor | None"]


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions where ranks that hold the same parameters did something of their own to a gradient."""
    if view.experiment.case.world_size == 1 or view.judgement.first("gradients", "applied") is None:
        return []
    if any(step.parts for each in view.candidate.ranks for step in each.steps):
        return []
    limit = SAFETY * view.experiment.noise().floor()
    for index in range(len(view.candidate.steps)):
        steps = steps_of(view.candidate, index)
        if len(steps) < view.experiment.case.world_size:
            return []
        as_taken = [each.sample for each in steps]
        apart = max(gradient_spread(steps), _applied_apart(steps))
        if apart > limit:
            as_left = _as_left(view, index)
            if not as_left or _spread(as_left) > limit:
                return []
            return [_changed_by_some(view, index, apart)]
        if any(event.kind == "clip" for event in _events(view.candidate.ranks, index)):
            continue
        as_left = _as_left(view, index)
        if as_left and _spread(as_left) > limit:
            shares = _shortened(as_left, as_taken[0])
            if shares:
                evidence: dict[str, object] = {"share_of_each_rank": shares}
                found = Suspicion("EQ506", [(Synchronise(),)], evidence, index, 20)
                found.is_seen = True
                return [found]
    return []


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


def _spread(ranks: Sequence[Gradients]) -> float:
    """Return the largest relative difference of a gradient from rank 0's; 1 where only some have it."""
    worst = 0.0
    for name, first in ranks[0].items():
        others = [each.get(name) for each in ranks[1:]]
        if any((each is None) != (first is None) for each in others):
            return 1.0
        if first is None:
            continue
        size = max(
            float(first.norm()), *(float(each.norm()) for each in others if each is not None)
        )
        away = max(float((each - first).norm()) for each in others if each is not None)
        worst = max(worst, away / size if size else 0.0)
    return worst


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
    if not found.unique or found.residual > _SAME:
        return []
    shares = [len(ranks) * weight for weight in found.solution]
    is_clip = all(0.0 < each <= 1.0 + _SAME for each in shares) and min(shares) < 1.0 - _SAME
    return shares if is_clip else []
