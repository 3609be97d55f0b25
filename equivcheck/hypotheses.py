"""Hypotheses about weights: what they predict is compared with the gradient, and reweighting is how they are proved."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch

from equivcheck.attribution import predict
from equivcheck.fit import Attribution
from equivcheck.interventions import Addend, Intervention, Rescale, Restitute, Reweight
from equivcheck.verdict import overall
from equivcheck.view import Suspicion, View

Predict = Callable[[Attribution, Sequence[float]], list[float]]
Changes = dict[str, dict[int, tuple[int, torch.Tensor]]]


def hypotheses(
    view: View,
    code: str,
    predictions: Sequence[Predict],
    rank: int,
    meant: Predict | None = None,
    power: int | None = None,
) -> list[Suspicion]:
    """Return a suspicion if the weights that one of the predictions gives make all gradients that differ.

    Args:
        view: The run.
        code: The cause.
        predictions: Weights that the cause would give.
        rank: Order of trial.
        meant: The weights that putting it right gives; None for the true ones.
        power: Of K, nearest to the factor between all weights together; None for any. Only within one rank.
    """
    if view.experiment.case.shares > 1:
        power = None
    for prediction in predictions:
        factors: dict[int, list[float]] = {}
        lost: Changes = {}
        fitted: list[tuple[Attribution, list[float]]] = []
        shown: list[tuple[Attribution, list[float], list[float]]] = []
        # Counts that are equal count equally in a mean of means: one factor for all of them is another cause.
        uneven = code != "EQ103"
        for each in view.attributions:
            right = view.right(each)
            if right is None:
                return []
            wrong = prediction(each, right)
            for k in view.restored(each):
                wrong[k] = right[k]
            if view.fits(each, wrong) and power in {None, _power(view, each, right, wrong)}:
                if each in view.divergent:
                    shown.append((each, right, wrong))
                intended = meant(each, right) if meant else right
                factor = _factors(intended, wrong)
                factors[each.matched] = factor
                fitted.append((each, [a - b for a, b in zip(intended, wrong, strict=True)]))
                # No factor brings back what has no weight at all: it is added at the step.
                away = [k for k, w in enumerate(wrong) if w == 0 and right[k] != 0]
                if away:
                    total = predict(each.pieces[away], [intended[k] for k in away])
                    at_step(view, each, total, lost)
                if away or not _uniform(view, each, factor):
                    uneven = True
                    if not view.known(each):
                        break
        if shown and uneven and len(shown) == len(view.divergent):
            first, right, wrong = shown[0]
            told = view.told_apart(first)
            evidence: dict[str, object] = {
                "weights": first.shaped(first.w.values if told else wrong),
                "true_weights": first.shaped(first.v.values if told else right),
            }
            variants = reweighted(view, factors)
            if not variants:
                # No backward to weigh anew: what is lacking is added at the step, all of it.
                variants = [(Restitute(_lacking(view, fitted)),)]
            elif lost:
                variants = [(*each, Restitute(lost)) for each in variants]
            return [Suspicion(code, variants, evidence, first.step, rank)]
    return []


def _lacking(view: View, fitted: Sequence[tuple[Attribution, list[float]]]) -> Changes:
    """Return what each step lacks, by how far the weights that are meant are from those that a hypothesis predicts."""
    found: Changes = {}
    for attribution, apart in fitted:
        at_step(view, attribution, predict(attribution.pieces, apart), found)
    return found


def scaled(view: View, code: str, factor: float, rank: int) -> list[Suspicion]:
    """Return a suspicion of one pure factor, which may be one of two."""
    reweight = Reweight(
        {view.cycle_of(a.matched): [1.0 / factor] * a.pieces.shape[0] for a in view.attributions},
        view.names,
    )
    shown = view.divergent[0]
    evidence: dict[str, object] = {
        "factor": factor,
        "weights": shown.shaped(shown.w.values),
        "true_weights": shown.shaped(shown.v.values),
    }
    return [Suspicion(code, [(reweight,)], evidence, shown.step, rank)]


def unproved(view: View, code: str, rank: int) -> Suspicion:
    """Return a suspicion of a factor that may be one of K or of the number of ranks: no other K can tell."""
    found = scaled(view, code, 1.0, rank)[0]
    found.variants = []
    found.evidence["factor"] = f"{overall(view.candidate.steps[found.step].gradients).scale:.6g}"
    found.evidence["undecided"] = "a factor of K and one of the number of ranks are the same here"
    return found


def divisor(view: View, attribution: Attribution) -> int:
    """Return what a mean over a cycle divides by: K, or a tail's own number, however many batches one step takes."""
    return min(attribution.micro_steps, view.steps)


def _power(
    view: View, attribution: Attribution, right: Sequence[float], wrong: Sequence[float]
) -> int | None:
    """Return the power of K that is nearest to the factor between the sums of two sets of weights."""
    given = view.restored(attribution)
    present = [k not in given and bool(piece.any()) for k, piece in enumerate(attribution.pieces)]
    sums = [sum(x for x, p in zip(each, present, strict=True) if p) for each in (right, wrong)]
    k = divisor(view, attribution)
    if k < 2 or sums[0] <= 0 or sums[1] <= 0:
        return None
    return round(math.log(sums[1] / sums[0], k))


def _uniform(view: View, attribution: Attribution, factors: Sequence[float]) -> bool:
    """Return whether one factor stands for all, as far as the weights that it is made of are known."""
    noise = max(view.tolerance(attribution), attribution.v.noise)
    return max(factors) - min(factors) <= noise * max(abs(x) for x in factors)


def _factors(meant: Sequence[float], wrong: Sequence[float]) -> list[float]:
    """Return what turns wrong weights into those that are meant.

    A piece without a gradient (a micro-batch without a valid token) has no weight in either run.
    """
    return [m / w if w else 1.0 for m, w in zip(meant, wrong, strict=True)]


def reweighted(view: View, factors: dict[int, list[float]]) -> list[tuple[Intervention, ...]]:
    """Return the ways to give the true weights: at the root, or only where an optimizer or a sweep needs it."""
    if not view.candidate.backwards:
        # Gradients that torch.func made: there is no root, but a factor of the whole cycle can be given at its step.
        uniform: dict[str, dict[int, tuple[int, float]]] = {}
        for each in view.attributions:
            given = factors.get(each.matched, [])
            if not given or max(given) - min(given) > view.tolerance(each) * max(given):
                return []
            step = view.candidate.steps[each.step]
            for name, _ in each.names:
                change = (step.backwards, sum(given) / len(given))
                uniform.setdefault(name, {})[view.ordinal(step)] = change
        return [(Rescale(uniform),)]
    by_cycle = _by_cycle(view, factors)
    names = view.names
    owners = {view.candidate.steps[each.step].optimizer for each in view.divergent}
    if names is None and owners < set(view.candidate.optimizers):
        # One of several optimizers: backwards for the others are right as they are.
        names = frozenset(n for key in owners for n in view.candidate.optimizers[key])
    ordinals = {each.ordinals for each in view.divergent} - {None}
    if names is None and ordinals:
        sweep = frozenset[int]().union(*(each for each in ordinals if each is not None))
        return [tuple(Addend(ordinal, (), by_cycle) for ordinal in sorted(sweep))]
    return [(Reweight(by_cycle, names),)]


def _by_cycle(view: View, factors: dict[int, list[float]]) -> dict[int, list[float]]:
    """Key factors by the first reference step of a cycle: two optimizers may share its samples."""
    return {view.cycle_of(matched): values for matched, values in factors.items()}


def at_step(
    view: View,
    attribution: Attribution,
    total: torch.Tensor,
    changes: Changes,
    names: Collection[str] | None = None,
) -> None:
    """Add, to what is to change at each step of each parameter, a gradient at the sampled coordinates."""
    step = view.candidate.steps[attribution.step]
    parts = torch.split(total, [length for _, length in attribution.names])
    for (name, _), part in zip(attribution.names, parts, strict=True):
        if names is None or name in names:
            changes.setdefault(name, {})[view.ordinal(step)] = (step.backwards, part)
