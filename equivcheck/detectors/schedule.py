"""Learning rates: advanced by micro-batches, EQ307, or over the wrong horizon, EQ308."""

from __future__ import annotations

from collections import Counter

from equivcheck.errors import EquivcheckError
from equivcheck.interventions import Construct, Intervention, Length, Ration, Repeat
from equivcheck.recording import Recording
from equivcheck.view import Suspicion, View

UPDATES = frozenset({"learning_rates", "parameters", "state"})


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
    if not found or not enough:
        found += _counted(view)
    found += _divided_by_ranks(view, finding.matched) or _other_length(view, finding.matched)
    found += _horizon(view, finding.matched, finding.relative, quiet=bool(calls or extra))
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
    return [Suspicion("EQ308", list(variants), evidence, step, 28)]
