"""Learning rates over the wrong horizon: EQ308."""

from __future__ import annotations

from equivcheck.interventions import Construct, Length, Repeat
from equivcheck.view import Suspicion, View


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion if learning rates differ and no scheduler was stepped inside a cycle."""
    finding = view.judgement.first("learning_rates")
    if finding is None:
        return []
    experiment = view.experiment
    reference, candidate = view.reference.schedulers, view.candidate.schedulers
    variants = []
    differing = [
        {"scheduler": b["scheduler"], "full_batch": a["arguments"], "accumulated": b["arguments"]}
        for a, b in zip(reference, candidate, strict=False)
        if a["arguments"] != b["arguments"]
    ]
    if differing:
        variants.append((Construct(view.experiment.reference()),))
    if candidate:
        variants.append((Repeat(view.steps),))
    variants.append((Length(len(experiment.data.rows)),))
    evidence: dict[str, object] = {"relative": finding.relative}
    if differing:
        evidence["schedulers"] = differing
    inside = view.inside("scheduler")
    if inside and not differing:
        return []
    return [Suspicion("EQ308", list(variants), evidence, finding.matched, 28)]
