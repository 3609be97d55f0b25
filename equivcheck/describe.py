"""Write what was measured into a case of the result: numbers, tables, and the headline."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Final

from equivcheck import series, traffic
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment
from equivcheck.fit import Attribution
from equivcheck.recording import Recording
from equivcheck.verdict import (
    Judgement,
    Noise,
    logged_difference,
    not_finite_in_both,
    overall,
    rate_difference,
    whole_log,
)
from equivcheck.view import View

# A factor closer to 1 than this would be printed as 1.
SHOWN: Final = 1e-3
# Differences of two optimizer steps this close are the same: a factor, say, that is off in every step.
TIED: Final = 1e-6
# Parameters whose row is written; a report says how many more there are.
MOST_ROWS: Final = 2000


def measure(experiment: Experiment, entry: dict[str, Any], judgement: Judgement) -> None:
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
    if judgement.left is not None:
        entry["divergence"]["gradients"] = entry["divergence"]["optimizer_state"] = None
        entry["divergence"]["parameters"] = _worst(judgement.left, control, "parameters")
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
    if candidate.ranks:
        entry["ranks"] = ranks_of(experiment, judgement.left or candidate, judgement)
    entry["optimizer_steps_seen"] = {
        "full_batch": len(reference.steps),
        "accumulated": len(candidate.steps),
    }
    entry["parameters_count"] = reference.parameters
    entry["dtype"] = reference.dtype
    entry["per_parameter"] = _table(candidate, judgement, experiment.noise())
    entry["logged_losses"] = {"full_batch": reference.logged, "accumulated": candidate.logged}
    unfinished = not_finite_in_both(reference.logged, whole_log(reference, candidate))
    if unfinished is not None:
        entry["notes"].append(unfinished)
    if judgement.kinds() & {"gradients", "applied", "logged"}:
        view = View(experiment)
        try:
            chosen = (view.divergent or view.attributions)[:1]
        except EquivcheckError as error:
            entry["notes"].append(f"no attribution: {str(error).splitlines()[0]}")
            chosen = []
        if chosen:
            entry["attribution"] = _attribution(chosen[0])
            series.attributed(view, view.divergent or view.attributions, entry)
    series.write(experiment, entry, judgement)


def ranks_of(
    experiment: Experiment, candidate: Recording, judgement: Judgement
) -> list[dict[str, Any]]:
    """Return what each rank did: how far it is off, and what it sent in each optimizer step, as written.

    `reductions` counts the all-reduces that follow each backward of the step.
    """
    native = experiment.native("native_candidate") if experiment.has_native else candidate
    limit = experiment.noise().floor()
    found = []
    for rank, each in enumerate(candidate.ranks):
        worst = max(
            (overall(step.gradients).relative for step in each.steps if step.matched is not None),
            default=None,
        )
        sender = native.ranks[rank] if rank < len(native.ranks) else each
        found.append(
            {
                "rank": rank,
                "verdict": "equivalent"
                if judgement.left is not None or (worst is not None and worst <= limit)
                else "divergent",
                "gradients": worst,
                "optimizer_steps": len(each.steps),
                "seconds": each.seconds,
                "collectives": [
                    {
                        "optimizer_step": step,
                        "count": len(sent),
                        "bytes": sum(c.bytes for c in sent),
                        "kinds": dict(Counter(c.kind for c in sent)),
                        "reductions": [len(each) for each in reduced],
                    }
                    for step, (sent, reduced) in enumerate(
                        zip(traffic.by_step(sender), traffic.reductions(sender), strict=True)
                    )
                ],
            }
        )
    return found


def _worst(candidate: Recording, control: Recording, attribute: str) -> dict[str, Any] | None:
    """Return the largest difference and its optimizer step: the first of those that rounding alone tells apart."""
    worst: tuple[float, Any, int] | None = None
    for step in candidate.steps:
        sums = getattr(step, attribute)
        if step.matched is None or not sums:
            continue
        whole = overall(sums)
        relative = whole.relative if whole.finite else math.inf
        if worst is None or relative > worst[0] * (1 + TIED):
            worst = (relative, whole, step.matched)
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
    """Compare logged losses, or the sums of the backward roots of each step where nothing was logged.

    What one of several ranks calls backward on is scaled for its way of reducing, and is no loss of the whole batch.
    """
    logged = logged_difference(reference, candidate)
    if logged is not None:
        a, b = reference.logged or [], whole_log(reference, candidate) or []
        return {
            "relative": logged,
            "control": logged_difference(reference, control),
            "scale": b[0] / a[0] if a and a[0] else None,
            "cosine": None,
            "source": "logged",
        }
    if candidate.ranks:
        return None
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


def _table(candidate: Recording, judgement: Judgement, noise: Noise) -> list[dict[str, Any]]:
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
            "multiple": series.multiple_of(step, noise, name),
        }
        for name, s in step.gradients.items()
    ]
    rows.sort(key=lambda row: (bool(row["zero"]), -float(row["relative"] or 0.0)))
    return rows[:MOST_ROWS]


def _attribution(found: Attribution) -> dict[str, Any]:
    return {
        "optimizer_step": found.matched,
        "reference_weights": found.shaped(found.v.values),
        "candidate_weights": found.shaped(found.w.values),
        "reference_residual": found.v.residual,
        "candidate_residual": found.w.residual,
        "rank": found.v.rank,
    }


def headline(entry: dict[str, Any], judgement: Judgement) -> str:
    """Return one line for a decided case: the first cause, and its number within 45 characters."""
    gradients = entry["divergence"]["gradients"] or {}
    relative, scale, cosine = (gradients.get(key) for key in ("relative", "scale", "cosine"))
    if entry["verdict"] == "equivalent":
        if judgement.left is not None:
            relative = (entry["divergence"]["parameters"] or {}).get("relative")
            return f"the same update: parameters agree to {relative or 0.0:.1e}"
        return f"the same function: gradients agree to {relative or 0.0:.1e}"
    first = entry["causes"][0] if entry["causes"] else None
    label = f"{first['code']} {first['name']}: " if first else ""
    if first and first["status"] == "suspected" and first["code"] != "EQ000":
        label = f"{first['code']} {first['name']} (suspected): "
    if entry["verdict"] == "precision-loss":
        loss = entry["precision_loss"]
        return f"{label}accumulating loses {loss['accumulation']:.1e}, {loss['units']:.2g}x what rounding may"
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
        if scale and cosine is not None and cosine > 1 - 1e-9 and abs(scale - 1) > SHOWN:
            return f"{label}{scale:.4g}x the full_batch gradient (accumulation_steps={k})"
        what = "gradients"
        if "gradients" not in kinds:  # What optimizers take: a clip has made them other gradients.
            relative = max(each.relative for each in judgement.findings if each.kind == "applied")
            what = "clipped gradients"
        return f"{label}{what} differ by {relative:.1e} (accumulation_steps={k})"
    if "samples" in kinds:
        seen = entry["optimizer_steps_seen"]
        if seen["accumulated"] == seen["full_batch"]:
            return f"{label}optimizer steps consumed other samples (accumulation_steps={k})"
        return f"{label}{seen['accumulated']} optimizer steps, not {seen['full_batch']} (accumulation_steps={k})"
    finding = judgement.findings[0] if judgement.findings else None
    if finding is None and first and "printed_as" in first["evidence"]:
        shown = first["evidence"]["relative"]
        return f"{label}printed losses differ by {shown:.1e} (accumulation_steps={k})"
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
    # As of the gradients, the worst of all optimizer steps.
    worst = max(each.relative for each in judgement.findings if each.kind == finding.kind)
    if finding.kind == "logged" and finding.detail:
        return f"{label}{finding.detail} (accumulation_steps={k})"
    return f"{label}{what} differ by {worst:.1e} (accumulation_steps={k})"
