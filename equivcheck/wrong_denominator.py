"""EQ104: what a loss is divided by is wrong, by a ratio whose rule another K or another optimizer step confirms."""

from __future__ import annotations

import math

from equivcheck import denominators
from equivcheck.attribution import ratio
from equivcheck.errors import EquivcheckError
from equivcheck.fit import Attribution
from equivcheck.hypotheses import reweighted
from equivcheck.verdict import overall
from equivcheck.view import Suspicion, View


def suspect(view: View) -> list[Suspicion]:
    """EQ104: every weight too small or too large by one ratio: of whole numbers p/q, or of what is counted."""
    factors: dict[int, list[float]] = {}
    rules: list[tuple[Attribution, float]] = []
    for each in view.divergent:
        size = float(each.reference @ each.reference)
        scale = float(each.candidate @ each.reference) / size if size else 0.0
        rest = float((each.candidate - scale * each.reference).norm())
        if not scale > 0 or rest > view.tolerance(each) * float(each.candidate.norm()):
            return []
        rules.append((each, scale))
        factors[each.matched] = [1.0 / scale] * each.pieces.shape[0]
    first, scale = rules[0]
    fraction = ratio(scale, max(view.tolerance(first), 1e-12))
    evidence: dict[str, object] = {}
    if fraction is not None:
        scale = float(fraction)
        evidence["ratio"] = f"{fraction.numerator}/{fraction.denominator}"
    evidence["scale"] = scale
    confirmed = _divided_by(view, rules) or _confirmed(view, first, scale)
    if fraction is None and confirmed is None:
        return []  # A number that nothing explains may be anything.
    evidence["rule"] = (
        confirmed or "none of the rules tried holds at a second number of accumulation steps"
    )
    variants = reweighted(view, factors) if confirmed else []
    return [Suspicion("EQ104", variants, evidence, first.step, rank=30)]


def _divided_by(view: View, rules: list[tuple[Attribution, float]]) -> str | None:
    """Return what sums are divided by in both runs, where the graphs of all losses show it and it makes the factors."""
    told = None
    for each, scale in rules:
        target, step = view.reference.steps[each.matched], view.candidate.steps[each.step]
        full = view.reference.backwards[target.first_backward : target.backwards]
        mine = view.candidate.backwards[step.first_backward : step.backwards]
        made = [backward.reduction for backward in (*full, *mine)]
        if (
            len(full) != 1
            or not mine
            or any(r is None or r.kind != "sum" or not r.scale for r in made)
        ):
            return None
        whole, *parts = [r.scale for r in made if r is not None]
        limit = view.tolerance(each)
        if any(abs(part / whole / scale - 1.0) > limit for part in parts):
            return None
        told = (
            told or f"sums are divided by {1 / parts[0]:.6g}, in the full batch by {1 / whole:.6g}"
        )
    return told


def _confirmed(view: View, shown: Attribution, scale: float) -> str | None:
    """Return the rule, read from one K, that predicts the factor at another K exactly."""
    k = view.steps
    recording = None
    # The loop may refuse another K.
    for other in (2, 3, 4, 6):
        if other == k or other * view.experiment.case.shares > min(view.experiment.data.rows):
            continue
        try:
            recording = view.experiment.at(other)
        except EquivcheckError:
            continue
        break
    if recording is None:
        # The rule is then unconfirmed; a command line has but one K.
        return None if view.experiment.other_steps else _confirmed_by_steps(view, shown, scale)
    step = next(
        (each for each in recording.steps if each.matched == shown.matched and each.gradients), None
    )
    if step is None:
        return None
    measured = overall(step.gradients).scale
    limit = view.tolerance(shown)
    rules = denominators.of_steps(k, other, scale, limit)
    here, there = view.counts(), view.counts(other)
    shares = view.experiment.case.shares
    for label, values in here.items():
        cycle = shown.matched % len(values)
        by_what = denominators.grouped(values[cycle], shares)
        others_by_what = denominators.grouped(there[label][cycle], shares)
        for what, mine in by_what.items():
            if isinstance(sum(mine), int) and sum(mine) < max(k, other):
                continue
            predicted = denominators.of_counts(mine, others_by_what[what], scale, limit)
            rules |= {f"{name} ({label}{what})": value for name, value in predicted.items()}
    return next(
        (
            name
            for name, value in rules.items()
            if abs(value - measured) <= limit * max(abs(value), 1.0)
        ),
        None,
    )


def _confirmed_by_steps(view: View, shown: Attribution, scale: float) -> str | None:
    """Return the rule, read from one optimizer step, that predicts the factor in every other one exactly.

    An incomplete cycle has another K, and cycles hold other counts.
    """
    others = [each for each in view.divergent if each is not shown]
    if not others:
        return None
    limit = view.tolerance(shown)
    measured = [
        float(each.candidate @ each.reference) / float(each.reference @ each.reference)
        for each in others
    ]
    predicted: dict[str, list[float]] = {}
    for each in others:
        found = denominators.of_steps(shown.micro_steps, each.micro_steps, scale, limit)
        for label, values in view.counts().items():
            mine, theirs = values[shown.matched % len(values)], values[each.matched % len(values)]
            if sum(mine) and sum(theirs):
                excess = sum(mine) / scale - sum(mine)
                found[f"the count is off by the same number ({label})"] = sum(theirs) / (
                    (sum(theirs) + excess) or math.inf
                )
            if mine and theirs:
                by_counts = denominators.of_counts(mine, theirs, scale, limit)
                found |= {f"{name} ({label})": value for name, value in by_counts.items()}
        for name, value in found.items():
            predicted.setdefault(name, []).append(value)
    for name, found_values in predicted.items():
        if len(found_values) == len(measured) and all(
            abs(a - b) <= limit * max(abs(a), 1.0)
            for a, b in zip(found_values, measured, strict=True)
        ):
            return f"{name}: read from one optimizer step, it holds in {len(others)} others"
    return None
