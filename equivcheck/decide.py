"""Decide a case: run the experiment, judge it, name the causes, and return the case of the result.

This is the order of the whole engine: reference, control, candidate, the two native runs; and only if something
differs, attribution and interventions.
"""

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from equivcheck.case import Case
from equivcheck.causes import CAUSES
from equivcheck.cuts import refuse_remainders, refuse_uneven
from equivcheck.deadline import Expired, deadline
from equivcheck.describe import headline, measure
from equivcheck.diagnose import Diagnosis, cause, diagnose
from equivcheck.doubts import (
    different_samples,
    differs_from_itself,
    draws,
    draws_within,
    inconclusive,
    not_finite_accumulated,
    stochastic,
    too_coarse,
    trained,
    usable,
)
from equivcheck.errors import EquivcheckError, StepError, TimedOut, UsageError
from equivcheck.execute import process_state, seed_all
from equivcheck.experiment import Experiment
from equivcheck.feed import read_batches
from equivcheck.memory import refuse_what_cannot_fit
from equivcheck.precision import Precision, judge_precision
from equivcheck.promotion import promoted
from equivcheck.shared import shared_faults, skipped_steps
from equivcheck.split import plan
from equivcheck.subject import Subject
from equivcheck.subject_experiment import SubjectExperiment
from equivcheck.traffic import redundant
from equivcheck.verdict import Judgement, overall
from equivcheck.view import Suspicion

Progress = Callable[[str], None]

# What DDP says at a forward if the step before it was never reduced: that step is done, and may be wrong.
UNREDUCED: Final = "finished reduction in the prior iteration"
NOT_FINITE: Final = "float64 turned non-finite"

# A run that would not have seen a gradient that is missing altogether has compared nothing.
BLIND: Final = 1.0

# Causes that are suspected where the pieces do not make the gradients.
FROM_PIECES: Final = frozenset({"EQ000", "EQ201", "EQ202"})


def plan_cases(
    subject: Subject,
    accumulation_steps: Sequence[int],
    *,
    explicit: bool,
    world_sizes: Sequence[int] = (1,),
    **fields: Any,
) -> tuple[list[Case], list[str]]:
    """Return the cases of a subject, and notes on those left out.

    Args:
        subject: Code under test; its batches are read to know their rows.
        accumulation_steps: Numbers of micro-batches to try.
        explicit: The user asked for these numbers; one that does not fit is then an error.
        world_sizes: Numbers of ranks to try.
        fields: Other fields of every case.

    Raises:
        UsageError: The batches are empty or disagree, or an explicit number does not fit.
    """
    seed = fields.get("seed", 0)
    seed_all(seed)  # modules may draw while they are imported
    code = subject.fresh()
    seed_all(seed)
    data = read_batches(code.batches, fields.get("optimizer_steps", 8), fields.get("rows"))
    wants = inspect.signature(code.train).parameters
    cases, notes = [], []
    for r, k in itertools.product(world_sizes, accumulation_steps):
        case = Case(target=subject.target, accumulation_steps=k, world_size=r, **fields)
        refuse_uneven(case, wants, subject.location)
        try:
            plan(
                data.rows,
                k,
                case.split,
                case.world_size,
                every_rank_all=case.shares < case.world_size,
            )
            refuse_remainders(case, wants, data.rows, subject.location)
        except UsageError as error:
            if explicit:
                raise
            ranks = f" on {r} ranks" if r > 1 else ""
            notes.append(f"accumulation_steps {k}{ranks} left out: {error.message}")
            continue
        cases.append(case)
    return cases, notes


def blank(case: Case, expect: tuple[str, ...], *, location: str) -> dict[str, Any]:
    """Return the entry of a case in the result before anything is known of it."""
    return {
        "id": case.id,
        **case.as_dict(),
        "expect": list(expect),
        "verdict": "error",
        "headline": "",
        "warnings": [],
        "causes": [],
        "divergence": dict.fromkeys(
            ("gradients", "losses", "parameters", "buffers", "learning_rates", "optimizer_state")
        ),
        "attribution": None,
        "detection_power": None,
        "margin": None,
        "notes": [],
        "location": location,
    }


@process_state()
def run_case(
    subject: Subject,
    case: Case,
    *,
    expect: tuple[str, ...] = (),
    timeout: float | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Decide one case and return it as the result has it, ready for JSON.

    Raises:
        UsageError: The call, the target or its batches are wrong. What the user's code raises
            while it trains becomes a case of verdict `error` instead.
    """
    with promoted():
        pass  # what torch imports for it takes seconds, and a deadline must not leave it half done
    started = time.perf_counter()
    entry = blank(case, expect, location=subject.location)
    experiment: Experiment | None = None

    def tell(role: str) -> None:
        entry["role"] = role
        progress(role)

    try:
        with deadline(timeout, __file__):
            make = getattr(subject, "experiment", SubjectExperiment)
            experiment = make(subject, case, tell)
            experiment.limit(timeout)
            entry["estimate"] = experiment.estimate()
            refuse_what_cannot_fit(entry["estimate"])
            _decide(experiment, entry, expect, tell)
    except UsageError:
        raise
    except Expired:
        error = TimedOut(
            f"timed-out: no verdict after {timeout:g} s",
            where=f"case {case.id}, {_stage(entry)}",
            user_traceback="",
            expected="the roles of one case to end in time",
            because="train never ended, or the case is larger than the time given",
            fix=f"--timeout {2 * (timeout or 1):g}",
        )
        _failed(entry, error)
    except StepError as error:
        _failed(entry, error)
    finally:
        if experiment is not None:
            entry["runs"] = experiment.runs
            entry.update(experiment.facts())
            experiment.close()
    entry["seconds"] = time.perf_counter() - started
    return entry


def _stage(entry: dict[str, Any]) -> str:
    return f"role {entry['role']}" if "role" in entry else "before its first run"


def _failed(entry: dict[str, Any], error: EquivcheckError) -> None:
    entry["verdict"] = "error"
    entry["headline"] = error.message
    entry["error"] = {
        "type": type(error).__name__,
        "message": error.message,
        "where": error.where,
        "expected": error.expected,
        "because": error.because,
        "fix": error.fix,
        "traceback": getattr(error, "user_traceback", ""),
        "exit_code": error.exit_code,
    }


def _decide(
    experiment: Experiment, entry: dict[str, Any], expect: tuple[str, ...], progress: Progress
) -> None:
    try:
        reference = experiment.reference()
        if not usable(reference, entry, experiment.subject, experiment.data):
            if entry["verdict"] == "invalid" and entry.get("not_finite"):
                _natively(experiment, entry, expect, progress, NOT_FINITE)
            return
        experiment.control()
        candidate = experiment.candidate()
    except TimedOut:
        raise  # There is no time left for another try.
    except StepError as error:
        if _raises_late(error) and _before(experiment, entry, expect, progress, error):
            return
        # The code may raise only because it is promoted: then the native runs decide.
        if not _runs_natively(experiment):
            raise
        experiment.notes.append(f"in float64 the code raises: {error.message}")
        _natively(experiment, entry, expect, progress, "the code raises in float64 only")
        return
    entry["lowered"] = {**reference.lowered, **candidate.lowered}
    if reference.dropout or candidate.dropout:
        entry["notes"].append("dropout was switched off in every run")
    if not candidate.steps or all(step.matched is None for step in candidate.steps):
        if different_samples(experiment, entry):
            return
        if not candidate.steps:
            entry["verdict"] = "invalid"
    if not all(step.finite for step in candidate.steps):
        if not all(step.finite for step in experiment.control().steps):
            inconclusive(experiment, entry, math.inf)
            return
        # What an operator that asserts nothing makes of float64 may be anything: as written it may be finite.
        _natively(experiment, entry, expect, progress, NOT_FINITE)
        return
    if different_samples(experiment, entry) or not trained(candidate, entry):
        return
    off = experiment.fit()
    if off is not None:
        inconclusive(experiment, entry, off)
        _keyed(experiment, entry, expect, progress)
        return
    judgement = experiment.judgement()
    precision: Precision | None = None
    try:
        # What ranks add up to, each for itself, says nothing of what they make of it together afterwards.
        if judgement.left is None:
            precision = judge_precision(experiment)
    except StepError as error:
        entry["notes"].append(f"as written the code raises: {error.message}")
        raise
    if differs_from_itself(experiment, entry, judgement):
        return
    drawn = draws(experiment, judgement)
    diagnosis: Diagnosis | None = None
    if drawn is not None:
        # What interventions bring back within noise is not the fault of random draws; nor what has another cause, where
        # the loop draws only to set itself up.
        diagnosis = diagnose(experiment)
        if not diagnosis.put_right and not (
            diagnosis.explained and not draws_within(experiment, judgement)
        ):
            stochastic(experiment, entry, judgement, drawn)
            _keyed(experiment, entry, expect, progress)
            return
    if precision is not None and _promotion_changed(experiment, judgement, precision):
        _natively(experiment, entry, expect, progress, "float64 and the native runs disagree")
        return
    if judgement.same and not judgement.power < BLIND:
        too_coarse(experiment, entry, judgement)
        return
    conclude(experiment, entry, judgement, precision, expect, progress, diagnosis)


def conclude(
    experiment: Experiment,
    entry: dict[str, Any],
    judgement: Judgement,
    precision: Precision | None,
    expect: tuple[str, ...],
    progress: Progress,
    diagnosis: Diagnosis | None = None,
) -> None:
    """Write verdict, causes and numbers of a case whose runs can be judged."""
    causes: list[dict[str, Any]] = []
    shared = shared_faults(experiment)
    if experiment.has_native:
        shared += [each for each in skipped_steps(experiment) if each.shared or judgement.same]
    if judgement.same:
        diagnosis = Diagnosis()
    elif diagnosis is None:
        progress("diagnosis")
        diagnosis = diagnose(experiment)
    stale = any(each.code == "EQ302" for each in shared)
    # Gradients of earlier steps are in every piece: what they look like there tells of nothing else.
    causes += [
        each
        for each in diagnosis.causes
        if each["status"] == "proved" or not (stale and each["code"] in FROM_PIECES)
    ]
    named = {each["code"] for each in causes}
    causes += [cause(each, "proved", each.evidence) for each in shared if each.code not in named]
    verdict = "divergent" if causes else "equivalent"
    if precision is not None:
        entry["precision_loss"] = {
            "units": precision.units,
            "accumulation": precision.accumulation,
            "full_batch": precision.full_batch,
            "accumulated": precision.accumulated,
        }
        if precision.loss is not None and judgement.same and not shared:
            verdict = "precision-loss"
            causes.append(cause(Suspicion("EQ401"), "proved", precision.loss))
    if judgement.same and not causes and (shown := experiment.printed()):
        name = CAUSES["EQ701"].name
        if shown.pop("exact") or "EQ701" in expect:
            verdict = "divergent"
            causes.append(cause(Suspicion("EQ701", evidence=shown), "proved", shown))
        else:
            entry["warnings"].append({"code": "EQ701", "name": name, "evidence": shown})
            what = shown.get("rule", "another number")
            entry["notes"].append(
                f"the printed {shown['printed_as']} is not the full batch's: {what}"
            )
    if judgement.left is not None:
        entry["notes"].append(
            "no rank steps with the full batch's gradient; parameters were compared where the loop leaves them after "
            "the step, as it averages them or sends them there"
        )
    if experiment.crew is not None and judgement.same:
        evidence = redundant(experiment)
        if evidence is not None:
            own = {"fix": evidence.pop("fix")} if "fix" in evidence else {}
            entry["warnings"].append(
                {"code": "EQ503", "name": CAUSES["EQ503"].name, "evidence": evidence, **own}
            )
    entry["causes"] = causes
    entry["interventions"] = diagnosis.trials
    measure(experiment, entry, judgement)
    proved = {each["code"] for each in causes if each["status"] == "proved"}
    if expect and verdict == "divergent" and proved == set(expect) and len(proved) == len(causes):
        verdict = "expected"
    entry["verdict"] = verdict
    entry.update(experiment.facts())
    entry["headline"] = headline(entry, judgement)
    entry["notes"] += [note for note in experiment.notes if note not in entry["notes"]]


def _keyed(
    experiment: Experiment, entry: dict[str, Any], expect: tuple[str, ...], progress: Progress
) -> None:
    """Where random draws hide all: let each sample draw the same in every run, and tell of a fault that is proved then.

    That nothing differs then is no verdict on the code as it is: it stays inconclusive.
    """
    case = experiment.case
    if (
        case.rng != "off"
        or case.world_size > 1
        or not experiment.other_steps
        or {each["code"] for each in entry["causes"]} != {"EQ602"}
    ):
        return
    other = experiment.again(progress, promoted=True)
    other.case = replace(other.case, rng="per-sample")
    found = {**entry, "notes": list(entry["notes"]), "warnings": [], "causes": []}
    try:
        _decide(other, found, expect, progress)
    except EquivcheckError:
        return
    finally:
        experiment.runs += other.runs
        other.close()
    if found["verdict"] not in {"divergent", "expected"} or any(
        each["status"] != "proved" for each in found["causes"]
    ):
        return
    found["notes"].append("random draws made the same for each sample in every run")
    entry.update(found)


def _before(
    experiment: Experiment,
    entry: dict[str, Any],
    expect: tuple[str, ...],
    progress: Progress,
    error: StepError,
) -> bool:
    """Judge the optimizer steps before the one that raised; tell whether they are what is wrong."""
    done = error.optimizer_step
    if not done or done == experiment.case.optimizer_steps:
        return False
    shorter = experiment.again(progress, promoted=True, optimizer_steps=done)
    found = {**entry, "notes": list(entry["notes"]), "warnings": []}
    try:
        _decide(shorter, found, expect, progress)
    except EquivcheckError:
        return False
    finally:
        experiment.runs += shorter.runs
        shorter.close()
    if not any(each["status"] == "proved" for each in found["causes"]):
        return False
    what = (
        "DDP raises: the step before was never reduced"
        if UNREDUCED in f"{error.message} {error.user_traceback}"
        else f"the accumulated run raises: {error.message}"
    )
    found["notes"].append(f"judged before optimizer_step {done}, where {what}")
    entry.update(found)
    return True


def _raises_late(error: StepError) -> bool:
    """Return whether an exception may be what a fault in earlier steps leads to.

    A scheduler with a fixed number of steps raises where it is advanced too often, and DDP or FSDP where a cycle before
    was never reduced.
    """
    return (error.where or "").startswith("candidate,")


def _runs_natively(experiment: Experiment) -> bool:
    other = experiment.again(promoted=False)
    try:
        other.reference()
        other.candidate()
    except StepError:
        return False
    finally:
        other.close()
    return True


def _promotion_changed(experiment: Experiment, judgement: Judgement, precision: Precision) -> bool:
    """Return whether float64 and the native runs tell different stories about the gradients."""
    worst = max(
        (f.relative for f in judgement.findings if f.kind in {"gradients", "applied"}), default=0.0
    )
    agree = precision.gap <= 10 * precision.noise
    kinds = judgement.kinds()
    if "applied" in kinds:  # What a clip makes of gradients that agree may differ.
        agree = agree and _applied_natively(experiment) <= 10 * precision.noise
    if (
        kinds
        and kinds <= {"gradients", "applied", "logged"}
        and worst > 10 * precision.noise
        and agree
    ):
        # A native run of which no gradient could be compared agrees with nothing.
        return bool(_compared(experiment))
    if judgement.same and not agree and precision.loss is None:
        return True
    return bool(
        judgement.same and precision.loss is not None and precision.gap > 1e3 * precision.noise
    )


def _applied_natively(experiment: Experiment) -> float:
    """Return the largest relative difference of the gradients that optimizers took, as written."""
    steps = experiment.native("native_candidate").steps
    found = [overall(s.applied) for s in steps if s.matched is not None and not s.skipped]
    return max((each.relative for each in found if each.finite), default=0.0)


def _compared(experiment: Experiment) -> int:
    return sum(
        step.matched is not None and not step.skipped
        for step in experiment.native("native_candidate").steps
    )


def _natively(
    experiment: Experiment,
    entry: dict[str, Any],
    expect: tuple[str, ...],
    progress: Progress,
    why: str,
) -> None:
    """Judge the case on the native runs, against their own control."""
    note = f"judged as written, not in float64: {why}"
    entry["notes"].append(note)
    entry["judged"] = "native"
    entry.pop("not_finite", None)
    native = experiment.again(progress, promoted=False)

    def as_in_float64() -> None:
        """Not finite as written either: float64 has changed nothing."""
        entry["notes"].remove(note)
        del entry["judged"]

    try:
        reference = native.reference()
        if not usable(reference, entry, native.subject, native.data):
            if why == NOT_FINITE and entry.get("not_finite"):
                as_in_float64()
            return
        native.control()
        candidate = native.candidate()
        if not all(step.finite for step in candidate.steps):
            bad = next(step for step in candidate.steps if not step.finite)
            not_finite_accumulated(entry, bad.index)
            if why == NOT_FINITE:
                as_in_float64()
            return
        off = native.fit()
        if off is not None:
            inconclusive(native, entry, off)
            return
        judgement = native.judgement()
        if differs_from_itself(native, entry, judgement):
            return
        if judgement.same and not judgement.power < BLIND:
            too_coarse(native, entry, judgement)
            return
        conclude(native, entry, judgement, None, expect, progress)
    finally:
        experiment.runs += native.runs
        native.close()
