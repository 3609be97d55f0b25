"""Wrong factors: EQ101 to EQ105, EQ108, EQ109. The weights of the pieces tell which."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

from equivcheck import wrong_denominator
from equivcheck.attribution import predict
from equivcheck.detectors.cycle import rescaled_losses
from equivcheck.fit import Attribution
from equivcheck.hypotheses import Predict, divisor, hypotheses, reweighted, scaled, unproved
from equivcheck.topology import equal_parts_of, factor_of, undecided
from equivcheck.view import Group, Part, Suspicion, View, some_differing

# Predicted weights of two ranks that agree to this are the same: they are sums of a few quotients of whole numbers.
ALIKE: Final = 1e-12


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion for every hypothesis whose weights predict the accumulated gradients."""
    if not view.divergent:
        return []
    guess: list[Suspicion] = []
    for look in (_in_all, _in_some, _in_groups, _in_optimizers):
        found = look(view)
        if any(not each.is_guess for each in found):
            return found
        guess = guess or found
    return guess


def _in_groups(view: View) -> list[Suspicion]:
    """Return suspicions for complete cycles and for incomplete ones, where the two are wrong in ways of their own."""
    full = [each for each in view.divergent if view.full_size(each)]
    if not full or len(full) == len(view.divergent):
        return []
    tails = [each for each in view.divergent if not view.full_size(each)]
    return [*_in_all(Group(view, full)), *_in_all(Group(view, tails))]


def _in_optimizers(view: View) -> list[Suspicion]:
    """Return suspicions for the steps of each optimizer, where several are wrong in ways of their own."""
    by_optimizer: dict[str, list[Attribution]] = {}
    for each in view.divergent:
        by_optimizer.setdefault(view.candidate.steps[each.step].optimizer, []).append(each)
    if len(by_optimizer) < 2:
        return []
    found: list[Suspicion] = []
    for steps in by_optimizer.values():
        found += [each for each in _in_all(Group(view, steps)) if not each.is_guess]
    return found


def _whole(view: View) -> list[Suspicion]:
    """Return EQ101 or EQ102 where the full batch is no sum of pieces, and every gradient is off by K to a power."""
    if view.experiment.case.shares > 1:
        return []
    for code, power in (("EQ101", 1), ("EQ102", -1)):
        off = [
            (each, float(divisor(view, each)) ** power, view.right(each) is None)
            for each in view.divergent
        ]
        if any(outside for *_, outside in off) and all(
            float((each.candidate - factor * each.reference).norm())
            <= view.tolerance(each) * float(each.candidate.norm())
            for each, factor, _ in off
        ):
            return scaled(view, code, float(view.steps) ** power, rank=33)
    return []


def _in_some(view: View) -> list[Suspicion]:
    """Return suspicions for the parameters that differ, where others do not."""
    names = some_differing(view)
    if not names:
        return []
    part = Part(view, names)
    found = _in_all(part)
    for each in found:
        each.evidence["parameters"] = sorted(names)[:5]
    return found


def _summed_over_ranks(view: View) -> bool:
    """Return whether micro-batches that all count 1 / K, which is 1 / R here, do so because ranks are summed."""
    case = view.experiment.case
    return (
        case.shares == view.steps > 1
        and any(
            view.fits(each, _one_each(each, [0.0] * len(each.pieces))) for each in view.divergent
        )
        and equal_parts_of(view) == "K"
    )


def _averaged_again(view: View) -> bool:
    """Return whether micro-batches that count one K-th of their mean, K being R here, do so for the number of ranks."""
    return (
        view.experiment.case.shares == view.steps > 1
        and equal_parts_of(view) == "K, divided by R again"
    )


def _summed(attribution: Attribution, right: Sequence[float]) -> list[float]:
    """Every rank's micro-batches are undivided, and the ranks are summed: what is one mean over ranks stays a sum."""
    return [attribution.ranks * x for x in right]


def _one_each(attribution: Attribution, right: Sequence[float]) -> list[float]:
    return [1.0 / attribution.ranks] * len(right)


def _scaled_again(attribution: Attribution, right: Sequence[float]) -> list[float]:
    """Every micro-batch divides what was accumulated before it by K once more."""
    k = attribution.micro_steps
    return [x / float(k) ** (k - 1 - i % k) for i, x in enumerate(right)]


def _reduced_again(attribution: Attribution, right: Sequence[float]) -> list[float]:
    """Every micro-batch adds up over the R ranks, once more, what was reduced before it and is the same on all."""
    k = attribution.micro_steps
    return [x * float(attribution.ranks) ** (k - 1 - i % k) for i, x in enumerate(right)]


def _again_over_ranks(view: View) -> list[Suspicion]:
    """Return EQ109 of sums over the ranks that are summed again, also where all micro-batches count alike besides."""
    found = hypotheses(view, "EQ109", [_reduced_again], rank=25) or hypotheses(
        view, "EQ109", [lambda a, v: _reduced_again(a, all_alike(a, v))], rank=25, meant=all_alike
    )
    for each in found:
        each.evidence["because"] = (
            "what was summed over the ranks already is summed again with every further micro-batch"
        )
        each.evidence["fix"] = "reduce once, after the last backward of the cycle"
    return found


def _geometric(view: View) -> list[Predict]:
    """Return the weights of sums that are multiplied by one factor before each micro-batch is added to them.

    The factor is read from one cycle; that it holds in all, and that what it predicts is put right, is the proof.
    """
    for each in view.divergent:
        right = view.right(each)
        if right is None or not each.w.unique or len(right) < 2 or each.ranks > 1:
            continue
        kept = [w / v if v else 0.0 for v, w in zip(right, each.w.solution, strict=True)]
        if abs(kept[-1] - 1.0) > view.tolerance(each) or not 0.0 < abs(kept[-2]) < 1.0:
            continue
        factor = kept[-2]
        return [
            lambda _, v, factor=factor: [  # type: ignore[misc]
                x * factor ** (len(v) - 1 - i) for i, x in enumerate(v)
            ]
        ]
    return []


def all_alike(_: Attribution, right: Sequence[float]) -> list[float]:
    """All micro-batches count the same."""
    return [1.0 / len(right)] * len(right)


def _alike_in_rank(attribution: Attribution, right: Sequence[float]) -> list[float]:
    """Every rank counts as it should, its micro-batches one like the other."""
    return [sum(weights) / len(weights) for weights in attribution.by_rank(right) for _ in weights]


def _steps_alike(attribution: Attribution, right: Sequence[float]) -> list[float]:
    """Every micro-step counts the same, the ranks' micro-batches in it as they should: a mean over ranks in each."""
    by_rank = attribution.by_rank(right)
    totals = [sum(step) for step in zip(*by_rank, strict=True)]
    if not all(totals):
        return list(right)
    return [
        x / total / len(totals) for each in by_rank for x, total in zip(each, totals, strict=True)
    ]


def mean_of_ranks(attribution: Attribution, right: Sequence[float]) -> list[float]:
    """Every rank counts the same, its micro-batches as they should."""
    found: list[float] = []
    for weights in attribution.by_rank(right):
        total = sum(weights)
        found += [x / total / attribution.ranks if total else 0.0 for x in weights]
    return found


def _within_ranks(predict: Predict) -> Predict:
    """Return what putting right the micro-batches of each rank gives, where all ranks count the same: that stays."""

    def meant(attribution: Attribution, right: Sequence[float]) -> list[float]:
        totals = [sum(weights) for weights in attribution.by_rank(predict(attribution, right))]
        alike = max(totals) - min(totals) <= ALIKE * max(totals)
        return mean_of_ranks(attribution, right) if alike else list(right)

    return meant


def _in_all(view: View) -> list[Suspicion]:
    found: list[Suspicion] = []
    ones: list[Predict] = [lambda a, v: [x * divisor(view, a) for x in v]]
    if not _summed_over_ranks(view):
        ones.append(_one_each)
    tails_only = all(not view.full_size(each) for each in view.divergent) and any(
        view.full_size(each) for each in view.every
    )
    k = view.steps
    if tails_only:
        # Divided by the K of a complete cycle, or, where complete cycles are right, by nothing.
        tail: list[Predict] = [
            lambda a, v: [x * a.micro_steps / k for x in v],
            lambda a, v: [1 / (k * a.ranks)] * len(v),
            *ones,
        ]
        found += hypotheses(view, "EQ105", tail, rank=10)
    undivided = hypotheses(view, "EQ101", ones, rank=12, power=1)
    for each in undivided:
        each.evidence |= _by_shares(view)
    found += undivided
    if view.experiment.case.shares > 1:
        each_whole: Predict = lambda _, v: [1.0] * len(v)  # noqa: E731 - as those beside it
        found += hypotheses(view, "EQ101", [each_whole], rank=12, meant=_summed)
    sums: list[Predict] = [all_alike]
    # What is done to a loss is done to the gradients of all parameters.
    if view.names is None and _all_ones(view) and not _means_by_hand(view):
        found += hypotheses(view, "EQ108", sums, rank=11)
    elif view.experiment.case.shares > 1:
        # Between ranks is another cause, EQ501: what is put right here is within each of them.
        found += hypotheses(view, "EQ103", [_alike_in_rank, _steps_alike], rank=15)
        found += hypotheses(view, "EQ103", sums, rank=15, meant=mean_of_ranks)
        for share in _shares(view):
            fitting = hypotheses(view, "EQ103", [share], rank=15, meant=_within_ranks(share))
            found += fitting
            if fitting:
                break
    else:
        # Micro-batches alone may have the size that they have in the full batch: their weights are then 1.
        shares = [*sums, _one_each, *_shares(view)]
        found += hypotheses(view, "EQ103", shares, rank=15, power=0)
    twice: list[Predict] = [lambda a, v: [x / divisor(view, a) for x in v]]
    if not _averaged_again(view):
        twice.append(lambda a, v: [1.0 / (divisor(view, a) * len(v))] * len(v))
    if view.experiment.case.shares == 1:
        twice.append(all_alike)
    found += hypotheses(view, "EQ102", twice, rank=14, power=-1)
    again: list[Predict] = [
        _scaled_again,
        lambda a, v: _scaled_again(a, [1.0 / len(v)] * len(v)),
    ]
    if not rescaled_losses(view):
        found += hypotheses(view, "EQ109", again, rank=25)
        if view.experiment.case.shares > 1:
            found += _again_over_ranks(view)
        # Behind what names the factor: a loss scale, a clip.
        found += hypotheses(view, "EQ109", _geometric(view), rank=45)
    factor = factor_of(view)
    if undecided(view):
        return [each for each in found if each.code not in {"EQ101", "EQ102"}] + [
            unproved(view, "EQ101" if a > 0 else "EQ102", rank=12) for a, _ in undecided(view) if a
        ]
    if factor is not None:
        # A pure factor of K, of the number of ranks, or of both: that decides between these codes.
        named = {1: "EQ101", -1: "EQ102"}.get(factor[0])
        found = [each for each in found if each.code not in {"EQ101", "EQ102"} - {named}]
        if named is not None and not any(each.code == named for each in found):
            found += scaled(view, named, float(view.steps) ** factor[0], rank=12)
    elif not found:
        found += _whole(view) or [
            *wrong_denominator.suspect(view),
            *_clipped_by_hand(view),
            *_hidden(view),
        ]
    return found


def _shares(view: View) -> list[Predict]:
    """Weights in proportion to something that is counted, and is not what the loss is a mean over."""
    return [
        lambda a, v, values=values: _share(values, a.matched, len(v))  # type: ignore[misc]
        for values in view.counts().values()
    ]


def _share(values: list[list[float]], cycle: int, length: int) -> list[float]:
    counts = values[cycle % len(values)]
    return [x / (sum(counts) or 1) for x in counts] if len(counts) == length else [0.0] * length


def _clipped_by_hand(view: View) -> list[Suspicion]:
    """Return EQ103 up to a factor of each step: a clip that the loop computes itself scales what an optimizer takes.

    Both runs, and every piece, then carry factors that no micro-batch explains. What remains is how each run's weights
    go together: the full batch's in proportion to one thing that is counted, the accumulated ones to another, or all
    alike. With that put right the clip gives both runs the same factor, or the proof fails.
    """
    if view.experiment.case.shares > 1 or view.names is not None:
        return []
    shares = [all_alike, *_shares(view)]
    for meant, wrong in itertools.permutations(shares, 2):
        factors: dict[int, list[float]] = {}
        for each in view.divergent:
            right = view.right(each)
            if right is None or not view.known(each):
                return []
            counted, given = meant(each, right), wrong(each, right)
            if not all(counted) or not all(given):
                break
            ratios = [g / c for g, c in zip(given, counted, strict=True)]
            shape = [v * r for v, r in zip(right, ratios, strict=True)]
            direction = predict(each.pieces, shape)
            size = float(direction @ direction)
            factor = float(direction @ each.candidate) / size if size else 0.0
            if factor <= 0 or not view.fits(each, [factor * x for x in shape]):
                break
            factors[each.matched] = [1.0 / r for r in ratios]
        if factors and len(factors) == len(view.divergent):
            first = view.divergent[0]
            evidence: dict[str, object] = {
                "weights": first.shaped(first.w.values),
                "true_weights": first.shaped(first.v.values),
            }
            found = Suspicion("EQ103", reweighted(view, factors), evidence, first.step, rank=55)
            found.is_guess = True
            return [found]
    return []


def _hidden(view: View) -> list[Suspicion]:
    """Return EQ101 as a last resort: what a loop does to its sums by hand (a clip, say) may hide the factor."""
    if view.experiment.case.shares > 1 or not view.candidate.backwards:
        return []
    found = scaled(view, "EQ101", float(view.steps), rank=60)
    found[0].is_guess = True
    return found


def _all_ones(view: View) -> bool:
    """Return whether the full batch adds its micro-batches up: its loss is a sum."""
    return all(
        view.spans(each, reference=True) and all(abs(x - 1.0) < 1e-6 for x in each.v.solution)
        for each in view.divergent
        if each.v.unique
    ) and any(each.v.unique for each in view.divergent)


def _by_shares(view: View) -> dict[str, str]:
    """Return how means of micro-batches that are not alike come right: a division by K would leave a mean of means."""
    first = view.divergent[0]
    right = view.right(first) or []
    alike = [max(x) - min(x) <= 1e-9 * max(map(abs, x)) for x in (right, first.w.solution) if x]
    if alike != [False, True]:
        return {}
    return {
        "fix": "(loss * n / n_of_the_cycle).backward(), with n what its mean is over: these micro_batches are not alike"
    }


def _means_by_hand(view: View) -> bool:
    """Return whether the full batch's sums are divided by as many as they have terms: those are means."""
    made = [each.reduction for each in view.reference.backwards]
    return bool(made) and all(
        each is not None and each.kind == "sum" and abs(each.scale * each.terms - 1.0) <= ALIKE
        for each in made
    )
