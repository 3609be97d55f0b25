"""Learning rates: advanced by micro-batches or ranks, over the wrong horizon, or multiplied: EQ307, 308, 313, 507.

K micro-batches per cycle, R ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from equivcheck.errors import EquivcheckError
from equivcheck.interventions import Construct, Intervention, Length, Rates, Ration, Repeat
from equivcheck.recording import Recording
from equivcheck.topology import another
from equivcheck.view import Suspicion, View

UPDATES = frozenset({"learning_rates", "parameters", "state"})
# Rates are products of a few numbers.
_SAME: Final = 1e-9
# The linear rule and that of the square root, once too often or the other way round.
_POWERS: Final = (0.0, 1.0, -1.0, 0.5, -0.5)


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions if learning rates differ."""
    finding = view.judgement.first("learning_rates")
    calls = view.inside("scheduler")
    calls = [
        each
        for each in calls
        if not any(
            e.kind == "step" and e.backwards == each[0].backwards for e in view.candidate.timeline
        )
    ]
    most = max(_per_cycle(view.reference).values(), default=1)
    extra = {count for count in _per_cycle(view.candidate).values() if count > most}
    if finding is None:
        return []
    found, enough = [], False
    if calls or extra:
        evidence: dict[str, object] = {
            "scheduler_steps": sum(e.kind == "scheduler" for e in view.candidate.timeline),
            "full_batch": sum(e.kind == "scheduler" for e in view.reference.timeline),
            "relative": finding.relative,
        }
        code = "EQ507" if not calls and _per_rank(view, extra, most) else "EQ307"
        ration = Ration("scheduler", most)
        found.append(Suspicion(code, [(ration,)], evidence, finding.matched, 24, is_seen=True))
        # One call in each cycle is not enough where a call is told which micro-batch it is, or what its loss was.
        enough = not view.experiment.judgement((*view.chosen, ration)).first("learning_rates")
    by_ranks = _divided_by_ranks(view, finding.matched)
    # Where K is R, a horizon that is divided by R has the rates of one that K counts: which of them, another K told.
    if (not found or not enough) and not (
        by_ranks and view.steps == view.experiment.case.world_size
    ):
        found += _counted(view)
    found += by_ranks or _other_length(view, finding.matched)
    found += _horizon(view, finding.matched, finding.relative, quiet=bool(calls or extra))
    found += _multiplied(view, finding.matched)
    return found


def _per_rank(view: View, extra: set[int], most: int) -> bool:
    """Return whether a scheduler is stepped once for every rank, whatever K is."""
    size = view.experiment.case.world_size
    if size == 1 or extra != {size * most}:
        return False
    other = 2 if view.steps != 2 else 3
    if size != view.steps or other * view.experiment.case.shares > min(view.experiment.data.rows):
        return True
    try:
        counts = _per_cycle(view.experiment.at(other))
    except EquivcheckError:
        return True
    return set(counts.values()) == extra


def _per_cycle(recording: Recording) -> Counter[int]:
    return Counter(
        event.backwards
        for event in recording.timeline
        if event.kind == "scheduler" and event.backwards
    )


def _counted(view: View) -> list[Suspicion]:
    """EQ307 by prediction: the rate is a function of a count of micro-batches, with a scheduler or without.

    The loop run at accumulation_steps 1 shows that function; the accumulated rates are its values
    at every K-th place.
    """
    experiment = view.experiment
    # Told the full batch's length: a horizon that is read from the loader is then the same.
    for length in (None, len(experiment.data.rows)):
        try:
            alone = (
                experiment.pieces_recording(view.chosen)
                if length is None
                else experiment.alone_of_length(length)
            )
        except EquivcheckError:
            continue
        rates = [step.learning_rates for step in alone.steps]
        found = _at_counts(view, rates)
        if found is not None:
            return [found]
    return []


def _at_counts(view: View, alone: list[list[float]]) -> Suspicion | None:
    """Return EQ307 if the accumulated rates are those after a count of micro-batches, each a step."""
    places = view.places
    reference = [step.learning_rates for step in view.reference.steps]
    if alone[: len(reference)] != reference:
        return None
    # The count before or after the micro-batch, or that of the cycle's first: optimizer steps times K.
    for shift in (0, -1, 1, 1 - view.steps, -view.steps):
        taken = []
        for step in view.candidate.steps:
            micro = len(places[: step.backwards]) - 1 + shift
            if not 0 <= micro < len(alone):
                break
            taken.append(alone[micro])
        else:
            if taken == [step.learning_rates for step in view.candidate.steps]:
                evidence = {
                    "rule": "the rate follows a count of micro-batches",
                    "rates": taken[:8],
                    "full_batch": reference[:8],
                }
                return Suspicion("EQ307", [], evidence, 0, 25, proved=True, explains=UPDATES)
    return None


def _divided_by_ranks(view: View, step: int) -> list[Suspicion]:
    """EQ507 by prediction: the full batch has these rates if its horizon is divided by the number of ranks."""
    experiment = view.experiment
    size, steps = experiment.case.world_size, len(experiment.data.rows)
    mine = _rates(view.candidate)
    if size == 1 or not mine:
        return []
    for horizon in sorted({steps // size, -(-steps // size)} - {steps, 0}):
        try:
            other = experiment.reference_of_horizon(horizon)
        except EquivcheckError:
            continue
        if mine == _rates(other)[: len(mine)] and not _by_steps(view, mine):
            evidence = {
                "rule": f"the horizon is {horizon} optimizer steps, not {steps}: 1 / {size}"
            }
            return [Suspicion("EQ507", [], evidence, step, 27, proved=True, explains=UPDATES)]
    return []


def _by_steps(view: View, rates: list[list[float]]) -> bool:
    """Return whether a horizon is divided by K, which is the number of ranks here: it then changes with K."""
    case, rows = view.experiment.case, view.experiment.data.rows
    other = 2 if view.steps != 2 else 3
    if case.world_size != view.steps or other * case.shares > min(rows):
        return False
    try:
        return _rates(view.experiment.at(other)) != rates
    except EquivcheckError:
        return False


def _rates(recording: Recording) -> list[list[float]]:
    return [each.learning_rates for each in recording.steps]


def _multiplied(view: View, step: int) -> list[Suspicion]:
    """EQ313: every rate is one multiple of the full batch's, a power of K and of R."""
    factor, size = _factor(view, view.candidate), view.experiment.case.world_size
    if factor is None:
        return []
    fitting = [
        (a, b)
        for a, b in itertools.product(_POWERS, _POWERS if size > 1 else (0.0,))
        if (a or b) and _is(factor, float(view.steps) ** a * float(size) ** b)
    ]
    other = another(view)
    try:
        there = _factor(view, view.experiment.at(other)) if other is not None else None
    except EquivcheckError:  # The loop may refuse another K; a command line has but one.
        other = None
    if other is not None:
        fitting = [
            (a, b) for a, b in fitting if there and _is(there, float(other) ** a * float(size) ** b)
        ]
    if not fitting:
        return []
    evidence: dict[str, object] = {
        "factor": factor,
        "rule": " or ".join(_spelt(*each) for each in fitting),
    }
    # What several rules explain is none of them for sure.
    variants: list[tuple[Intervention, ...]] = [(Rates(1.0 / factor),)] if len(fitting) == 1 else []
    return [Suspicion("EQ313", variants, evidence, step, 40)]


def _factor(view: View, recording: Recording) -> float | None:
    """Return the one number by which all rates of a run are multiples of the full batch's; None if there is none."""
    pairs = [
        pair
        for step in recording.steps
        if step.matched is not None
        for pair in zip(
            step.learning_rates, view.reference.steps[step.matched].learning_rates, strict=False
        )
    ]
    ratios = [mine / full for mine, full in pairs if full]
    if not ratios or any(mine for mine, full in pairs if not full):
        return None
    return ratios[0] if all(_is(each, ratios[0]) for each in ratios) else None


def _is(a: float, b: float) -> bool:
    return abs(a - b) <= _SAME * abs(b)


def _spelt(a: float, b: float) -> str:
    powers = [(name, each) for name, each in (("accumulation_steps", a), ("world_size", b)) if each]
    return " * ".join(name if each == 1 else f"{name}**{each:g}" for name, each in powers)


def _other_length(view: View, step: int) -> list[Suspicion]:
    """EQ308 by prediction: the full batch has these rates if its loader is said to have another length."""
    experiment = view.experiment
    micro = len(experiment.micro_batches(experiment.data))
    steps, k = len(experiment.data.rows), view.steps
    mine = [each.learning_rates for each in view.candidate.steps]
    for length in sorted(
        {micro, micro // k, -(-micro // k), steps * k, steps - 1, steps + 1} - {steps, 0}
    ):
        try:
            other = experiment.reference_of_length(length)
        except EquivcheckError:
            continue
        if mine and mine == [each.learning_rates for each in other.steps][: len(mine)]:
            evidence = {"rule": f"the horizon is {length} optimizer steps, not {steps}"}
            return [Suspicion("EQ308", [], evidence, step, 29, proved=True, explains=UPDATES)]
    return []


def _horizon(view: View, step: int, relative: float, *, quiet: bool) -> list[Suspicion]:
    reference, candidate = view.reference.schedulers, view.candidate.schedulers
    variants: list[tuple[Intervention, ...]] = []
    differing = [
        {"scheduler": b["scheduler"], "full_batch": a["arguments"], "accumulated": b["arguments"]}
        for a, b in zip(reference, candidate, strict=False)
        if a["arguments"] != b["arguments"]
    ]
    if quiet and not differing:
        return []
    if differing:
        variants.append((Construct(view.experiment.reference()),))
    if candidate:
        variants.append((Repeat(view.steps),))
    variants.append((Length(len(view.experiment.data.rows)),))
    evidence: dict[str, object] = {"relative": relative}
    if differing:
        evidence["schedulers"] = differing
    code = "EQ507" if _numbers_by_ranks(view, differing) else "EQ308"
    return [Suspicion(code, list(variants), evidence, step, 28)]


def _numbers_by_ranks(view: View, differing: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether all numbers that a schedule is made with differently are divided by R, whatever K is."""
    size = view.experiment.case.world_size
    pairs = [
        (full, mine)
        for each in differing
        for key, full in each["full_batch"].items()
        if (mine := each["accumulated"].get(key)) != full
    ]
    numbers = all(isinstance(x, (int, float)) for pair in pairs for x in pair)
    if size == 1 or not pairs or not numbers:
        return False
    # Whole numbers are rounded down or up.
    return all(
        mine in {full / size, full // size, -(-full // size)} for full, mine in pairs
    ) and not _made_by_steps(view)


def _made_by_steps(view: View) -> bool:
    """Return whether K, which is the number of ranks here, has a part in what schedules are made with."""
    other = another(view)
    if view.experiment.case.world_size != view.steps or other is None:
        return False
    try:
        return view.experiment.at(other).schedulers != view.candidate.schedulers
    except EquivcheckError:
        return False
