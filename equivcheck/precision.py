"""Judge what accumulating costs in the precision that the code is written in.

The accumulation alone is looked at: the accumulated gradient as written, against the very contributions that arrived
from each backward, combined in float64. What is left is rounding of the accumulation, in units of the unit roundoff of
the parameters' dtype.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from equivcheck.attribution import solve
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment
from equivcheck.noise import UNIT_ROUNDOFF, UNITS, floor, growth
from equivcheck.recording import Recording, Step
from equivcheck.verdict import overall, roundoff_of

# Dtypes at least this coarse are judged against the full run's own error too: their roundoff is what a correct full
# batch measures (1.1 units of bfloat16, see tests/bench/calibrate.py), so that accumulating is what decides. float32's
# own error is 4.5 units, which accumulating does not reach below K = 128.
COARSE: Final = 2.0**-11

# How far chance may carry the root mean square of n rounding errors above that of others, times sqrt(n). Errors are
# uniform within one roundoff, so that the mean of their squares has a relative standard deviation of sqrt(0.8 / n) and
# its root half of that; two such numbers are compared, three deviations are allowed: 3 sqrt(2) sqrt(0.8) / 2.
CHANCE: Final = 1.9


@dataclass
class Precision:
    """Rounding of the accumulation, and of the whole run.

    Attributes:
        units: Largest rounding of the accumulation, in unit roundoffs times the growth in K.
        accumulation: Median relative rounding of the accumulation.
        full_batch: Median relative error of native_reference against float64.
        accumulated: Median relative error of native_candidate against float64.
        loss: EQ401 with its evidence, or None.
        gap: Largest relative difference of the two native gradients.
        noise: What native code differs by anyway.
    """

    units: float
    accumulation: float
    full_batch: float
    accumulated: float
    gap: float
    noise: float
    loss: dict[str, Any] | None


def judge_precision(experiment: Experiment) -> Precision:
    """Compare the two native runs of a case with each other and with float64."""
    full, accumulated = experiment.native("native_reference"), experiment.native("native_candidate")
    unit = roundoff_of([full.dtype])
    k = experiment.case.accumulation_steps
    residuals = _residuals([(step, step.sample) for step in accumulated.steps])
    if max(residuals, default=0.0) / unit / growth(k) > UNITS and _transformed(experiment):
        # What is done to gradients between the last backward and the step is no rounding.
        steps = experiment.left_by_backward().steps
        residuals = _residuals([(step, step.left) for step in steps])
    residuals = _possible(full, accumulated, residuals)
    own = _errors(full)
    accumulation = statistics.median(residuals) if residuals else 0.0
    full_error = statistics.median(own) if own else 0.0
    units = max(residuals, default=0.0) / unit / growth(k)
    gap = native_gap(full, accumulated)
    loss = None
    evidence = {
        "accumulation": accumulation,
        "full_batch": full_error,
        "unit_roundoffs": accumulation / unit,
        "dtype": full.dtype,
        "widened": "the same contributions summed in float64 leave none of it",
    }
    # What is measured in float64 is known to no more than float64 sums resolve: the limit for float64 parameters.
    resolved = max(residuals, default=0.0) > floor(experiment.terms(), UNIT_ROUNDOFF[torch.float64])
    # Less than one roundoff is what writing the result down costs once. Whether it exceeds the full run's own error is
    # chance in a small model, whose error is an average over few numbers: seen at K = 3 with 45 parameters.
    exceeds = full_error > 0.0 and accumulation > max(full_error, unit) * (1.0 + _chance(full))
    if (units > UNITS and resolved) or (unit >= COARSE and k > 1 and exceeds):
        loss = evidence
    return Precision(
        units,
        accumulation,
        full_error,
        statistics.median(_errors(accumulated) or [0.0]),
        gap,
        max(full_error, accumulation, unit, _of_ranks(experiment)),
        loss,
    )


def _of_ranks(experiment: Experiment) -> float:
    """Return the roundoff of a dtype that only the ranks compute in, by a policy of their wrapper; 0 if there is none.

    What one process computes with has no wrapper, and rounds less.
    """
    if experiment.crew is None:
        return 0.0
    asked = {rank.asked for rank in experiment.candidate().ranks} - {""}
    own = experiment.reference()
    if not asked:
        return 0.0
    theirs = roundoff_of(asked)
    known = {own.asked, own.autocast, own.dtype} - {""}
    return theirs if theirs > roundoff_of(known) else 0.0


def _errors(recording: Recording) -> list[float]:
    found = []
    for step in recording.steps:
        if step.matched is not None and not step.skipped:
            whole = overall(step.gradients)
            if whole.finite and whole.rr:
                found.append(whole.relative)
    return found


def _chance(recording: Recording) -> float:
    """Return by how much more than another the rounding of one gradient may come out by chance, as a share of it."""
    counts = []
    for step in recording.steps:
        elements = [sample for sample in step.sample.values() if sample is not None]
        squares = torch.cat(elements).square() if elements else torch.zeros(0)
        total, fourth = float(squares.sum()), float(squares.square().sum())
        if fourth and math.isfinite(total * total / fourth):
            # So many elements of one size weigh as much: the large ones alone decide in a gradient of many small ones.
            counts.append(total * total / fourth)
    return CHANCE / math.sqrt(statistics.median(counts)) if counts else 0.0


def _residuals(steps: Sequence[tuple[Step, Mapping[str, torch.Tensor | None]]]) -> list[float]:
    found = [_rounding(step, gradients) for step, gradients in steps]
    return [each for each in found if each is not None and math.isfinite(each)]


def _possible(full: Recording, accumulated: Recording, residuals: list[float]) -> list[float]:
    """Return what accumulating can have cost at most: the errors of the two native gradients together.

    Contributions that do not arrive where they are looked for (a pipeline's schedule that computes the gradients of
    weights apart from those of inputs) leave a rest that no rounding of the accumulated gradient has made.
    """
    both = max(_errors(full), default=math.inf) + max(_errors(accumulated), default=math.inf)
    return [min(each, both) for each in residuals]


def _transformed(experiment: Experiment) -> bool:
    """Return whether the loop makes something else of its gradients, in float64 too: adds noise, centralises them."""
    if experiment.candidate().lowered:
        return False
    unit = UNIT_ROUNDOFF[torch.float64]
    k = experiment.case.accumulation_steps
    try:
        steps = [(step, step.sample) for step in experiment.contributed().steps]
    except EquivcheckError:
        return False
    limit = max(UNITS * unit * growth(k), floor(experiment.terms(), unit))
    return max(_residuals(steps), default=0.0) > limit


def _rounding(step: Step, gradients: Mapping[str, torch.Tensor | None]) -> float | None:
    """Return what is left of a gradient after the best combination of the contributions that arrived."""
    if step.matched is None or step.skipped or not step.contributions:
        return None
    names = [name for name, sample in gradients.items() if sample is not None]
    names = [name for name in names if any(name in each for each in step.contributions)]
    if not names:
        return None
    target = torch.cat([t for name in names if (t := gradients[name]) is not None])
    rows = [
        torch.cat(
            [
                each.get(name, torch.zeros_like(t))
                for name in names
                if (t := gradients[name]) is not None
            ]
        )
        for each in step.contributions
    ]
    matrix = torch.stack(rows)
    if matrix.shape[0] * 4 > matrix.shape[1] or not bool(torch.isfinite(matrix).all()):
        return None
    return solve(matrix, target).residual


def native_gap(full: Recording, accumulated: Recording) -> float:
    """Return the largest relative difference of the two native gradients, at the sampled coordinates."""
    by_match = {step.matched: step for step in full.steps if step.matched is not None}
    worst = 0.0
    # A rank that differs counts, whichever it is; parts of a gradient count together.
    for step in [step for each in (accumulated, *accumulated.ranks) for step in each.steps]:
        other = by_match.get(step.matched) if step.matched is not None else None
        if other is None or step.skipped or other.skipped:
            continue
        names = [
            n for n, s in other.sample.items() if s is not None and step.sample.get(n) is not None
        ]
        if not names:
            continue
        a = torch.cat([t for n in names if (t := other.sample[n]) is not None])
        b = torch.cat([t for n in names if (t := step.sample[n]) is not None])
        if (
            step.parts
        ):  # What a rank does not hold is nan there; what is so on all is nan in the step of all.
            held = ~b.isnan()
            a, b = a[held], b[held]
        size = float(a.norm())
        if size and math.isfinite(size):
            gap = float((a - b).norm()) / size
            # A sum of inf and -inf is nan, which agrees with nothing.
            worst = max(worst, gap if math.isfinite(gap) else math.inf)
    return worst
