"""Logged losses that are wrong by themselves: EQ701."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from equivcheck.errors import EquivcheckError
from equivcheck.interventions import Shorten
from equivcheck.noise import SAFETY
from equivcheck.recording import Place, Recording
from equivcheck.verdict import finite_pairs, not_finite
from equivcheck.view import Suspicion, View

TRAINED_ON = "the sum of what was called backward on"
NOT_A_NUMBER = (
    "what train returns or yields as its loss is inf or nan in one run, and finite in the other"
)
LOG_THE_LOSS = (
    "log what was trained on: loss.detach() of every micro-batch, over the whole cycle's count"
)
AVERAGED, SUMMED = "averaged over the ranks", "summed over the ranks"


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion if the log differs although nothing else does."""
    finding = view.judgement.first("logged")
    if finding is None or any(isinstance(each, Shorten) for each in view.chosen):
        return []
    if view.judgement.kinds() != {"logged"}:
        return []
    rule = None if finding.detail else _rule(view)
    evidence: dict[str, object] = {
        "logged": _shown(view.candidate.logged),
        "full_batch": _shown(view.reference.logged),
    }
    if math.isfinite(finding.relative):
        evidence = {"relative": finding.relative, **evidence}
    if finding.detail:
        evidence |= {"found": finding.detail, "because": NOT_A_NUMBER, "fix": LOG_THE_LOSS}
    if rule:
        evidence["rule"] = rule
    # Where nothing was put right, all the rest is shown to be the same: the number is what is wrong. Runs with
    # something put right log what their own arithmetic makes of it.
    proved = bool(rule or finding.detail) or not view.chosen
    return [Suspicion("EQ701", [], evidence, 0, 40, proved=proved, explains=frozenset({"logged"}))]


def _shown(logged: Sequence[float] | None) -> list[float | str]:
    return [x if math.isfinite(x) else str(x) for x in (logged or ())[:8]]


def _alone(view: View) -> list[list[float]] | None:
    """Return the loss that every micro-batch logs alone, per cycle."""
    try:
        recording = view.experiment.pieces_recording(view.chosen)
    except EquivcheckError:  # Without single micro-batches the log is not attributed.
        return None
    logged = recording.logged
    data = view.experiment.data
    micro = view.experiment.micro_batches(data)
    if logged is None or len(logged) % len(micro):
        return None
    # The micro-batches of a full batch are those behind which all its rows have been handed out.
    handed_out = list(itertools.accumulate(map(len, micro)))
    ends = [handed_out.index(rows) + 1 for rows in itertools.accumulate(data.rows)]
    return [
        logged[passed + begin : passed + end]
        for passed in range(0, len(logged), len(micro))
        for begin, end in itertools.pairwise([0, *ends])
    ]


def _close(a: list[float], b: list[float], limit: float) -> bool:
    if len(a) != len(b) or not_finite(a, b) is not None:
        return False
    pairs = finite_pairs(a, b)
    size = max((abs(y) for _, y in pairs), default=0.0)
    return all(abs(x - y) <= limit * size for x, y in pairs)


def _limit(view: View) -> float:
    return SAFETY * view.experiment.noise().floor()


def _roots(view: View) -> dict[str, list[float]]:
    """Return what a loop would log that takes the values it calls backward on, as they are written."""
    written = view.experiment.candidate()
    found = _formulas(written, view.places)
    if written.ranks and view.experiment.crew is not None:
        each = [_formulas(rank, rank.places(view.cycles)) for rank in written.ranks]
        for name in list(found):
            columns = list(zip(*(formulas[name] for formulas in each), strict=False))
            found[f"{name}, {AVERAGED}"] = [sum(column) / len(column) for column in columns]
            found[f"{name}, {SUMMED}"] = [sum(column) for column in columns]
    return found


def _formulas(written: Recording, places: Sequence[Place]) -> dict[str, list[float]]:
    by_cycle: dict[int, list[float]] = {}
    for place, backward in zip(places, written.backwards, strict=False):
        by_cycle.setdefault(place.cycle, []).append(backward.loss)
    values = [by_cycle[cycle] for cycle in sorted(by_cycle)]
    return {
        "the last backward's loss": [each[-1] for each in values],
        "the first backward's loss": [each[0] for each in values],
        "the last backward's loss, times accumulation_steps": [
            each[-1] * len(each) for each in values
        ],
        TRAINED_ON: [sum(each) for each in values],
        "the mean of what was called backward on": [sum(each) / len(each) for each in values],
    }


def _rule(view: View) -> str | None:
    """Return the formula that turns the loss of each micro-batch into what was logged."""
    candidate, reference = view.candidate.logged or [], view.reference.logged or []
    alone = _alone(view)
    limit = _limit(view)
    k = view.steps
    rules = {
        "divided by accumulation_steps once too often": [x / k for x in reference],
        "summed, not averaged": [x * k for x in reference],
    }
    if alone is not None:
        rules |= {
            "the last micro-batch's loss": [each[-1] for each in alone],
            "the first micro-batch's loss": [each[0] for each in alone],
            "the mean of the micro-batches' means": [sum(each) / len(each) for each in alone],
            "the sum of the micro-batches' losses": [sum(each) for each in alone],
            "the last micro-batch's loss, divided by accumulation_steps": [
                each[-1] / len(each) for each in alone
            ],
            "the micro-batches' losses over accumulation_steps, in the tail too": [
                sum(each) / k for each in alone
            ],
        }
        rules |= _last_of_ranks(view, alone)
    rules |= _roots(view)
    found = next((name for name, values in rules.items() if _close(candidate, values, limit)), None)
    pairs = finite_pairs(candidate, reference) if len(candidate) == len(reference) else []
    if found is None and pairs and all(b for _, b in pairs):
        ratios = [a / b for a, b in pairs]
        if _close(ratios, [ratios[0]] * len(ratios), limit):
            found = f"{ratios[0]:.6g} times the loss, at every optimizer step"
    return found


def _last_of_ranks(view: View, alone: list[list[float]]) -> dict[str, list[float]]:
    """Return what is logged where every rank takes its last micro-batch's loss."""
    shares = view.experiment.case.shares
    if shares == 1:
        return {}
    last = [[sum(rank[-1:]) for rank in _of_ranks(each, shares)] for each in alone]
    return {f"the last micro-batch's loss, {AVERAGED}": [sum(each) / len(each) for each in last]}


def _of_ranks(values: list[float], shares: int) -> list[list[float]]:
    size = len(values) // shares
    return [values[rank * size : (rank + 1) * size] for rank in range(shares)]


def explained(view: View) -> bool:
    """Return whether the weights of the gradients give the logged losses too: it is then one fault."""
    logged = view.candidate.logged
    trained_on = [values for name, values in _roots(view).items() if name.startswith(TRAINED_ON)]
    if logged is not None and any(_close(logged, each, _limit(view)) for each in trained_on):
        return True
    alone = _alone(view)
    if alone is None or logged is None or not_finite(view.reference.logged, logged) is not None:
        return False
    limit = _limit(view)
    size = max((abs(x) for x in logged if math.isfinite(x)), default=0.0)
    for each in view.attributions:
        if (
            each.matched < len(alone)
            and each.matched < len(logged)
            and math.isfinite(logged[each.matched])
            and len(alone[each.matched]) == len(each.w.solution)
        ):
            value = sum(w * x for w, x in zip(each.w.solution, alone[each.matched], strict=True))
            if abs(value - logged[each.matched]) > limit * size:
                return False
    return True
