"""Decide a case: run the experiment, judge it, name the causes, and return the case of the result.

This is the order of the whole engine: reference, control, candidate, the two native runs; and only if something
differs, attribution and interventions.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

import torch

from equivcheck.case import Case
from equivcheck.diagnose import Diagnosis, cause, diagnose
from equivcheck.errors import EquivcheckError, StepError, TimedOut, UsageError
from equivcheck.experiment import Attribution, Experiment
from equivcheck.memory import estimate, refuse_what_cannot_fit
from equivcheck.precision import Precision, judge_precision
from equivcheck.promotion import promoted
from equivcheck.recording import Recording
from equivcheck.shared import shared_faults, skipped_steps
from equivcheck.split import plan
from equivcheck.subject import Subject, is_library
from equivcheck.verdict import Judgement, overall, rate_difference
from equivcheck.view import Suspicion, View

Progress = Callable[[str], None]

# A run that would not have seen a gradient that is missing altogether has compared nothing.
BLIND: Final = 1.0


def plan_cases(
    subject: Subject, accumulation_steps: Sequence[int], *, explicit: bool, **fields: Any
) -> tuple[list[Case], list[str]]:
    """Return the cases of a subject, and notes on those left out.

    Args:
        subject: Code under test; its batches are read to know their rows.
        accumulation_steps: Numbers of micro-batches to try.
        explicit: The user asked for these numbers; one that does not fit is then an error.
        fields: Other fields of every case.

    Raises:
        UsageError: The batches are empty or disagree, or an explicit number does not fit.
    """
    from equivcheck.feed import read_batches  # noqa: PLC0415

    torch.manual_seed(fields.get("seed", 0))
    data = read_batches(subject.fresh().batches, fields.get("optimizer_steps", 8))
    cases, notes = [], []
    for k in accumulation_steps:
        case = Case(target=subject.target, accumulation_steps=k, **fields)
        try:
            plan(data.rows, k, case.split, case.world_size)
        except UsageError as error:
            if explicit:
                raise
            notes.append(f"accumulation_steps {k} left out: {error.message}")
            continue
        cases.append(case)
    return cases, notes


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
    entry: dict[str, Any] = {
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
        "location": subject.location,
    }
    experiment: Experiment | None = None

    def tell(role: str) -> None:
        entry["role"] = role
        progress(role)

    try:
        with _deadline(timeout):
            experiment = Experiment(subject, case, tell)
            entry["estimate"] = estimate(subject, experiment.data)
            refuse_what_cannot_fit(entry["estimate"])
            _decide(experiment, entry, expect, tell)
    except UsageError:
        raise
    except _Expired:
        error = TimedOut(
            f"timed-out: no verdict after {timeout:g} s",
            where=f"case {case.id}, role {entry.get('role', '')}",
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
            experiment.close()
    entry["seconds"] = time.perf_counter() - started
    return entry


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
        if not _usable(reference, entry, subject=experiment.subject):
            if entry["verdict"] == "invalid" and entry.get("not_finite"):
                _natively(experiment, entry, expect, progress, "float64 turned non-finite")
            return
        control, candidate = experiment.control(), experiment.candidate()
    except StepError as error:
        # The code may raise only because it is promoted: then the native runs decide.
        if not experiment.is_promoted or not _runs_natively(experiment):
            raise
        experiment.notes.append(f"in float64 the code raises: {error.message}")
        _natively(experiment, entry, expect, progress, "the code raises in float64 only")
        return
    del control
    entry["lowered"] = {**reference.lowered, **candidate.lowered}
    if reference.dropout or candidate.dropout:
        entry["notes"].append("dropout was switched off in every run")
    if not candidate.steps or all(step.matched is None for step in candidate.steps):
        if _different_samples(experiment, entry):
            return
        if not candidate.steps:
            entry["verdict"] = "invalid"
    if not all(step.finite for step in candidate.steps):
        bad = next(step for step in candidate.steps if not step.finite)
        _invalid(
            entry,
            f"not-finite: gradients of optimizer_step {bad.index} are inf or nan when accumulated",
        )
        return
    if _different_samples(experiment, entry):
        return
    off = experiment.fit()
    if off is not None:
        _inconclusive(experiment, entry, off)
        return
    judgement = experiment.judgement()
    precision: Precision | None = None
    if experiment.is_promoted:
        try:
            precision = judge_precision(experiment)
        except StepError as error:
            entry["notes"].append(f"as written the code raises: {error.message}")
            raise
    if _differs_from_itself(experiment, entry, judgement):
        return
    if _draws(experiment, entry, judgement):
        return
    if precision is not None and _promotion_changed(experiment, judgement, precision):
        _natively(experiment, entry, expect, progress, "float64 and the native runs disagree")
        return
    if judgement.same and not judgement.power < BLIND:
        _too_coarse(experiment, entry, judgement)
        return
    _conclude(experiment, entry, judgement, precision, expect, progress)


def _draws(experiment: Experiment, entry: dict[str, Any], judgement: Judgement) -> bool:
    """EQ602 that a permutation does not show: one draw for all rows of a forward, more draws when accumulated.

    The full batch is repeated with other seeds, those that the loop sets itself included. What a loop draws before its
    first step (weights, say) is no random step: from the second step on every role starts from the reference's state.
    """
    if not judgement.kinds() & {"gradients", "applied"}:
        return False
    try:
        reseeded = experiment.control(permuted=False, seed_offset=1)
    except StepError:
        return False
    steps = [step for step in reseeded.steps if step.matched is not None]
    if len(experiment.reference().steps) > 1:
        steps = [step for step in steps if step.matched]
    worst = max((overall(step.gradients).relative for step in steps), default=0.0)
    if not worst > max(
        each.allowed for each in judgement.findings if each.kind in {"gradients", "applied"}
    ):
        return False
    suspicion = Suspicion(
        "EQ602", evidence={"relative": worst, "repeat": "the full batch differs with another seed"}
    )
    entry["causes"] = [cause(suspicion, "proved", suspicion.evidence)]
    entry["verdict"] = "inconclusive"
    entry["headline"] = (
        f"EQ602 stochastic-step: with another seed two full_batch runs differ by {worst:.1e}"
    )
    _measure(experiment, entry, judgement)
    return True


def _conclude(
    experiment: Experiment,
    entry: dict[str, Any],
    judgement: Judgement,
    precision: Precision | None,
    expect: tuple[str, ...],
    progress: Progress,
) -> None:
    causes: list[dict[str, Any]] = []
    shared = shared_faults(experiment)
    if experiment.is_promoted:
        shared += [each for each in skipped_steps(experiment) if each.shared or judgement.same]
    diagnosis = Diagnosis()
    if not judgement.same:
        progress("diagnosis")
        diagnosis = diagnose(experiment)
        causes += diagnosis.causes
    causes += [cause(each, "proved", each.evidence) for each in shared]
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
    entry["causes"] = causes
    entry["interventions"] = diagnosis.trials
    _measure(experiment, entry, judgement)
    proved = {each["code"] for each in causes if each["status"] == "proved"}
    if expect and verdict == "divergent" and proved == set(expect) and len(proved) == len(causes):
        verdict = "expected"
    entry["verdict"] = verdict
    entry["headline"] = _headline(entry, judgement)
    entry["notes"] += [note for note in experiment.notes if note not in entry["notes"]]


# ---- other verdicts ----------------------------------------------------------------------------


def _usable(reference: Recording, entry: dict[str, Any], subject: Subject) -> bool:
    if not reference.steps:
        backwards = len(reference.backwards)
        _invalid(
            entry, f"no-optimizer-step: train made {backwards} backwards and 0 optimizer steps"
        )
        entry["because"] = "only steps of torch.optim optimizers are seen; nothing was compared"
        return False
    sizes = [s for step in reference.steps for s in step.sample.values() if s is not None]
    if not sizes or not any(bool(s.any()) for s in sizes):
        held = sum(len(names) for names in reference.optimizers.values())
        foreign = all(
            name.startswith("(train)") for names in reference.optimizers.values() for name in names
        )
        what = f"no-gradient: the optimizer holds {held} parameters and none ever had a gradient"
        _invalid(entry, what)
        entry["because"] = (
            f"none of them is a parameter of the model that build() of {subject.target} returned"
            if foreign
            else "backward was not called, or the loss does not depend on them"
        )
        return False
    bad = next((step for step in reference.steps if not step.finite), None)
    if bad is not None:
        _invalid(
            entry,
            f"not-finite: gradients of optimizer_step {bad.index} are inf or nan in the full batch",
        )
        entry["not_finite"] = True
        return False
    return True


def _invalid(entry: dict[str, Any], headline: str) -> None:
    entry["verdict"] = "invalid"
    entry["headline"] = headline


def _different_samples(experiment: Experiment, entry: dict[str, Any]) -> bool:
    """EQ601: a micro-batch mixed the samples of several of the reference's optimizer steps, or came out of order."""
    cycles = experiment.cycles()
    candidate = experiment.candidate()
    groups: list[set[int]] = []
    if experiment.reference().prefetched:
        # In the order in which they were used, not handed out.
        groups = [{cycles.get(key, -1) for key in candidate.fetched[use]} for use in candidate.uses]
    else:
        last_backwards, index = -1, 0
        for event in candidate.timeline:
            if event.kind == "fetch":
                if event.backwards != last_backwards or not groups:
                    groups.append(set())
                last_backwards = event.backwards
                groups[-1] |= {cycles.get(key, -1) for key in candidate.fetched[index]}
                index += 1
    flat = [cycle for group in groups for cycle in (sorted(group) if len(group) == 1 else [])]
    one_by_one = "dataset" in experiment.wants
    mixed = one_by_one and any(len(group - {-1}) > 1 for group in groups)
    disordered = flat != sorted(flat)
    unknown = any(group == {-1} for group in groups) and "dataset" in experiment.wants
    if not (mixed or disordered or unknown):
        return False
    repeated = experiment.control(permuted=False)
    again = [step.samples for step in repeated.steps] == [
        step.samples for step in experiment.reference().steps
    ]
    evidence = {
        "micro_batches_that_mix_optimizer_steps": sum(len(group) > 1 for group in groups),
        "repeat": "the full batch takes the same samples again"
        if again
        else "each run takes other samples",
    }
    entry["causes"] = [cause(Suspicion("EQ601"), "proved", evidence)]
    _invalid(
        entry, "EQ601 different-samples: the accumulated run took other samples per optimizer step"
    )
    return True


def _inconclusive(experiment: Experiment, entry: dict[str, Any], off: float) -> None:
    """The control differs from the reference: find out why, by repeats."""
    repeat = experiment.control(permuted=False)
    bitwise = _identical(repeat)
    entry["verdict"] = "inconclusive"
    shown = f"{off:.1e}" if math.isfinite(off) else "not finite"
    if not bitwise and not experiment.subject.repeatable:
        _state_survives(experiment, entry, None, f"two full_batch runs differ by {shown}")
        return
    if bitwise:
        reseeded = experiment.control(permuted=False, seed_offset=1)
        if not _identical(reseeded):
            suspicion = Suspicion(
                "EQ602", evidence={"relative": off, "repeat": "differs with another seed"}
            )
        else:
            entry["headline"] = (
                f"order-dependent: rows in another order give other gradients, {shown}"
            )
            entry["because"] = (
                "bitwise equal when repeated in order: the code treats a row by its place in the batch"
            )
            _measure(experiment, entry, experiment.judgement())
            return
    else:
        drawn = (
            repeat.random_drawn
            or experiment.reference().random_drawn
            or experiment.reference().unseeded
        )
        code = "EQ602" if drawn else "EQ603"
        suspicion = Suspicion(
            code, evidence={"relative": off, "repeat": "the same full batch gives other gradients"}
        )
    entry["causes"] = [cause(suspicion, "proved", suspicion.evidence)]
    entry["headline"] = (
        f"{suspicion.code} {entry['causes'][0]['name']}: two full_batch runs differ by {shown}"
    )


def _differs_from_itself(
    experiment: Experiment, entry: dict[str, Any], judgement: Judgement
) -> bool:
    """Run the candidate once more at the end, where the code cannot be executed anew; write the case if it differs."""
    difference = None if experiment.subject.repeatable else _again(experiment)
    if difference is None:
        return False
    _state_survives(
        experiment, entry, judgement, f"the accumulated run differs from itself, {difference}"
    )
    return True


def _again(experiment: Experiment) -> str | None:
    """Return what differs between a second accumulated run and the first, or None."""
    first, second = experiment.candidate(), experiment.candidate_again()
    limit = experiment.noise().floor()
    if [step.samples for step in first.steps] != [step.samples for step in second.steps]:
        return "it steps after other samples"
    for a, b in zip(first.steps, second.steps, strict=True):
        for kind in ("gradients", "applied", "parameters", "state", "buffers"):
            x, y = overall(getattr(a, kind)), overall(getattr(b, kind))
            # Both runs are measured against the same reference, by their parts along it and in all.
            if max(abs(x.rd - y.rd), abs(x.dd - y.dd)) > limit * x.rr:
                return f"{kind} of optimizer_step {a.index}"
        if a.learning_rates != b.learning_rates:
            return f"learning rates of optimizer_step {a.index}"
    logged = (first.logged, second.logged)
    return (
        None if logged[0] == logged[1] or any(each is None for each in logged) else "logged losses"
    )


def _state_survives(
    experiment: Experiment, entry: dict[str, Any], judgement: Judgement | None, difference: str
) -> None:
    """An object's code cannot be executed anew for every run, and its runs differ."""
    if judgement is not None:
        _measure(experiment, entry, judgement)
    entry["verdict"] = "inconclusive"
    entry["headline"] = f"state-survives: {difference}"
    entry["because"] = (
        f"{experiment.subject.target} is an object, which cannot be executed again: state survives between runs, "
        "or a random generator of its own does"
    )
    entry["fix"] = (
        "check it as a file, FILE.py or package.module: those are executed anew for every run"
    )


def _identical(recording: Recording) -> bool:
    return all(s.dd == 0.0 for step in recording.steps for s in step.gradients.values()) and all(
        step.matched is not None for step in recording.steps
    )


# ---- native judgement --------------------------------------------------------------------------


def _runs_natively(experiment: Experiment) -> bool:
    other = Experiment(experiment.subject, experiment.case, promoted=False)
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
    entry["notes"].append(f"judged as written, not in float64: {why}")
    entry["judged"] = "native"
    native = Experiment(experiment.subject, experiment.case, progress, promoted=False)
    try:
        reference = native.reference()
        if not _usable(reference, entry, native.subject):
            return
        candidate = native.candidate()
        if not all(step.finite for step in candidate.steps):
            _invalid(entry, "not-finite: gradients are inf or nan when accumulated")
            return
        off = native.fit()
        if off is not None:
            _inconclusive(native, entry, off)
            return
        judgement = native.judgement()
        if _differs_from_itself(native, entry, judgement):
            return
        if judgement.same and not judgement.power < BLIND:
            _too_coarse(native, entry, judgement)
            return
        _conclude(native, entry, judgement, None, expect, progress)
    finally:
        experiment.runs += native.runs
        native.close()


def _too_coarse(experiment: Experiment, entry: dict[str, Any], judgement: Judgement) -> None:
    """The runs as written agree, in noise so large that any fault would have agreed too."""
    _measure(experiment, entry, judgement)
    entry["verdict"] = "inconclusive"
    entry["headline"] = f"too-coarse: as written, faults below {judgement.power:.1e} cannot be seen"
    entry["because"] = (
        "the case could not be judged in float64, and in its own precision the noise is as large"
    )
    entry["fix"] = "let train run in float64: no asserted dtype, no dtype taken for granted"


# ---- numbers -----------------------------------------------------------------------------------


def _measure(experiment: Experiment, entry: dict[str, Any], judgement: Judgement) -> None:
    """Write the divergence, the attribution and the detection power into a case."""
    reference, candidate, control = (
        experiment.reference(),
        experiment.candidate(),
        experiment.control(),
    )
    entry["detection_power"] = judgement.power
    entry["margin"] = judgement.margin if math.isfinite(judgement.margin) else None
    for key, attribute in (
        ("gradients", "gradients"),
        ("parameters", "parameters"),
        ("buffers", "buffers"),
        ("optimizer_state", "state"),
    ):
        entry["divergence"][key] = _worst(candidate, control, attribute)
    entry["divergence"]["learning_rates"] = _rates(reference, candidate)
    entry["divergence"]["losses"] = _losses(reference, candidate, control)
    entry["findings"] = [
        {
            "kind": each.kind,
            "optimizer_step": each.matched,
            "tensors": list(each.names[:10]),
            "relative": each.relative,
            "allowed": each.allowed,
            "detail": each.detail,
        }
        for each in judgement.findings[:50]
    ]
    entry["optimizer_steps_seen"] = {
        "full_batch": len(reference.steps),
        "accumulated": len(candidate.steps),
    }
    entry["parameters_count"] = reference.parameters
    entry["dtype"] = reference.dtype
    entry["timeline"] = [
        {"event": e.kind, "backwards": e.backwards, **e.detail} for e in candidate.timeline[:400]
    ]
    entry["per_parameter"] = _table(candidate, judgement)
    entry["logged_losses"] = {"full_batch": reference.logged, "accumulated": candidate.logged}
    if judgement.kinds() & {"gradients", "applied", "logged"}:
        view = View(experiment)
        try:
            chosen = (view.divergent or view.attributions)[:1]
        except EquivcheckError as error:
            entry["notes"].append(f"no attribution: {str(error).splitlines()[0]}")
            chosen = []
        if chosen:
            entry["attribution"] = _attribution(chosen[0])


def _worst(candidate: Recording, control: Recording, attribute: str) -> dict[str, Any] | None:
    worst: tuple[float, Any, int] | None = None
    for step in candidate.steps:
        sums = getattr(step, attribute)
        if step.matched is None or not sums:
            continue
        whole = overall(sums)
        if worst is None or not whole.relative <= worst[0]:
            worst = (whole.relative, whole, step.matched)
    if worst is None:
        return None
    noise = 0.0
    for step in control.steps:
        if step.matched == worst[2]:
            noise = overall(getattr(step, attribute)).relative
    return {
        "relative": worst[0],
        "control": noise,
        "scale": worst[1].scale,
        "cosine": worst[1].cosine,
        "optimizer_step": worst[2],
    }


def _rates(reference: Recording, candidate: Recording) -> dict[str, Any] | None:
    found = [
        (rate_difference(reference.steps[step.matched], step), step)
        for step in candidate.steps
        if step.matched is not None
    ]
    if not found:
        return None
    worst, step = max(found, key=lambda item: item[0])
    assert step.matched is not None
    return {
        "relative": worst,
        "control": 0.0,
        "scale": None,
        "cosine": None,
        "optimizer_step": step.matched,
        "full_batch": [s.learning_rates for s in reference.steps],
        "accumulated": [s.learning_rates for s in candidate.steps][:200],
    }


def _losses(
    reference: Recording, candidate: Recording, control: Recording
) -> dict[str, Any] | None:
    """Compare logged losses, or the sums of the backward roots of each step where nothing was logged."""
    from equivcheck.verdict import logged_difference  # noqa: PLC0415

    logged = logged_difference(reference, candidate)
    if logged is not None:
        a, b = reference.logged or [], candidate.logged or []
        return {
            "relative": logged,
            "control": logged_difference(reference, control),
            "scale": b[0] / a[0] if a and a[0] else None,
            "cosine": None,
            "source": "logged",
        }
    roots = [_roots(reference, i) for i in range(len(reference.steps))]
    worst, scale = 0.0, None
    for step in candidate.steps:
        if step.matched is None or not roots[step.matched]:
            continue
        value = sum(b.loss for b in candidate.backwards[step.first_backward : step.backwards])
        relative = abs(value - roots[step.matched]) / abs(roots[step.matched])
        if relative >= worst:
            worst, scale = relative, value / roots[step.matched]
    return {
        "relative": worst,
        "control": 0.0,
        "scale": scale,
        "cosine": None,
        "source": "backward roots",
    }


def _roots(recording: Recording, index: int) -> float:
    step = recording.steps[index]
    return sum(b.loss for b in recording.backwards[step.first_backward : step.backwards])


def _table(candidate: Recording, judgement: Judgement) -> list[dict[str, Any]]:
    finding = judgement.first("gradients", "applied")
    step = next(
        (
            s
            for s in candidate.steps
            if s.matched is not None and (finding is None or s.index == finding.step)
        ),
        None,
    )
    if step is None or step.matched is None:
        return []
    zero = judgement.zero.get(step.matched, set())
    rows = [
        {
            "name": name,
            "optimizer_step": step.matched,
            "relative": s.relative,
            "scale": s.scale,
            "cosine": s.cosine,
            "norm": s.reference_norm,
            "zero": name in zero,
        }
        for name, s in step.gradients.items()
    ]
    rows.sort(key=lambda row: (bool(row["zero"]), -float(row["relative"] or 0.0)))  # type: ignore[arg-type]
    return rows[:200]


def _attribution(found: Attribution) -> dict[str, Any]:
    return {
        "optimizer_step": found.matched,
        "reference_weights": found.v.values,
        "candidate_weights": found.w.values,
        "reference_residual": found.v.residual,
        "candidate_residual": found.w.residual,
        "rank": found.v.rank,
    }


def _headline(entry: dict[str, Any], judgement: Judgement) -> str:
    gradients = entry["divergence"]["gradients"] or {}
    relative, scale, cosine = (gradients.get(key) for key in ("relative", "scale", "cosine"))
    if entry["verdict"] == "equivalent":
        return f"the same function: gradients agree to {relative or 0.0:.1e}"
    first = entry["causes"][0] if entry["causes"] else None
    label = f"{first['code']} {first['name']}: " if first else ""
    if first and first["status"] == "suspected" and first["code"] != "EQ000":
        label = f"{first['code']} {first['name']} (suspected): "
    if entry["verdict"] == "precision-loss":
        loss = entry["precision_loss"]
        return (
            f"{label}accumulating loses {loss['accumulation']:.1e} ({loss['units']:.2g} roundoffs)"
        )
    kinds = judgement.kinds()
    k = entry["accumulation_steps"]
    if first and first["evidence"].get("shared"):
        shown = first["evidence"].get("relative")
        return label + (
            f"{shown:.1e} from what it should be, full batch too"
            if shown
            else "in the full batch too"
        )
    if "gradients" in kinds or "applied" in kinds:
        if scale and cosine is not None and cosine > 1 - 1e-9 and abs(scale - 1) > 1e-9:
            return f"{label}{scale:.4g}x the full_batch gradient (accumulation_steps={k})"
        return f"{label}gradients differ by {relative:.1e} (accumulation_steps={k})"
    if "samples" in kinds:
        seen = entry["optimizer_steps_seen"]
        if seen["accumulated"] == seen["full_batch"]:
            return f"{label}optimizer steps consumed other samples (accumulation_steps={k})"
        return f"{label}{seen['accumulated']} optimizer steps, not {seen['full_batch']} (accumulation_steps={k})"
    finding = judgement.findings[0] if judgement.findings else None
    if finding is None:
        return label.rstrip(": ")
    what = {
        "learning_rates": "learning rates",
        "buffers": "buffers",
        "parameters": "parameter updates",
        "state": "optimizer state",
        "shadows": "shadow weights",
        "logged": "logged losses",
        "none": "gradients that are absent in one run",
    }.get(finding.kind, finding.kind)
    rates = judgement.first("learning_rates")
    if rates is not None:
        finding, what = rates, "learning rates"
    return f"{label}{what} differ by {finding.relative:.1e} (accumulation_steps={k})"


# ---- time --------------------------------------------------------------------------------------


def _user_frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield the running frames of the user's code, innermost first."""
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            yield frame
        if frame.f_code.co_filename == __file__:
            return
        frame = frame.f_back


class _Expired(BaseException):
    """The deadline passed. Not an Exception, so that a loop that catches those cannot swallow it."""


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    fired = 0

    def expire(_signal: int, frame: FrameType | None) -> None:
        nonlocal fired
        fired += 1
        inside = list(_user_frames(frame))
        # Once it has left the user's code, nothing may disturb the clearing up.
        if fired > 1 and not inside:
            return
        if fired > 1:
            # A bare `except:` in the loop has swallowed the last one; its own body is not protected by it.
            for each in inside:
                each.f_trace = again
            sys.settrace(lambda *_: None)
        raise _Expired

    def again(_frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            raise _Expired
        return again

    tracer = sys.gettrace()
    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        sys.settrace(tracer)
