"""Faults that the full batch has too: EQ110, EQ302, EQ404, EQ405.

Nothing differs between the two runs, so they are found by putting one thing right in the
*reference*.
"""

from __future__ import annotations

from typing import Final

from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment
from equivcheck.interventions import Fresh, Intervention, UnscaleFirst
from equivcheck.noise import SAFETY
from equivcheck.recording import Recording
from equivcheck.sums import kept_sums
from equivcheck.verdict import judge, overall
from equivcheck.view import Suspicion

# A factor between two gradients: float32 leaves 1e-7 of it at the most, another operation than a product far more.
PURE: Final = 1e-6


def shared_faults(experiment: Experiment) -> list[Suspicion]:
    """Return the faults of the full-batch run itself, each proved by an intervention in it."""
    found = [*_objective(experiment)]
    reference = experiment.reference()
    if any(event.kind == "leftover" for event in reference.timeline):
        found += _altered(experiment, "EQ302", Fresh())
    codes = {each.code for each in found}
    if "EQ302" not in codes and (evidence := kept_sums(experiment)) is not None:
        evidence = dict(evidence)
        step = evidence.pop("optimizer_step")
        found.append(Suspicion("EQ302", [], evidence, step, shared=True, proved=True))
    if any(
        event.kind == "clip" and event.detail.get("scale", 1.0) != 1.0
        for event in reference.timeline
    ):
        found += _altered(experiment, "EQ405", UnscaleFirst())
    elif (scale := _late_scale(reference)) != 1.0:
        found += _altered(experiment, "EQ405", UnscaleFirst(scale))
    return found


def _late_scale(reference: Recording) -> float:
    """Return the loss scale that the loop gives by hand and takes out again after a clip; 1 if there is none."""
    for event in reference.timeline:
        if event.kind == "rescaled" and event.backwards and event.detail["rest"] < PURE:
            carried = reference.backwards[event.backwards - 1].root_scalar
            if abs(event.detail["scale"] * carried - 1.0) < PURE:
                return carried
    return 1.0


def _objective(experiment: Experiment) -> list[Suspicion]:
    """EQ110: the gradient of the stated objective is not the one that was trained on."""
    noise = experiment.noise()
    for step in experiment.reference().steps:
        if step.objective is None:
            continue
        whole = overall(step.objective)
        limit = max(SAFETY * noise.total(step.index, lambda s: s.gradients), noise.floor())
        if whole.finite and whole.relative > limit:
            # The sums were taken with the objective's gradient as the one compared to.
            evidence = {"relative": whole.relative, "scale": whole.scale, "cosine": whole.cosine}
            return [Suspicion("EQ110", [], evidence, step.index, shared=True, proved=True)]
    return []


def _altered(experiment: Experiment, code: str, intervention: Intervention) -> list[Suspicion]:
    try:
        altered = experiment.altered_reference((intervention,))
    except EquivcheckError:
        return []
    result = judge(experiment.reference(), altered, experiment.noise(), logged=False)
    finding = result.first("gradients", "applied", "parameters", "state")
    if finding is None:
        return []
    evidence = {"relative": finding.relative, "put_right": intervention.name}
    return [Suspicion(code, [], evidence, max(finding.matched, 0), shared=True, proved=True)]


def skipped_steps(experiment: Experiment) -> list[Suspicion]:
    """EQ404: a step that float64 takes is left out in the arithmetic as written."""
    for role, promoted in (
        ("native_reference", experiment.reference()),
        ("native_candidate", experiment.candidate()),
    ):
        native = experiment.native(role)
        took = {
            step.matched for step in native.steps if step.matched is not None and not step.skipped
        }
        left_out = [
            step.matched
            for step in promoted.steps
            if step.matched is not None and step.matched not in took and not step.skipped
        ]
        if left_out and len(native.steps) <= len(promoted.steps):
            scales = sorted({each.loss_scale for each in native.backwards})
            evidence = {"role": role, "optimizer_steps": left_out[:8], "loss_scales": scales[:8]}
            return [
                Suspicion(
                    "EQ404",
                    [],
                    evidence,
                    left_out[0],
                    shared=role == "native_reference",
                    proved=True,
                )
            ]
    return []
